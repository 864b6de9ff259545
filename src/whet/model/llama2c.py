"""llama2.c's files: a checkpoint (`.bin`, version 0) and its tokenizer, read and written.

A checkpoint is seven int32 (dim, hidden, layers, heads, key/value heads, vocabulary, context), little
endian; a positive vocabulary says that the head is the embedding. Then float32, each kind stacked
over the layers, and two rotary tables. Rotary pairs are neighbours there and halves in Hugging Face's
models: rows of wq and wk change places, and no value changes.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whet.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import torch

HEADER = struct.Struct("<7i")
_FIELDS = ("dim", "hidden_dim", "num_layers", "num_heads", "num_kv_heads", "vocab_size", "context")
BOS, NUM_SPECIAL, NUM_BYTES = 1, 3, 256
NORM_EPS, ROPE_BASE = 1e-5, 10000.0
# The checkpoint's order, with Hugging Face's names; {} is the layer.
LAYER_TENSORS = (
    "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "post_attention_layernorm", "mlp.gate_proj", "mlp.down_proj", "mlp.up_proj",
)  # fmt: skip


def shapes(config: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    """Return a checkpoint's tensors in the file's order, under Hugging Face's names.

    Args:
        config: As `read_checkpoint` gives it.
    """
    dim, hidden, head = config["dim"], config["hidden_dim"], config["dim"] // config["num_heads"]
    keys = config["num_kv_heads"] * head
    sizes = {
        "input_layernorm": (dim,), "post_attention_layernorm": (dim,), "self_attn.q_proj": (dim, dim),
        "self_attn.k_proj": (keys, dim), "self_attn.v_proj": (keys, dim), "self_attn.o_proj": (dim, dim),
        "mlp.gate_proj": (hidden, dim), "mlp.down_proj": (dim, hidden), "mlp.up_proj": (hidden, dim),
    }  # fmt: skip
    found = [("model.embed_tokens.weight", (config["vocab_size"], dim))]
    for name in LAYER_TENSORS:
        for layer in range(config["num_layers"]):
            found.append((f"model.layers.{layer}.{name}.weight", sizes[name]))
    found += [("model.norm.weight", (dim,)), ("cos", (config["context"], head // 2))]
    found.append(("sin", (config["context"], head // 2)))
    if not config["tied"]:
        found.append(("lm_head.weight", (config["vocab_size"], dim)))
    return found


def read_checkpoint(path: Path) -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
    """Read a checkpoint's header, and its numbers as one mapped array.

    Args:
        path: The `.bin` file.

    Raises:
        InputError: It is no llama2.c checkpoint of version 0.
    """
    import numpy as np

    with open(path, "rb") as file:
        head = file.read(HEADER.size)
    values = HEADER.unpack(head) if len(head) == HEADER.size else (0,) * 7
    if values[0] == 0x616B3432:
        raise InputError(
            f"'{path}' is a llama2.c checkpoint of version {values[1]}",
            fix="export it as version 0",
        )
    config: dict[str, Any] = dict(zip(_FIELDS, values, strict=True))
    config["tied"], config["vocab_size"] = values[5] > 0, abs(values[5])
    sound = min(*values[:5], abs(values[5]), values[6]) > 0 and not (
        values[0] % values[3] or values[3] % values[4]
    )
    if sound:
        expected = sum(int(np.prod(shape)) for _, shape in shapes(config))
        sound = path.stat().st_size == HEADER.size + 4 * expected
    if not sound:
        raise InputError(
            f"'{path}' is of a kind whet does not read: its size is not what the header of a llama2.c "
            "checkpoint says", fix="use a .gguf or llama2.c .bin file, a Hugging Face folder or a Hub id",
        )  # fmt: skip
    return config, np.memmap(path, np.dtype("<f4"), "r", offset=HEADER.size)


def read_tokenizer(path: Path, size: int) -> list[tuple[bytes, float]]:
    """Read a llama2.c tokenizer: its pieces with their scores.

    Args:
        path: The file.
        size: How many pieces it must have.

    Raises:
        InputError: It is no such file, or has another number of pieces.
    """
    data, place = path.read_bytes(), 4
    pieces: list[tuple[bytes, float]] = []
    while place + 8 <= len(data):
        score, length = struct.unpack_from("<fi", data, place)
        if not 0 <= length <= len(data) - place - 8:
            break
        pieces.append((data[place + 8 : place + 8 + length], score))
        place += 8 + length
    if len(pieces) != size or place != len(data):
        raise InputError(
            f"'{path}' is not a llama2.c tokenizer of {size} pieces", f"{len(pieces)} pieces",
            "use the tokenizer the model was trained with",
        )  # fmt: skip
    return pieces


def to_hugging_face(
    config: dict[str, Any], weights: np.ndarray[Any, Any], pieces: list[tuple[bytes, float]]
) -> tuple[Any, Any]:
    """Return a checkpoint as a transformers model and tokenizer.

    Args:
        config: Of `read_checkpoint`.
        weights: Its numbers.
        pieces: Of `read_tokenizer`.
    """
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = LlamaConfig(
        vocab_size=config["vocab_size"], hidden_size=config["dim"],
        intermediate_size=config["hidden_dim"], num_hidden_layers=config["num_layers"],
        num_attention_heads=config["num_heads"], num_key_value_heads=config["num_kv_heads"],
        max_position_embeddings=config["context"], rms_norm_eps=NORM_EPS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
        tie_word_embeddings=config["tied"], bos_token_id=BOS, eos_token_id=BOS,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(settings)
    state, place = {}, 0
    for name, shape in shapes(config):
        count = int(np.prod(shape))
        value = torch.from_numpy(np.array(weights[place : place + count])).reshape(shape)
        place += count
        if name in ("cos", "sin"):
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            value = to_halves(value, config["dim"] // config["num_heads"])
        state[name] = value
    if config["tied"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model, _tokenizer(pieces)


def to_halves(value: torch.Tensor, head: int) -> torch.Tensor:
    """Reorder each head's rows from rotated neighbours to rotated halves.

    Args:
        value: A weight of queries or keys.
        head: Width of a head.
    """
    return value.reshape(-1, head // 2, 2, value.shape[1]).swapaxes(1, 2).reshape(value.shape)


def to_neighbours(value: torch.Tensor, head: int) -> torch.Tensor:
    """Reorder each head's rows from rotated halves to rotated neighbours.

    Args:
        value: A weight of queries or keys.
        head: Width of a head.
    """
    return value.reshape(-1, 2, head // 2, value.shape[1]).swapaxes(1, 2).reshape(value.shape)


def rotary_tables(head: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cosines and sines that a checkpoint ends with, as its own exporter computes them.

    Args:
        head: Width of a head.
        context: Number of positions.
    """
    import torch

    frequencies = 1.0 / (ROPE_BASE ** (torch.arange(0, head, 2).float() / head))
    angles = torch.outer(torch.arange(context).float(), frequencies)
    return angles.cos(), angles.sin()


