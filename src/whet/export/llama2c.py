"""Export a model shaped like Llama 2 as llama2.c's files: model.bin and tokenizer.bin."""

from __future__ import annotations

import json
import logging
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whet.errors import InputError
from whet.export.check import Gate, check
from whet.export.exports import store, usage_of
from whet.export.gguf_tokenizer import piece_scores
from whet.export.live import TransformersModel, live_of
from whet.export.weights import tuned_weights
from whet.model.llama2c import (
    BOS,
    HEADER,
    NORM_EPS,
    NUM_BYTES,
    NUM_SPECIAL,
    ROPE_BASE,
    rotary_tables,
    shapes,
    to_neighbours,
)
from whet.model.load import load_tokenizer
from whet.model.unpack import unpack_llama2c
from whet.runs import RunFolder, require_free, whole_folder

if TYPE_CHECKING:
    import torch

    from whet.export.tensors import Weights
    from whet.model import Tokenizer

logger = logging.getLogger(__name__)


class Llama2cModel(TransformersModel):
    """A checkpoint of llama2.c, read back from its two files."""

    def ends_generation(self, token: int) -> bool:
        """Tell whether llama2.c stops at a token: at `<s>` and at nothing else."""
        return token == BOS


def export_llama2c(
    run: RunFolder,
    folder: Path,
    base: str = "original",
    checked: bool = True,
    tell: Callable[[str], None] = logger.info,
) -> tuple[list[Path], list[Gate]]:
    """Write model.bin and tokenizer.bin, read them again, and compare them with the live model.

    Args:
        run: A finished run.
        folder: Where to; it is replaced whole.
        base: What a QLoRA run is merged into: `original` or `dequantised`.
        checked: Read them again and compare.
        tell: Called with what is being done.

    Returns:
        The files, and what was compared.

    Raises:
        InputError: The model or its tokenizer is not of the shape that llama2.c has.
        WhetError: The disk is full.
    """
    import torch

    tokenizer = load_tokenizer(run.config.model, run.weights_dir)
    with tuned_weights(run, base) as weights:
        tell(f"writing {folder}")
        with whole_folder(folder) as temporary:
            write_checkpoint(weights, temporary / "model.bin")
            write_tokenizer(tokenizer, weights.config.vocab_size, temporary / "tokenizer.bin")
        files = [folder / "model.bin", folder / "tokenizer.bin"]
        gates = []
        if checked:
            tell("reading it again, and comparing it with the live model")
            live = live_of(run, tokenizer, weights if base == "dequantised" else None)
            program = Llama2cModel(unpack_llama2c(files[0]), torch.float32)
            gates = [check(live, program, files[0].name, "f32", templates=False)[0]]
    store(run, folder, "llama2c", gates, usage_of("llama2c", files[0]))
    return files, gates


def write_checkpoint(weights: Weights, path: Path) -> None:
    """Write a checkpoint of version 0, one tensor at a time.

    Args:
        weights: The model.
        path: Where to.

    Raises:
        InputError: The model is not of the shape that llama2.c has.
        WhetError: The disk is full.
    """
    config = _shape_of(weights)
    head = config["dim"] // config["num_heads"]
    cosines, sines = rotary_tables(head, config["context"])
    tables = {"cos": cosines, "sin": sines}
    order = shapes(config)
    require_free(path, HEADER.size + 4 * sum(math.prod(shape) for _, shape in order), "model.bin")
    size = config["vocab_size"] if config["tied"] else -config["vocab_size"]
    with open(path, "wb") as file:
        file.write(HEADER.pack(
            config["dim"], config["hidden_dim"], config["num_layers"], config["num_heads"],
            config["num_kv_heads"], size, config["context"],
        ))  # fmt: skip
        for name, shape in order:
            value: torch.Tensor = tables[name] if name in tables else weights.read(name).float()
            assert tuple(value.shape) == shape, (name, value.shape, shape)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                value = to_neighbours(value, head)
            value.contiguous().numpy().astype("<f4", copy=False).tofile(file)


def _shape_of(weights: Weights) -> dict[str, Any]:
    """Read a model's config into llama2.c's, which has no place for anything else."""
    config = weights.config
    if config.model_type not in ("llama", "mistral"):
        raise InputError(
            "llama2.c has models shaped like Llama 2 only", config.model_type, "use --to gguf"
        )
    rope = dict(config.rope_parameters or {})
    head = config.hidden_size // config.num_attention_heads
    wrong = [
        f"{what} is {value}; llama2.c has {fixed}"
        for what, value, fixed in (
            ("the norm's epsilon", config.rms_norm_eps, NORM_EPS),
            ("the rope's base", float(rope.get("rope_theta", ROPE_BASE)), ROPE_BASE),
            ("the rope's kind", rope.get("rope_type", "default"), "default"),
            ("a head's width", getattr(config, "head_dim", None) or head, head),
            ("the activation", config.hidden_act, "silu"),
            ("a bias", any(name.endswith(".bias") for name in weights.infos), False),
        )
        if value != fixed
    ]
    if wrong:
        raise InputError.listing("llama2.c has no place for this model; use --to gguf:", wrong)
    window = getattr(config, "sliding_window", None)
    return {
        "dim": config.hidden_size,
        "hidden_dim": config.intermediate_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "context": min(config.max_position_embeddings, window or config.max_position_embeddings),
        "tied": bool(config.tie_word_embeddings),
    }


def write_tokenizer(tokenizer: Tokenizer, num_rows: int, path: Path) -> None:
    """Write a SentencePiece tokenizer as llama2.c reads it.

    Args:
        tokenizer: With bytes as pieces 3 to 258, and blanks before texts.
        num_rows: Rows of the embedding.
        path: Where to.

    Raises:
        InputError: It is of another kind.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    vocab = model.get("vocab", {})
    if (
        not model.get("byte_fallback")
        or vocab.get("<0x00>") != NUM_SPECIAL
        or len(vocab) > num_rows
    ):
        raise InputError(
            "llama2.c has SentencePiece tokenizers only, with bytes as pieces 3 to 258",
            model.get("type"), "use --to gguf",
        )  # fmt: skip
    texts = [b"<unk>", b"\n<s>\n", b"\n</s>\n"] + [b"<unused>"] * (num_rows - NUM_SPECIAL)
    added = {token["content"]: token["id"] for token in described.get("added_tokens", ())}
    for text, token in {**added, **vocab}.items():
        if token >= NUM_SPECIAL:
            plain = text if token < NUM_SPECIAL + NUM_BYTES else text.replace("▁", " ")
            texts[token] = plain.encode()
    scores = piece_scores(vocab, model["merges"], num_rows)
    with open(path, "wb") as file:
        file.write(struct.pack("<i", max(map(len, texts))))
        for text, score in zip(texts, scores, strict=True):
            file.write(struct.pack("<fi", score, len(text)) + text)
