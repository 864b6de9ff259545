"""Load an export again, as its users will, and compare it with the live model.

The bound is triangulated: the truth is the run's model in float32 with the adapter beside the
weights; a file of a narrower type may differ from it by twice what the run's own model differs when
it is cast to that type. So the bound follows the model and the rows, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whet.data.formats import Example
from whet.data.prepare import examples_of
from whet.data.template import render
from whet.errors import InputError
from whet.model import Tokenizer
from whet.model.load import device, load_model
from whet.runs import RunFolder
from whet.trained import load_adapted

if TYPE_CHECKING:
    import torch

_FALLBACK_TEXTS = ("The quick brown fox jumps over the lazy dog.", '{"answer": 42, "unit": "m/s"}')
_NUM_ROWS, _NUM_TOKENS = 4, 128


@dataclass(frozen=True, slots=True)
class Check:
    """The outcome of one comparison.

    Args:
        max_error: Largest difference of any logit from the live model's.
        bound: What it may be.
        rows: Texts compared.
        same_tokens: Whether the exported tokenizer and template give the same token ids.
    """

    max_error: float
    bound: float
    rows: int
    same_tokens: bool

    @property
    def passed(self) -> bool:
        """Whether the export is the live model within rounding."""
        return self.same_tokens and self.max_error <= self.bound


def check_export(
    run: RunFolder, folder: Path, kind: str, dtype: torch.dtype, tokenizer: Tokenizer
) -> Check:
    """Compare an export with the run it came from.

    Args:
        run: The run.
        folder: The exported folder.
        kind: `adapter` or `merged`.
        dtype: The type that was written.
        tokenizer: The run's tokenizer.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = _texts(run, tokenizer)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    again = AutoTokenizer.from_pretrained(str(folder))
    same = again.chat_template == tokenizer.chat_template and ids == [
        again(text, add_special_tokens=False)["input_ids"] for text in texts
    ]
    rows = [torch.tensor([row[:_NUM_TOKENS]], device=device()) for row in ids]
    base = run.config.model.model_copy(update={"load_in_4bit": False})

    live: Any = (
        load_adapted(base, torch.float32, run)
        if run.adapter_dir.is_dir()
        else load_model(base, torch.float32, run.model_dir)
    )
    truth = _logits(live, rows)
    rounded = truth if dtype is torch.float32 else _logits(live.to(dtype), rows)
    del live
    if kind == "adapter":
        loaded: Any = PeftModel.from_pretrained(load_model(base, dtype), str(folder))
    else:
        loaded = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype)
        loaded.to(device())  # pyright: ignore[reportArgumentType]
    exported = _logits(loaded, rows)

    def worst(one: list[torch.Tensor], two: list[torch.Tensor]) -> float:
        return max((a - b).abs().max().item() for a, b in zip(one, two, strict=True))

    # Float32 sums in another order: 1e-5 of the logits' own size (SmolLM2-135M, merged: 1.3e-6 of it).
    size = max(logits.abs().max().item() for logits in truth)
    return Check(worst(exported, truth), 2 * worst(rounded, truth) + 1e-5 * size, len(rows), same)


def _texts(run: RunFolder, tokenizer: Tokenizer) -> list[str]:
    """Return held-out conversations as text, or fixed texts when the run has none."""
    data = run.config.data
    sources = data.heldout or data.train
    try:
        found = list(islice(examples_of(data, sources), _NUM_ROWS))
    except InputError:  # the rows have moved since; any text shows whether the weights are right
        return list(_FALLBACK_TEXTS)
    return [_text(tokenizer, example) for example in found] or list(_FALLBACK_TEXTS)


def _text(tokenizer: Tokenizer, example: Example) -> str:
    if example.messages:
        return render(tokenizer, example.messages, example.tools).text
    if example.input_ids:
        return str(tokenizer.decode(example.input_ids[:500]))
    return example.text[:2000]


def _logits(model: Any, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    import torch

    model.eval()
    with torch.inference_mode():
        return [model(row, use_cache=False).logits.float() for row in rows]