def _tokenizer(pieces: list[tuple[bytes, float]]) -> Any:
    """Return SentencePiece's BPE with these pieces; `<s>` both begins a text and ends it.

    llama2.c stops at `<s>`, which its models learn as what stands between texts.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    texts = ["<unk>", "<s>", "</s>"]
    texts += [piece.decode("utf-8").replace(" ", "▁") for piece, _ in pieces[NUM_SPECIAL:]]
    vocab = {text: token for token, text in enumerate(texts)}
    core = Tokenizer(
        models.BPE(
            vocab, _merges(vocab, pieces), byte_fallback=True, unk_token="<unk>", fuse_unk=True
        )
    )
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", BOS)])
    core.add_special_tokens([AddedToken(text, normalized=False) for text in texts[:NUM_SPECIAL]])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="<s>",
        unk_token="<unk>",
        pad_token="<unk>",
    )


def _merges(vocab: dict[str, int], pieces: list[tuple[bytes, float]]) -> list[tuple[str, str]]:
    """Return all ways to join two pieces into a third, the best score first."""
    found = []
    for text, token in vocab.items():
        if token < NUM_SPECIAL + NUM_BYTES:
            continue
        for cut in range(1, len(text)):
            if text[:cut] in vocab and text[cut:] in vocab:
                found.append((-pieces[token][1], token, text[:cut], text[cut:]))
    found.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in found]
