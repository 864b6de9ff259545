"""Causal attention over packed documents: one interface, and the backend that suits device and mask.

Each document attends to itself alone. Backends: flash attention through torch's own operator on CUDA
(`_flash_attention_forward`), the package flash-attn where that lacks something (a sliding window, a
soft cap), flex attention for what neither does, and on the CPU one document after the other, so that no
T x T mask is ever made.

Shapes: T tokens, H query heads, G key/value heads (H a multiple of G), K head width.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from typing import Any

import torch

from whet.engine.unpad import Packed
from whet.engine.varlen_cpu import document_backward, document_forward


@dataclass(frozen=True, slots=True)
class Mask:
    """What a token may see, and how scores are shaped.

    Args:
        scale: Factor of the scores.
        window: A token sees itself and the window - 1 tokens before it; None sees all.
        softcap: Scores become c tanh(score / c) (Gemma 2, arXiv 2408.00118); None leaves them.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


def varlen_forward(
    q_THK: torch.Tensor,
    k_TGK: torch.Tensor,
    v_TGK: torch.Tensor,
    packed: Packed,
    mask: Mask,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend within each document.

    Args:
        q_THK: Queries; any row stride.
        k_TGK: Keys.
        v_TGK: Values.
        packed: The documents.
        mask: Scale, window and soft cap.

    Returns:
        (out_THK contiguous, lse_HT float32): the output, and the scores' log-sum-exp for the backward;
        lse_HE where documents share tokens.
    """
    if packed.expand_E is not None:
        # Shared tokens attend once for each document, which is little beside the rest of a layer.
        whole = replace(packed, expand_E=None, own_T=None)
        qkv = [packed.expand(x) for x in (q_THK, k_TGK, v_TGK)]
        out_EHK, lse_HE = varlen_forward(qkv[0], qkv[1], qkv[2], whole, mask)
        return packed.contract(out_EHK), lse_HE
    mask = _without_idle_window(mask, packed)
    if q_THK.device.type == "cuda":
        return _cuda(mask, q_THK).forward(q_THK, k_TGK, v_TGK, packed, mask)
    out_THK = torch.empty(q_THK.shape, dtype=q_THK.dtype)
    lse_HT = torch.empty((q_THK.shape[1], q_THK.shape[0]), dtype=torch.float32)
    start = 0
    for length in filter(None, packed.lengths):
        part = slice(start, start + length)
        start += length
        document_forward(
            q_THK[part], k_TGK[part], v_TGK[part], mask.scale, mask.window, mask.softcap,
            out_THK[part], lse_HT[:, part],
        )  # fmt: skip
    return out_THK, lse_HT


def varlen_backward(
    do_THK: torch.Tensor,
    q_THK: torch.Tensor,
    k_TGK: torch.Tensor,
    v_TGK: torch.Tensor,
    out_THK: torch.Tensor,
    lse_HT: torch.Tensor,
    packed: Packed,
    mask: Mask,
    dq_THK: torch.Tensor,
    dk_TGK: torch.Tensor,
    dv_TGK: torch.Tensor,
) -> None:
    """Write the gradients of q, k and v.

    Args:
        do_THK: Gradient of the output.
        q_THK: As in the forward.
        k_TGK: As in the forward.
        v_TGK: As in the forward.
        out_THK: The forward's output.
        lse_HT: The forward's log-sum-exp.
        packed: The documents.
        mask: Scale, window and soft cap.
        dq_THK: Where to write; any row stride.
        dk_TGK: Where to write.
        dv_TGK: Where to write.
    """
    if packed.expand_E is not None:
        _shared_backward(
            do_THK, [q_THK, k_TGK, v_TGK], out_THK, lse_HT, packed, mask, [dq_THK, dk_TGK, dv_TGK]
        )
        return
    mask = _without_idle_window(mask, packed)
    if q_THK.device.type == "cuda":
        grads = _cuda(mask, q_THK).backward(
            do_THK, q_THK, k_TGK, v_TGK, out_THK, lse_HT, packed, mask
        )
        for target, grad in zip((dq_THK, dk_TGK, dv_TGK), grads, strict=True):
            target.copy_(grad)
        return
    start = 0
    for length in filter(None, packed.lengths):
        part = slice(start, start + length)
        start += length
        document_backward(
            do_THK[part], q_THK[part], k_TGK[part], v_TGK[part], out_THK[part], lse_HT[:, part],
            mask.scale, mask.window, mask.softcap, dq_THK[part], dk_TGK[part], dv_TGK[part],
        )  # fmt: skip


def _shared_backward(
    do_THK: torch.Tensor,
    qkv: list[torch.Tensor],
    out_THK: torch.Tensor,
    lse_HE: torch.Tensor,
    packed: Packed,
    mask: Mask,
    targets: list[torch.Tensor],
) -> None:
    """Write the gradients where documents share tokens; a token's output is that of its first place."""
    assert packed.expand_E is not None and packed.own_T is not None
    whole = replace(packed, expand_E=None, own_T=None)
    q, k, v, out_EHK = (packed.expand(x) for x in (*qkv, out_THK))
    do_EHK = torch.zeros_like(out_EHK).index_copy_(0, packed.own_T, do_THK)
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    varlen_backward(do_EHK, q, k, v, out_EHK, lse_HE, whole, mask, grads[0], grads[1], grads[2])
    for target, grad in zip(targets, grads, strict=True):
        target.zero_().index_add_(0, packed.expand_E, grad)


def _without_idle_window(mask: Mask, packed: Packed) -> Mask:
    """Drop a window that no document is long enough to feel."""
    if mask.window is not None and mask.window >= packed.longest:
        return Mask(mask.scale, None, mask.softcap)
    return mask


def attend_plainly(qkv: list[torch.Tensor], mask: Mask, dropout: float) -> torch.Tensor:
    """Attend within one document with all its scores at once, for what no kernel does.

    Args:
        qkv: Queries, keys and values, (1, heads, L, width).
        mask: Scale, window and soft cap.
        dropout: Of the attention's weights.
    """
    q = qkv[0]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in qkv[1:])
    scores = (q @ k.transpose(2, 3)) * mask.scale
    if mask.softcap is not None:
        scores = torch.tanh(scores / mask.softcap) * mask.softcap
    seen = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
    if mask.window is not None:
        seen = seen.triu(1 - mask.window)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1, dtype=torch.float32).to(v.dtype)
    return torch.nn.functional.dropout(weights, dropout) @ v


