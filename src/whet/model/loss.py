"""The training loss: cross entropy summed over the labelled tokens, without logits for the others.

Losses over pairs are made of the log-probability of each label, which is here too.

With the engine in the model its head answers. Without, transformers' models take a boolean mask as
`logits_to_keep`, and then multiply by the head only the hidden states of those positions.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from whet.model import CausalLM

if TYPE_CHECKING:
    import torch

    from whet.engine.passes import PackedPass


def summed_loss(
    model: CausalLM, batch: dict[str, torch.Tensor] | PackedPass
) -> tuple[torch.Tensor, int]:
    """Sum the cross entropy over a batch's labelled tokens, making logits for those rows alone.

    Args:
        model: A causal language model, or a peft or parallel wrapper of one.
        batch: `input_ids`, `labels` (not shifted), and `attention_mask` of padded rows or `position_ids`
            of packed ones; (B, T) each. Or a PackedPass, where the engine packs and answers.

    Returns:
        The sum in float32 (0 with zero gradients when nothing is labelled), and the number of labels.
    """
    from torch.nn import functional

    from whet.engine.swap import fuses_head

    if not isinstance(batch, dict):
        output = model(whet_pass=batch, num_items_in_batch=1, use_cache=False, whet_loss_only=True)
        return output.loss, batch.num_labels
    target_BT = functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    keep_BT = target_BT != -100
    if fuses_head(model):
        output = model(**batch, num_items_in_batch=1, use_cache=False, whet_loss_only=True)
        return output.loss, int(keep_BT.sum())
    logits_NV = _labelled_logits(model, batch, keep_BT)
    loss = functional.cross_entropy(logits_NV.float(), target_BT[keep_BT], reduction="sum")
    return loss, int(keep_BT.sum())


def label_log_probs(model: CausalLM, batch: dict[str, torch.Tensor] | PackedPass) -> torch.Tensor:
    """Return the log-probability of every label, making logits for the labelled rows alone.

    Args:
        model: A causal language model, or a peft or parallel wrapper of one.
        batch: As in `summed_loss`.

    Returns:
        Float32 (N): the labels of the first row or document, then those of the next, and so on.
    """
    from torch.nn import functional

    from whet.engine.swap import fuses_head

    if not isinstance(batch, dict) or fuses_head(model):
        inputs: dict[str, Any] = batch if isinstance(batch, dict) else {"whet_pass": batch}
        output: Any = model(**inputs, use_cache=False, whet_log_probs=True)
        if "log_probs" in output:
            return output["log_probs"]
        batch = batch if isinstance(batch, dict) else batch.as_batch()
    target_BT = functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    logits_NV = _labelled_logits(model, batch, target_BT != -100).float()
    return -functional.cross_entropy(logits_NV, target_BT[target_BT != -100], reduction="none")


def _labelled_logits(
    model: CausalLM, batch: dict[str, torch.Tensor], keep_BT: torch.Tensor
) -> torch.Tensor:
    options: dict[str, Any] = {"logits_to_keep": keep_BT} if _takes_row_mask(model) else {}
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False, **options).logits
    return logits if options else logits[keep_BT]


def _takes_row_mask(model: Any) -> bool:
    """Whether a model makes logits for the rows of a boolean mask only (transformers 5.21 and later)."""
    model = getattr(model, "module", model)  # out of a DDP wrapper
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return hasattr(sys.modules[type(base).__module__], "slice_logits_to_keep")
