"""Causal attention of one document on the CPU, forward and backward, without a T x T mask.

torch's own flash kernel does plain causal attention; windows, soft caps and wide heads go through
blocks of queries that meet only the keys they can see.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Below this length the flash kernel is faster in float32 than in bfloat16 (EPYC Zen 5, 9 heads of 64,
# backward: 1.2 ms against 2.6 at 160 tokens, 17 against 17 at 700), and more exact besides.
FLOAT32_BELOW = 640
# The kernel skips keys behind the queries in steps of 512 only. Below that length it is called for so
# many queries at a time, with the keys that they can see: a step of eight Alpaca rows of 42 to 406
# tokens takes 5% less (medians of seven, in turns). At 128 and from 700 tokens on it gains nothing.
FLASH_QUERIES = 128
# Queries that meet their keys together in the blocked form.
QUERY_BLOCK = 64


def document_forward(
    q_LHK: torch.Tensor,
    k_LGK: torch.Tensor,
    v_LGK: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    out_LHK: torch.Tensor,
    lse_HL: torch.Tensor,
) -> None:
    """Attend within one document of L tokens, writing output and log-sum-exp.

    Args:
        q_LHK: Queries.
        k_LGK: Keys.
        v_LGK: Values.
        scale: Factor of the scores.
        window: Sliding window, or None.
        softcap: Soft cap of the scores, or None.
        out_LHK: Where to write the output.
        lse_HL: Where to write the float32 log-sum-exp.
    """
    length, heads, width = q_LHK.shape
    groups = k_LGK.shape[1]
    if _flash_can(window, softcap):
        q, k, v = (_grouped(_widened(x), heads, groups) for x in (q_LHK, k_LGK, v_LGK))
        for start, stop, mask in _query_blocks(q):
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], 0.0, mask is None,
                attn_mask=mask, scale=scale,
            )  # fmt: skip
            out_LHK[start:stop].view(stop - start, groups, -1, width).copy_(out.permute(2, 0, 1, 3))
            lse_HL[:, start:stop] = lse.reshape(heads, stop - start)
        return
    k_GKL = k_LGK.permute(1, 2, 0).float()
    v_GLK = v_LGK.permute(1, 0, 2)
    for start in range(0, length, QUERY_BLOCK):
        stop = min(length, start + QUERY_BLOCK)
        first = 0 if window is None else max(0, start - window + 1)
        q = _rows(q_LHK[start:stop], groups).float()
        s = _scores(q, k_GKL[:, :, first:stop], scale, softcap)
        s.masked_fill_(_hidden(start, stop, first, window, heads // groups), float("-inf"))
        lse = torch.logsumexp(s, -1)
        p = s.sub_(lse[..., None]).exp_().to(v_LGK.dtype)
        out = torch.bmm(p, v_GLK[:, first:stop])
        out_LHK[start:stop].view(stop - start, groups, -1, width).copy_(
            out.view(groups, -1, stop - start, width).permute(2, 0, 1, 3)
        )
        lse_HL[:, start:stop] = lse.view(heads, stop - start)


def document_backward(
    do_LHK: torch.Tensor,
    q_LHK: torch.Tensor,
    k_LGK: torch.Tensor,
    v_LGK: torch.Tensor,
    out_LHK: torch.Tensor,
    lse_HL: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    dq_LHK: torch.Tensor,
    dk_LGK: torch.Tensor,
    dv_LGK: torch.Tensor,
) -> None:
    """Write the gradients of one document's queries, keys and values.

    Args:
        do_LHK: Gradient of the output.
        q_LHK: As in the forward.
        k_LGK: As in the forward.
        v_LGK: As in the forward.
        out_LHK: The forward's output.
        lse_HL: The forward's log-sum-exp.
        scale: Factor of the scores.
        window: Sliding window, or None.
        softcap: Soft cap of the scores, or None.
        dq_LHK: Where to write.
        dk_LGK: Where to write.
        dv_LGK: Where to write.
    """
    length, heads, width = q_LHK.shape
    groups = k_LGK.shape[1]
    if _flash_can(window, softcap):
        do, q, k, v, out = (
            _grouped(_widened(x), heads, groups) for x in (do_LHK, q_LHK, k_LGK, v_LGK, out_LHK)
        )
        lse_GRL = lse_HL.view(groups, -1, length)
        dk_sum = dv_sum = None
        for start, stop, mask in reversed(list(_query_blocks(q))):
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                do[:, :, start:stop], q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop],
                out[:, :, start:stop], lse_GRL[:, :, start:stop].contiguous(), 0.0, mask is None,
                attn_mask=mask, scale=scale,
            )  # fmt: skip
            dq_LHK[start:stop].view(stop - start, groups, -1, width).copy_(dq.permute(2, 0, 1, 3))
            if dk_sum is None or dv_sum is None:  # the last block saw all keys
                dk_sum, dv_sum = dk, dv
            else:
                dk_sum[:, :, :stop] += dk
                dv_sum[:, :, :stop] += dv
        assert dk_sum is not None and dv_sum is not None
        dk_LGK.copy_(dk_sum.permute(2, 0, 1, 3).sum(2, dtype=torch.float32))
        dv_LGK.copy_(dv_sum.permute(2, 0, 1, 3).sum(2, dtype=torch.float32))
        return
    k_GKL, v_GKL = k_LGK.permute(1, 2, 0).float(), v_LGK.permute(1, 2, 0).float()
    k_GLK = k_LGK.permute(1, 0, 2)
    dk_GLK = torch.zeros((groups, length, width), dtype=torch.float32)
    dv_GLK = torch.zeros_like(dk_GLK)
    for start in range(0, length, QUERY_BLOCK):
        stop = min(length, start + QUERY_BLOCK)
        first = 0 if window is None else max(0, start - window + 1)
        q, do, out = (_rows(x[start:stop], groups) for x in (q_LHK, do_LHK, out_LHK))
        do32 = do.float()
        delta = (do32 * out).sum(-1, keepdim=True)
        s = _scores(q.float(), k_GKL[:, :, first:stop], scale, softcap)
        hidden = _hidden(start, stop, first, window, heads // groups)
        lse = lse_HL[:, start:stop].reshape(groups, -1, 1)
        p = (s - lse).masked_fill_(hidden, float("-inf")).exp_()
        dv_GLK[:, first:stop] += torch.bmm(p.to(do.dtype).transpose(1, 2), do)
        ds = torch.bmm(do32, v_GKL[:, :, first:stop]).sub_(delta).mul_(p)
        if softcap is not None:
            ds.mul_(1 - (s / softcap).square_())
        ds = ds.mul_(scale).to(q.dtype)
        dk_GLK[:, first:stop] += torch.bmm(ds.transpose(1, 2), q)
        dq = torch.bmm(ds, k_GLK[:, first:stop])
        dq_LHK[start:stop].view(stop - start, groups, -1, width).copy_(
            dq.view(groups, -1, stop - start, width).permute(2, 0, 1, 3)
        )
    dk_LGK.copy_(dk_GLK.transpose(0, 1))
    dv_LGK.copy_(dv_GLK.transpose(0, 1))


def _flash_can(window: int | None, softcap: float | None) -> bool:
    return window is None and softcap is None


def _widened(x_LHK: torch.Tensor) -> torch.Tensor:
    """Return float32 where the flash kernel is faster in it."""
    return x_LHK.float() if x_LHK.itemsize < 4 and len(x_LHK) < FLOAT32_BELOW else x_LHK


def _query_blocks(q_GRLK: torch.Tensor) -> Iterator[tuple[int, int, torch.Tensor | None]]:
    """Yield the first and last query of each call, and what of its keys they must not see.

    None stands for a plain causal call, of all queries or of the first ones.
    """
    length = q_GRLK.shape[2]
    if not 1.5 * FLASH_QUERIES <= length < FLOAT32_BELOW:
        yield 0, length, None
        return
    for start in range(0, length, FLASH_QUERIES):
        stop = min(length, start + FLASH_QUERIES)
        if start == 0:
            yield start, stop, None
            continue
        mask = torch.zeros((stop - start, stop), dtype=q_GRLK.dtype)
        hidden = torch.ones((stop - start, stop - start), dtype=torch.bool).triu_(1)
        mask[:, start:].masked_fill_(hidden, float("-inf"))
        yield start, stop, mask


def _grouped(x_LHK: torch.Tensor, heads: int, groups: int) -> torch.Tensor:
    """View (L, heads, K) as (G, heads a group, L, K); keys and values are repeated with stride 0.

    torch's CPU flash kernel wants as many key heads as query heads, but takes any strides.
    """
    length, _, width = x_LHK.shape
    grouped = x_LHK.view(length, groups, -1, width).permute(1, 2, 0, 3)
    return grouped.expand(groups, heads // groups, length, width)


def _rows(x_BHK: torch.Tensor, groups: int) -> torch.Tensor:
    """Return (G, heads a group * B, K): the queries of a group's heads as rows of one product."""
    block, heads, width = x_BHK.shape
    return (
        x_BHK.view(block, groups, heads // groups, width)
        .permute(1, 2, 0, 3)
        .reshape(groups, -1, width)
    )


def _scores(
    q_GMK: torch.Tensor, k_GKL: torch.Tensor, scale: float, softcap: float | None
) -> torch.Tensor:
    """Return float32 scores; bfloat16 ones would be off by 2^-9 of their size inside an exponential."""
    s = torch.bmm(q_GMK, k_GKL).mul_(scale)
    return s if softcap is None else s.div_(softcap).tanh_().mul_(softcap)


def _hidden(start: int, stop: int, first: int, window: int | None, repeat: int) -> torch.Tensor:
    """Return what each query row must not see, (heads a group * block, keys)."""
    query = torch.arange(start, stop)[:, None]
    key = torch.arange(first, stop)[None]
    hidden = key > query
    if window is not None:
        hidden |= query - key >= window
    return hidden.repeat(repeat, 1)