def _cuda(mask: Mask, q_THK: torch.Tensor) -> Any:
    width = q_THK.shape[-1]
    half = q_THK.dtype in (torch.float16, torch.bfloat16)
    recent = torch.cuda.get_device_capability(q_THK.device) >= (8, 0)
    if half and recent and width <= 256:
        if mask.softcap is None:
            return AtenFlash
        if importlib.util.find_spec("flash_attn"):
            return FlashAttn
    return Flex


class AtenFlash:
    """FlashAttention-2 (arXiv 2307.08691) as built into torch: 16 bits, compute capability 8.0 up."""

    @staticmethod
    def _arguments(packed: Packed, mask: Mask) -> dict[str, Any]:
        window = -1 if mask.window is None else mask.window - 1
        return {
            "scale": mask.scale,
            "window_size_left": window,
            "window_size_right": 0 if mask.window is not None else -1,
        }

    @staticmethod
    def forward(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed, mask: Mask
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (out_THK, lse_HT); the operator's random state is unused without dropout."""
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, packed.cu_seqlens, packed.cu_seqlens, packed.longest, packed.longest,
            0.0, True, False, **AtenFlash._arguments(packed, mask),
        )  # fmt: skip
        return out, lse

    @staticmethod
    def backward(
        do: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        packed: Packed,
        mask: Mask,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (dq, dk, dv)."""
        unused = torch.zeros(2, dtype=torch.uint64, device=q.device)
        return torch.ops.aten._flash_attention_backward(
            do.contiguous(), q, k, v, out, lse, packed.cu_seqlens, packed.cu_seqlens,
            packed.longest, packed.longest, 0.0, True, unused, unused,
            **AtenFlash._arguments(packed, mask),
        )  # fmt: skip


class FlashAttn:
    """The package flash-attn, which adds the soft cap."""

    @staticmethod
    def _arguments(packed: Packed, mask: Mask) -> dict[str, Any]:
        return {
            "softmax_scale": mask.scale,
            "causal": True,
            "window_size_left": -1 if mask.window is None else mask.window - 1,
            "window_size_right": -1 if mask.window is None else 0,
            "softcap": mask.softcap or 0.0,
            "alibi_slopes": None,
        }

    @staticmethod
    def forward(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed, mask: Mask
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (out_THK, lse_HT)."""
        from flash_attn.flash_attn_interface import (  # type: ignore[import-not-found]
            _flash_attn_varlen_forward,
        )

        out, lse, *_ = _flash_attn_varlen_forward(
            q, k, v, packed.cu_seqlens, packed.cu_seqlens, packed.longest, packed.longest,
            dropout_p=0.0, **FlashAttn._arguments(packed, mask),
        )  # fmt: skip
        return out, lse

    @staticmethod
    def backward(
        do: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        packed: Packed,
        mask: Mask,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (dq, dk, dv)."""
        from flash_attn.flash_attn_interface import (  # type: ignore[import-not-found]
            _flash_attn_varlen_backward,
        )

        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _flash_attn_varlen_backward(
            do.contiguous(), q, k, v, out, lse, dq, dk, dv, packed.cu_seqlens, packed.cu_seqlens,
            packed.longest, packed.longest, 0.0, deterministic=True,
            **FlashAttn._arguments(packed, mask),
        )  # fmt: skip
        return dq, dk, dv


class Flex:
    """torch's flex attention, for float32, old cards and soft caps: a compiled kernel."""

    @staticmethod
    def _run(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed, mask: Mask
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        num = q.shape[0]
        document_T = torch.repeat_interleave(
            torch.arange(len(packed.lengths), device=q.device),
            packed.cu_seqlens.diff(),
            output_size=num,
        )

        def visible(
            b: torch.Tensor, h: torch.Tensor, row: torch.Tensor, column: torch.Tensor
        ) -> torch.Tensor:
            seen = (document_T[row] == document_T[column]) & (row >= column)
            return seen if mask.window is None else seen & (row - column < mask.window)

        def capped(
            score: torch.Tensor,
            b: torch.Tensor,
            h: torch.Tensor,
            row: torch.Tensor,
            column: torch.Tensor,
        ) -> torch.Tensor:
            return mask.softcap * torch.tanh(score / mask.softcap)  # type: ignore[operator]

        blocks = create_block_mask(visible, None, None, num, num, device=q.device)
        heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
        out, lse = torch.compile(flex_attention, dynamic=True)(
            *heads_first,
            score_mod=None if mask.softcap is None else capped,
            block_mask=blocks,
            scale=mask.scale,
            enable_gqa=q.shape[1] != k.shape[1],
            return_lse=True,
        )
        return out[0].transpose(0, 1), lse[0]

    @staticmethod
    def forward(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed, mask: Mask
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (out_THK, lse_HT)."""
        out, lse = Flex._run(q, k, v, packed, mask)
        return out.contiguous(), lse

    @staticmethod
    def backward(
        do: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        packed: Packed,
        mask: Mask,
    ) -> tuple[torch.Tensor, ...]:
        """Return (dq, dk, dv). Flex has no backward to call with saved results, so it runs again."""
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            again, _ = Flex._run(*leaves, packed, mask)  # type: ignore[arg-type]
        return torch.autograd.grad(again, leaves, do)
