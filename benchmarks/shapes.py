"""Models of published shapes with seeded weights: what a step costs does not depend on their values.

    python -m benchmarks.shapes NAME FOLDER [--nf4]

`make_model` writes a Hugging Face folder one tensor at a time, so that the whole never is in memory,
on the GPU where there is one. The weights keep activations and logits where a trained model has them,
so that dtypes, clipping and quantisation meet usual numbers; the loss of random tokens is near
ln(vocabulary). Left out on purpose: outlier features, and anything a model has learned.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHARD_BYTES = 2_000_000_000
NORM_SPREAD = 0.1
BIAS_STD = 0.1
RESIDUAL_WRITERS = ("o_proj", "down_proj")


def _llama(layers: int, width: int, mlp: int, heads: int, **more: Any) -> dict[str, Any]:
    """Return what the Llama 3.1 and 3.2 configs have in common."""
    rope = {
        "factor": more.pop("factor", 8.0),
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": mlp,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": rope,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 128256,
        **more,
    }


# The contents of the published config.json files.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _llama(
        2, 64, 192, 4, num_key_value_heads=2, head_dim=16, vocab_size=49152,
        bos_token_id=1, eos_token_id=2,
    ),
    "qwen2.5-0.5b": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": 896,
        "initializer_range": 0.02,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "llama-3.2-1b": _llama(
        16, 2048, 8192, 32, head_dim=64, factor=32.0, tie_word_embeddings=True
    ),
    "llama-3.2-3b": _llama(
        28, 3072, 8192, 24, head_dim=128, factor=32.0, tie_word_embeddings=True
    ),
    "llama-3.1-8b": _llama(32, 4096, 14336, 32),
    "qwen3-14b": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "initializer_range": 0.02,
        "intermediate_size": 17408,
        "max_position_embeddings": 40960,
        "max_window_layers": 40,
        "model_type": "qwen3",
        "num_attention_heads": 40,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "llama-3.1-70b": _llama(80, 8192, 28672, 64),
    "llama-3.1-405b": _llama(126, 16384, 53248, 128),
}  # fmt: skip


def make_model(
    name: str,
    folder: Path,
    quantised: bool = False,
    seed: int = 0,
    tokenizer: str = "smollm2-135m",
) -> Path:
    """Write a model of a shape, unless it is there.

    Args:
        name: Of SHAPES.
        folder: Where models are kept; this one gets a folder inside.
        quantised: Write NF4 weights with double quantisation, as bitsandbytes stores them.
        seed: Of the weights. The same seed gives other weights on a GPU than on a CPU.
        tokenizer: Whose tokenizer goes with it; its ids must be within the shape's vocabulary.

    Returns:
        The model's folder, whole.
    """
    target = folder / (name + ("-nf4" if quantised else "") + (f"-seed{seed}" if seed else ""))
    if target.is_dir():
        return target
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        _write_tokenizer_and_config(SHAPES[name], temporary, quantised, tokenizer)
        tensors = _weights(temporary, quantised, seed)
        _write_shards(tensors, temporary)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _write_tokenizer_and_config(
    shape: dict[str, Any], folder: Path, quantised: bool, source: str
) -> None:
    import torch
    from transformers import AutoTokenizer, BitsAndBytesConfig

    from whet.model.load import resolve

    tokenizer: Any = AutoTokenizer.from_pretrained(resolve(source))
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    assert len(tokenizer) <= shape["vocab_size"], "the tokenizer has more ids than the shape"
    # The tokenizer's, so that no trainer has to bring the two in line.
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = {**shape, **ids}
    if quantised:
        config["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ).to_dict()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")


def _weights(folder: Path, quantised: bool, seed: int) -> Iterator[dict[str, Any]]:
    """Make the tensors of one parameter after another, on the CPU when they are given."""
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    if quantised:
        del config.quantization_config
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        if module is head and config.tie_word_embeddings:
            continue
        for kind, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{kind}"
            mean, std = _distribution(path, module, kind, module is head, config)
            generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()) + seed)
            weight = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
            weight.normal_(mean, std, generator=generator)
            if quantised and isinstance(module, nn.Linear) and kind == "weight":
                if module is not head:  # transformers leaves the head as it is
                    yield _quantise(name, weight)
                    continue
            yield {name: weight.cpu()}
    if device.type == "cuda":
        torch.cuda.empty_cache()  # who asked for the model may go on and share the device


def _distribution(
    path: str, module: Any, kind: str, is_head: bool, config: Any
) -> tuple[float, float]:
    """Return mean and standard deviation of a parameter.

    A projection keeps the variance; those that write to the residual stream are smaller by the root
    of their number (GPT-2), so that the stream stays near 1 at any depth. A head makes logits of
    standard deviation 1/2, which adds 1/8 to the loss of random tokens.
    """
    from torch import nn

    width, tied = config.hidden_size, config.tie_word_embeddings
    if kind == "bias":
        return 0.0, BIAS_STD
    if is_head or (isinstance(module, nn.Embedding) and tied):
        return 0.0, 0.5 / math.sqrt(width)
    if isinstance(module, nn.Embedding):
        return 0.0, 0.02
    if isinstance(module, nn.Linear):
        writers = 2 * config.num_hidden_layers if path.endswith(RESIDUAL_WRITERS) else 1
        return 0.0, 1 / math.sqrt(writers * module.in_features)
    return 1.0, NORM_SPREAD


def _quantise(name: str, weight: Any) -> dict[str, Any]:
    """Return the tensors that bitsandbytes' Linear4bit saves for a weight."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    found = {name: packed}
    found |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {key: value.cpu() for key, value in found.items()}


def _write_shards(tensors: Iterator[dict[str, Any]], folder: Path) -> None:
    """Write tensors as they come into files of at most SHARD_BYTES, and the index of them.

    A tensor that alone is more gets a file of its own.
    """
    from safetensors.torch import save_file

    held: dict[str, Any] = {}
    files: list[list[str]] = []
    total = num_held = 0

    def write() -> None:
        save_file(held, folder / f"shard-{len(files)}", metadata={"format": "pt"})
        files.append(list(held))
        held.clear()

    for found in tensors:
        num_bytes = sum(tensor.nbytes for tensor in found.values())
        if held and num_held + num_bytes > SHARD_BYTES:
            write()
            num_held = 0
        held.update(found)
        num_held += num_bytes
        total += num_bytes
    write()
    places = {}
    for number, names in enumerate(files):
        file = f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def main() -> None:
    """Write one model and print its folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--nf4", action="store_true", help="NF4 weights, as bitsandbytes stores them"
    )
    arguments = parser.parse_args()
    print(make_model(arguments.name, arguments.folder, quantised=arguments.nf4))


if __name__ == "__main__":
    main()
