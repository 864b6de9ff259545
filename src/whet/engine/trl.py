"""Answers in log-probabilities instead of logits, for trl's trainers and whet's own losses over pairs.

trl 1.16 puts `add_fused_lm_head` on every model and calls `model(..., labels=..., fused_lm_head=True)`.
Its own head scores every position, padding included, in tiles of the vocabulary (on two CPU cores 1.08 s
where plain logits take 0.28 s, 700 rows in bfloat16). With the engine on top (`swap.stay_on_top`) the
labelled rows alone are scored, and the answer has the same fields.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from whet.engine.head import EXTRAS, Head, token_log_probs


def settings(model: nn.Module) -> tuple[float, tuple[str, ...]]:
    """Return the temperature and the fields that trl's trainer asked its own head for.

    Args:
        model: A model on which trl's head was put; its settings live in that function's closure.
    """
    found = _settings(model)
    return float(found.get("temperature", 1.0)), tuple(found.get("outputs", ("log_probs",)))


def can_answer(model: nn.Module, head: Head) -> bool:
    """Tell whether the engine computes what trl's trainer asked for; if not, trl's own head does.

    Args:
        model: A model on which trl's head was put.
        head: How logits are made. A temperature behind a soft cap is no factor of the logits.
    """
    found = _settings(model)
    tempered = head.softcap is not None and found.get("temperature", 1.0) != 1.0
    return not tempered and not found.get("cast_lm_head_to_fp32")


def _settings(model: nn.Module) -> dict[str, Any]:
    own = vars(model)
    function = getattr(own.get("_whet_below") or own.get("_whet_original"), "__func__", None)
    return dict(inspect.getclosurevars(function).nonlocals) if function else {}


def answer(model: nn.Module, head: Head, batch: Any, kwargs: dict[str, Any]) -> Any:
    """Return trl's `FusedCausalLMOutput` for a labelled batch.

    Args:
        model: The causal language model.
        head: How logits are made.
        batch: The `LabelledBatch` of the call.
        kwargs: The call's arguments.

    Returns:
        Every per-token field is (B, L - 1) with `labels` and (B, L) with `shift_labels`, and zero
        where nothing is labelled.
    """
    from trl.trainer.utils import FusedCausalLMOutput  # type: ignore[import-not-found]

    temperature, names = settings(model)
    scaled = replace(head, logit_scale=head.logit_scale / temperature, label_smoothing=0.0)
    found = token_log_probs(
        batch.hidden_ND, batch.weight_VD, batch.bias_V, batch.target_N, scaled,
        tuple(name for name in names if name in EXTRAS),
    )  # fmt: skip
    width = batch.target_BL.shape[1] - (kwargs.get("shift_labels") is None)
    mask = batch.target_BL[:, :width] != -100
    fields = {
        name: torch.zeros(mask.shape, dtype=value.dtype, device=value.device).masked_scatter(
            mask.to(value.device), value
        )
        for name, value in found.items()
    }
    count = kwargs.get("num_items_in_batch")
    if count is None:
        count = max(1, len(batch.target_N))
    loss = -fields["log_probs"].sum() / count
    if not len(batch.target_N):
        loss = loss + batch.hidden_TD[:0].sum()
    return FusedCausalLMOutput(loss=loss, label_mask=mask, **fields)


def label_log_probs(head: Head, batch: Any) -> dict[str, torch.Tensor]:
    """Return the log-probability of each label, in the order of the labelled rows.

    Args:
        head: How logits are made.
        batch: The `LabelledBatch` of the call.

    Returns:
        `log_probs`, float32 (N), tied to every parameter also where N is 0.
    """
    found = token_log_probs(
        batch.hidden_ND, batch.weight_VD, batch.bias_V, batch.target_N, head
    )["log_probs"]  # fmt: skip
    return {"log_probs": found if len(found) else found + batch.hidden_TD[:0].sum()}
