"""The attention half of a decoder layer, h = x + m post(O(attn(rope(QKV(norm(x)))))), with its backward.

Saved: the input x, q, k and v, attention's output and log-sum-exp, each by policy. Recomputed, because
cheap: the norm's output, the rotation of normed heads, the adapters' U. Frozen weights get no gradient.

Shapes: T packed tokens, D model width, N = (H + 2G) K outputs of q, k and v, B tokens of one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from whet.engine.group import Gradients, Group
from whet.engine.memory import Policy, SavedTensors, is_planning, workspace
from whet.engine.projection import Projection
from whet.engine.spec import AttentionSpec
from whet.engine.unpad import Packed
from whet.engine.varlen import Mask, varlen_backward, varlen_forward
from whet.kernels.norm import norm_backward, norm_forward
from whet.kernels.rope import HeadNorm, rope_backward, rope_forward


@dataclass(frozen=True, slots=True)
class Norm:
    """A live norm: its parameters and how they are used."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    centered: bool
    unit_offset: bool

    def forward(
        self, x_TD: torch.Tensor, out_TD: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Return (normalised, mean, rstd)."""
        return norm_forward(
            x_TD, self.weight, self.bias, eps=self.eps, centered=self.centered,
            unit_offset=self.unit_offset, out_TD=out_TD,
        )  # fmt: skip

    def backward(
        self,
        dy_TD: torch.Tensor,
        x_TD: torch.Tensor,
        mean_T: torch.Tensor | None,
        rstd_T: torch.Tensor,
        gradients: Gradients,
        out_TD: torch.Tensor,
        add_TD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write dx (+ add) to out and add the parameters' gradients to their sums."""
        return norm_backward(
            dy_TD, x_TD, self.weight, mean_T, rstd_T, unit_offset=self.unit_offset,
            add_TD=add_TD, out_TD=out_TD, dweight_D=gradients.sum_of(self.weight),
            dbias_D=None if self.bias is None else gradients.sum_of(self.bias),
        )  # fmt: skip

    @property
    def trained(self) -> list[torch.Tensor]:
        """Parameters that a gradient is made for."""
        return [p for p in (self.weight, self.bias) if p is not None and p.requires_grad]


@dataclass(frozen=True, slots=True)
class HalfCall:
    """What both halves need to know of one call, next to the hidden states.

    Args:
        norm: The norm in front.
        post_norm: The norm behind, or None.
        multiplier: Factor of what is added to the residual.
        dtype: Type of the products: the weights', or autocast's.
        block: Tokens worked on at a time.
        policy: Where saved tensors stay.
    """

    norm: Norm
    post_norm: Norm | None
    multiplier: float
    dtype: torch.dtype
    block: int
    policy: Policy

    def blocks(self, num_tokens: int) -> Iterator[slice]:
        """Cut T tokens into blocks; in a plan the first stands for all, which use the same memory."""
        num_tokens = min(num_tokens, self.block) if is_planning() else num_tokens
        for start in range(0, num_tokens, self.block):
            yield slice(start, min(num_tokens, start + self.block))

    def num_blocks(self, num_tokens: int) -> int:
        """Count the blocks."""
        return -(-num_tokens // self.block)


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One call of the attention half."""

    half: HalfCall
    spec: AttentionSpec
    qkv: tuple[Projection, ...]
    out: Projection
    q_norm: HeadNorm | None
    k_norm: HeadNorm | None
    packed: Packed
    cos_TR: torch.Tensor | None
    sin_TR: torch.Tensor | None

    @property
    def mask(self) -> Mask:
        """What attention sees."""
        return Mask(self.spec.scale, self.spec.window, self.spec.softcap)

    @property
    def trained(self) -> list[torch.Tensor]:
        """Parameters that a gradient is made for, in the order `AttentionHalf` takes them."""
        head_norms = [n.weight_K for n in (self.q_norm, self.k_norm) if n]
        return [
            *self.half.norm.trained,
            *(t for p in self.qkv for t in p.trained),
            *(w for w in head_norms if w.requires_grad),
            *self.out.trained,
            *(self.half.post_norm.trained if self.half.post_norm else []),
        ]

    def heads(self, qkv_TN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """View the columns as q_THK, k_TGK and v_TGK."""
        spec = self.spec
        h, g, k = spec.num_heads, spec.num_kv_heads, spec.head_width
        q, key, v = qkv_TN.split((h * k, g * k, g * k), dim=1)
        return q.unflatten(1, (h, k)), key.unflatten(1, (g, k)), v.unflatten(1, (g, k))


def attention_half(x_TD: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """Compute the attention half.

    Args:
        x_TD: Packed hidden states.
        call: Everything else.

    Returns:
        The hidden states after it, of the same shape and dtype.
    """
    return AttentionHalf.apply(x_TD, call, *call.trained)  # type: ignore[no-any-return]


class AttentionHalf(torch.autograd.Function):
    """See the module's docstring; the trained parameters are arguments so that autograd sees them."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: torch.Tensor, call: AttentionCall, *trained: torch.Tensor
    ) -> torch.Tensor:
        """Compute the half and save by policy."""
        del trained  # the call holds them; autograd needs them as arguments
        with torch.autocast(x_TD.device.type, enabled=False):
            half, policy, saved = call.half, call.half.policy, SavedTensors()
            num = x_TD.shape[0]
            group = Group(call.qkv, "qkv", half.dtype, x_TD.device)
            shape = (num, group.num_outputs)
            if policy.qkv == "keep":
                qkv_TN = torch.empty(shape, dtype=half.dtype, device=x_TD.device)
            else:
                qkv_TN = workspace("attention.qkv", shape, half.dtype, x_TD.device)
            q, k, v = _queries_keys_values(call, group, x_TD, qkv_TN)
            out_THK, lse_HT = varlen_forward(q, k, v, call.packed, call.mask)

            y_TD = torch.empty_like(x_TD)
            out_group = Group([call.out], "out", half.dtype, x_TD.device)
            keeps_z = half.post_norm is not None
            z_TD = _z_buffer(x_TD, half, keeps_z)
            for part in half.blocks(num):
                z = z_TD[part] if keeps_z else z_TD[: part.stop - part.start]
                out_group.forward(out_THK[part].flatten(1), z)
                add_to_residual(half, x_TD[part], z, y_TD[part])
            saved.put("x", x_TD, policy.hidden)
            saved.put("qkv", qkv_TN, policy.qkv)
            saved.put("out", out_THK, policy.attention)
            saved.put("lse", lse_HT, policy.attention)
            saved.put("z", z_TD if keeps_z else None, policy.attention)
            saved.close(ctx)
        ctx.call, ctx.saved = call, saved
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """Return the gradients of x and of every trained parameter."""
        call: AttentionCall = ctx.call
        half, saved = call.half, ctx.saved.open(ctx)
        with torch.autocast(dy_TD.device.type, enabled=False):
            x_TD, out_THK = saved["x"], saved["out"]
            num, device = x_TD.shape[0], x_TD.device
            gradients = Gradients(call.trained, half.num_blocks(num))
            needs_dn = ctx.needs_input_grad[0] or bool(half.norm.trained)
            head_norms = [n for n in (call.q_norm, call.k_norm) if n and n.weight_K.requires_grad]
            group = Group(call.qkv, "qkv", half.dtype, device)
            needs_qkv = needs_dn or group.needs_input or bool(head_norms)

            dy_TD = dy_TD.contiguous()
            out_group = Group([call.out], "out", half.dtype, device)
            do_TN = workspace("attention.do", (num, out_THK[0].numel()), half.dtype, device)
            for part in half.blocks(num):
                dz = behind(half, dy_TD[part], saved.get("z"), part, gradients)
                out_group.backward(
                    dz, out_THK[part].flatten(1), gradients, do_TN[part] if needs_qkv else None
                )
            dx_TD = torch.empty_like(x_TD) if ctx.needs_input_grad[0] else None
            if needs_qkv:
                _backward_qkv(call, group, saved, dy_TD, do_TN, gradients, needs_dn, dx_TD)
        return (dx_TD, None, *gradients.take())


def _queries_keys_values(
    call: AttentionCall, group: Group, x_TD: torch.Tensor, qkv_TN: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fill the qkv buffer and return q, k and v as attention wants them.

    Without head norms the rotation happens in place. With them the buffer keeps what the norms'
    backward needs, and the rotated heads go to a workspace.
    """
    half = call.half
    n_BD = workspace("norm", (half.block, x_TD.shape[1]), half.dtype, x_TD.device)
    for part in half.blocks(x_TD.shape[0]):
        n, _, _ = half.norm.forward(x_TD[part], n_BD[: part.stop - part.start])
        group.forward(n, qkv_TN[part])
        if call.q_norm is None:
            _rotate_(call, qkv_TN, part)
    return _rotated(call, qkv_TN)


def _rotate_(call: AttentionCall, qkv_TN: torch.Tensor, part: slice) -> None:
    if call.cos_TR is None or call.sin_TR is None:
        return
    q, k, _ = call.heads(qkv_TN[part])
    rope_forward(
        q, k, call.cos_TR[part], call.sin_TR[part],
        interleaved=call.spec.rope != "half", q_out_THK=q, k_out_TGK=k,
    )  # fmt: skip


def _rotated(
    call: AttentionCall, qkv_TN: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q, k and v; with head norms, q and k are normed and rotated into a workspace."""
    q, k, v = call.heads(qkv_TN)
    if call.q_norm is None:
        return q, k, v
    columns = qkv_TN.shape[1] - v[0].numel()
    qk_TN = workspace("attention.qk", (len(qkv_TN), columns), qkv_TN.dtype, qkv_TN.device)
    split = qk_TN.split((q[0].numel(), k[0].numel()), dim=1)
    q_out, k_out = split[0].unflatten(1, q.shape[1:]), split[1].unflatten(1, k.shape[1:])
    for part in call.half.blocks(len(qkv_TN)):
        rope_forward(
            q[part], k[part],
            None if call.cos_TR is None else call.cos_TR[part],
            None if call.sin_TR is None else call.sin_TR[part],
            interleaved=call.spec.rope != "half", q_norm=call.q_norm, k_norm=call.k_norm,
            q_out_THK=q_out[part], k_out_TGK=k_out[part],
        )  # fmt: skip
    return q_out, k_out, v


def _backward_qkv(
    call: AttentionCall,
    group: Group,
    saved: dict[str, torch.Tensor],
    dy_TD: torch.Tensor,
    do_TN: torch.Tensor,
    gradients: Gradients,
    needs_dn: bool,
    dx_TD: torch.Tensor | None,
) -> None:
    """Go back through attention, rotation, the q, k and v projections and the norm."""
    half, x_TD = call.half, saved["x"]
    num, device = x_TD.shape[0], x_TD.device
    qkv_TN = saved.get("qkv")
    if qkv_TN is None:
        qkv_TN = workspace("attention.qkv", (num, group.num_outputs), half.dtype, device)
        q, k, v = _queries_keys_values(call, group, x_TD, qkv_TN)
    else:
        q, k, v = _rotated(call, qkv_TN)
    dqkv_TN = workspace("attention.dqkv", (num, group.num_outputs), half.dtype, device)
    dq, dk, dv = call.heads(dqkv_TN)
    out_THK = saved["out"]
    varlen_backward(
        do_TN.view(out_THK.shape),
        q,
        k,
        v,
        out_THK,
        saved["lse"],
        call.packed,
        call.mask,
        dq,
        dk,
        dv,
    )
    raw_q, raw_k, _ = call.heads(qkv_TN)
    n_BD = workspace("norm", (half.block, x_TD.shape[1]), half.dtype, device)
    dn_BD = workspace("dnorm", (half.block, x_TD.shape[1]), half.dtype, device)
    for part in half.blocks(num):
        if call.q_norm is not None or call.cos_TR is not None:
            rope_backward(
                dq[part], dk[part],
                None if call.cos_TR is None else call.cos_TR[part],
                None if call.sin_TR is None else call.sin_TR[part],
                interleaved=call.spec.rope != "half",
                q_THK=raw_q[part], k_TGK=raw_k[part], q_norm=call.q_norm, k_norm=call.k_norm,
                dq_norm_K=gradients.sum_of(call.q_norm.weight_K) if call.q_norm else None,
                dk_norm_K=gradients.sum_of(call.k_norm.weight_K) if call.k_norm else None,
                dq_out_THK=dq[part], dk_out_TGK=dk[part],
            )  # fmt: skip
        size = part.stop - part.start
        n, mean, rstd = half.norm.forward(x_TD[part], n_BD[:size])
        dn = group.backward(dqkv_TN[part], n, gradients, dn_BD[:size] if needs_dn else None)
        if dn is not None:
            target = torch.empty_like(x_TD[part]) if dx_TD is None else dx_TD[part]
            half.norm.backward(dn, x_TD[part], mean, rstd, gradients, target, dy_TD[part])


def _z_buffer(x_TD: torch.Tensor, half: HalfCall, keep: bool) -> torch.Tensor:
    """Return where a half's last projection writes: all tokens when a norm behind needs them later."""
    if keep:
        return torch.empty(x_TD.shape, dtype=half.dtype, device=x_TD.device)
    return workspace("z", (half.block, x_TD.shape[1]), half.dtype, x_TD.device)


def add_to_residual(
    half: HalfCall, x_BD: torch.Tensor, z_BD: torch.Tensor, y_BD: torch.Tensor
) -> None:
    """Write y = x + m post(z)."""
    if half.post_norm is not None:
        z_BD, _, _ = half.post_norm.forward(z_BD)
    torch.add(x_BD, z_BD, alpha=half.multiplier, out=y_BD)


def behind(
    half: HalfCall,
    dy_BD: torch.Tensor,
    z_TD: torch.Tensor | None,
    part: slice,
    gradients: Gradients,
) -> torch.Tensor:
    """Return the gradient of a half's last projection, from the gradient of its output."""
    dz = dy_BD.to(half.dtype)
    if half.multiplier != 1.0:
        dz = dz * half.multiplier
    if half.post_norm is None:
        return dz
    assert z_TD is not None
    z = z_TD[part]
    _, mean, rstd = half.post_norm.forward(z)
    return half.post_norm.backward(dz, z, mean, rstd, gradients, torch.empty_like(z))
