"""The MLP half of a decoder layer, y = h + m post(Down(act(Gate(n)) * Up(n))), n = norm(h).

Works on blocks of tokens, so that gate and up of a block stay in the cache until they are used.
Saved: the input h and, by policy, the inputs of the activation. Recomputed: norm, activation, U.

Shapes: T packed tokens, D model width, F MLP width, N columns of gate and up together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from whet.engine.attention_half import HalfCall, _z_buffer, add_to_residual, behind
from whet.engine.group import Gradients, Group
from whet.engine.memory import SavedTensors, workspace
from whet.engine.projection import Projection
from whet.engine.spec import MlpSpec
from whet.kernels.glu import glu_backward, glu_forward


@dataclass(frozen=True, slots=True)
class MlpCall:
    """One call of the MLP half."""

    half: HalfCall
    spec: MlpSpec
    up: tuple[Projection, ...]
    down: Projection

    @property
    def trained(self) -> list[torch.Tensor]:
        """Parameters that a gradient is made for, in the order `MlpHalf` takes them."""
        return [
            *self.half.norm.trained,
            *(t for p in self.up for t in p.trained),
            *self.down.trained,
            *(self.half.post_norm.trained if self.half.post_norm else []),
        ]

    def columns(self, gu_TN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """View the columns as gate_TF and up_TF; a plain MLP has no up."""
        if not self.spec.gated:
            return gu_TN, None
        gate, up = gu_TN.chunk(2, dim=1)
        return gate, up


def mlp_half(h_TD: torch.Tensor, call: MlpCall) -> torch.Tensor:
    """Compute the MLP half.

    Args:
        h_TD: Packed hidden states.
        call: Everything else.

    Returns:
        The hidden states after it, of the same shape and dtype.
    """
    return MlpHalf.apply(h_TD, call, *call.trained)  # type: ignore[no-any-return]


class MlpHalf(torch.autograd.Function):
    """See the module's docstring; the trained parameters are arguments so that autograd sees them."""

    @staticmethod
    def forward(
        ctx: Any, h_TD: torch.Tensor, call: MlpCall, *trained: torch.Tensor
    ) -> torch.Tensor:
        """Compute the half and save by policy."""
        del trained  # the call holds them; autograd needs them as arguments
        with torch.autocast(h_TD.device.type, enabled=False):
            half, saved, device = call.half, SavedTensors(), h_TD.device
            num, policy = h_TD.shape[0], call.half.policy.gate_up
            up = Group(call.up, "up", half.dtype, device)
            down = Group([call.down], "down", half.dtype, device)
            rows = half.block if policy == "recompute" else num
            shape = (rows, up.num_outputs)
            if policy == "keep":
                gu_TN = torch.empty(shape, dtype=half.dtype, device=device)
            else:
                gu_TN = workspace("mlp.gate_up", shape, half.dtype, device)
            n_BD = workspace("norm", (half.block, h_TD.shape[1]), half.dtype, device)
            a_BF = workspace("mlp.a", (half.block, call.down.num_inputs), half.dtype, device)
            keeps_z = half.post_norm is not None
            z_TD = _z_buffer(h_TD, half, keeps_z)
            u_TR = torch.empty((num, down.rank), dtype=half.dtype, device=device)
            y_TD = torch.empty_like(h_TD)
            for part in half.blocks(num):
                size = part.stop - part.start
                n, _, _ = half.norm.forward(h_TD[part], n_BD[:size])
                gu = up.forward(n, gu_TN[:size] if policy == "recompute" else gu_TN[part])
                a = glu_forward(*call.columns(gu), call.spec.activation, a_BF[:size])
                z = down.forward(a, z_TD[part] if keeps_z else z_TD[:size], u_TR[part])
                add_to_residual(half, h_TD[part], z, y_TD[part])
            saved.put("h", h_TD, half.policy.hidden)
            saved.put("gate_up", gu_TN, policy)
            saved.put("u", u_TR if down.rank else None, "keep")
            saved.put("z", z_TD if keeps_z else None, half.policy.attention)
            saved.close(ctx)
        ctx.call, ctx.saved = call, saved
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """Return the gradients of h and of every trained parameter."""
        call: MlpCall = ctx.call
        half, saved = call.half, ctx.saved.open(ctx)
        with torch.autocast(dy_TD.device.type, enabled=False):
            h_TD, gu_TN = saved["h"], saved.get("gate_up")
            num, device = h_TD.shape[0], h_TD.device
            gradients = Gradients(call.trained, half.num_blocks(num))
            needs_dn = ctx.needs_input_grad[0] or bool(half.norm.trained)
            up = Group(call.up, "up", half.dtype, device)
            down = Group([call.down], "down", half.dtype, device)
            needs_up = needs_dn or up.needs_input
            dy_TD = dy_TD.contiguous()
            dx_TD = torch.empty_like(h_TD) if ctx.needs_input_grad[0] else None
            n_BD = workspace("norm", (half.block, h_TD.shape[1]), half.dtype, device)
            dn_BD = workspace("dnorm", (half.block, h_TD.shape[1]), half.dtype, device)
            a_BF = workspace("mlp.a", (half.block, call.down.num_inputs), half.dtype, device)
            da_BF = workspace("mlp.da", (half.block, call.down.num_inputs), half.dtype, device)
            work_BN = workspace("mlp.gate_up", (half.block, up.num_outputs), half.dtype, device)
            for part in half.blocks(num):
                size = part.stop - part.start
                n, mean, rstd = half.norm.forward(h_TD[part], n_BD[:size])
                gu = up.forward(n, work_BN[:size]) if gu_TN is None else gu_TN[part]
                dz = behind(half, dy_TD[part], saved.get("z"), part, gradients)
                a = a_BF[:size] if down.needs_input else None
                u = saved["u"][part] if down.rank else None
                p_TR = down.backward_input(dz, u, gradients, da_BF[:size] if needs_up else None)
                dgu = work_BN[:size]
                if needs_up:
                    glu_backward(
                        da_BF[:size], *call.columns(gu), call.spec.activation,
                        *call.columns(dgu), a,
                    )  # fmt: skip
                elif a is not None:
                    glu_forward(*call.columns(gu), call.spec.activation, a)
                if a is not None:
                    down.backward_weights(dz, a, p_TR, gradients)
                if not needs_up:
                    continue
                dn = up.backward(dgu, n, gradients, dn_BD[:size] if needs_dn else None)
                if dn is not None:
                    target = torch.empty_like(h_TD[part]) if dx_TD is None else dx_TD[part]
                    half.norm.backward(dn, h_TD[part], mean, rstd, gradients, target, dy_TD[part])
        return (dx_TD, None, *gradients.take())
