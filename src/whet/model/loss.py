"""The training loss: cross entropy summed over the labelled tokens, without logits for the others.

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
    options: dict[str, Any] = {"logits_to_keep": keep_BT} if _takes_row_mask(model) else {}
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False, **options).logits
    logits_NV = logits if options else logits[keep_BT]
    loss = functional.cross_entropy(logits_NV.float(), target_BT[keep_BT], reduction="sum")
    return loss, int(keep_BT.sum())


def _takes_row_mask(model: Any) -> bool:
    """Whether a model makes logits for the rows of a boolean mask only (transformers 5.21 and later)."""
    model = getattr(model, "module", model)  # out of a DDP wrapper
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return hasattr(sys.modules[type(base).__module__], "slice_logits_to_keep")
