"""The head and the loss, without logits for all: labelled rows only, chunk by chunk.

Each chunk's logits are made, turned into their own gradient in place, and multiplied back to the
hidden states at once, so that one chunk of logits is all that ever exists (arXiv 2411.09009 has the
idea; here the products stay with cuBLAS and oneDNN). The gradient is made for each row's loss as it
is, unscaled, and multiplied by what autograd brings later: nothing underflows in float16. A weight in
8 bit or in host memory (`held.py`) comes tile by tile, for each chunk once there and once back.

Shapes: N labelled rows, D model width, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from whet.engine.embeddings import HeldHead
from whet.engine.group import Gradients
from whet.engine.held import HeldWeight, Tile, multiply, multiply_back
from whet.engine.memory import workspace
from whet.engine.projection import Unsupported, check_own_forward, read_projection
from whet.kernels.cross_entropy import cross_entropy_
from whet.kernels.nf4 import NF4Weight

# Rows of one chunk of logits. On the CPU a small chunk stays in the last cache level between the
# product and the softmax; on CUDA a product wants at least a thousand rows.
CHUNK_ROWS = {"cpu": 256, "cuda": 1024}

EXTRAS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@dataclass(frozen=True, slots=True)
class Head:
    """The output projection and what follows it.

    Args:
        softcap: Final soft cap of the logits (Gemma 2), or None.
        logit_scale: Factor of the logits (Granite, Cohere); 1 for most.
        label_smoothing: Share of the target's probability that is spread over all classes.
        chunk_rows: Rows of one chunk; None takes the device's default.
    """

    softcap: float | None = None
    logit_scale: float = 1.0
    label_smoothing: float = 0.0
    chunk_rows: int | None = None

    def chunks(self, hidden_ND: torch.Tensor) -> Iterator[slice]:
        """Cut the rows into chunks."""
        rows = self.chunk_rows or CHUNK_ROWS.get(hidden_ND.device.type, 1024)
        for start in range(0, len(hidden_ND), rows):
            yield slice(start, min(len(hidden_ND), start + rows))

    def num_chunks(self, hidden_ND: torch.Tensor) -> int:
        """Count the chunks."""
        rows = self.chunk_rows or CHUNK_ROWS.get(hidden_ND.device.type, 1024)
        return -(-len(hidden_ND) // rows)


def read_head(module: nn.Module) -> tuple[torch.Tensor | HeldWeight, torch.Tensor | None]:
    """Return a live head's weight (V, D), which may be held in 8 bit or in host memory, and bias.

    Args:
        module: The output embeddings.

    Raises:
        Unsupported: It is not a plain linear layer.
    """
    if hasattr(module, "modules_to_save"):  # peft's copy of a module that is trained in full
        active = [name for name in module.active_adapters if name in module.modules_to_save]  # type: ignore[union-attr]
        if module.disable_adapters or not active:  # type: ignore[truthy-function]
            module = module.original_module  # type: ignore[assignment]
        else:
            module = module.modules_to_save[active[0]]  # type: ignore[index]
    if isinstance(module, HeldHead):
        check_own_forward(module)
        return module.held, module.bias
    projection = read_projection(module)
    if projection.adapter is not None:
        raise Unsupported("an adapter on the head")
    if projection.transposed or isinstance(projection.weight, NF4Weight):
        raise Unsupported("a head that is not a plain linear layer")
    return projection.weight, projection.bias_N


def head_loss(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor | HeldWeight,
    bias_V: torch.Tensor | None,
    target_N: torch.Tensor,
    head: Head,
) -> torch.Tensor:
    """Return the cross entropy summed over rows, a float32 scalar.

    Args:
        hidden_ND: Hidden states of the labelled rows, after the last norm.
        weight_VD: Weight of the head, as `read_head` gives it.
        bias_V: Its bias, or None.
        target_N: int64 classes; -100 rows count nothing.
        head: Soft cap, scale, smoothing, chunk.
    """
    dtype = _product_dtype(hidden_ND, weight_VD)
    return HeadLoss.apply(hidden_ND.to(dtype), weight_VD, bias_V, target_N, head)  # type: ignore[no-any-return]


def token_log_probs(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor | HeldWeight,
    bias_V: torch.Tensor | None,
    target_N: torch.Tensor,
    head: Head,
    extras: tuple[str, ...] = (),
) -> dict[str, torch.Tensor]:
    """Return each row's log-probability of its target, and more about its distribution.

    Args:
        hidden_ND: Hidden states of the labelled rows.
        weight_VD: Weight of the head, as `read_head` gives it.
        bias_V: Its bias, or None.
        target_N: int64 classes.
        head: Soft cap, scale (1 / temperature belongs there too) and chunk.
        extras: Of EXTRAS: `entropy` (with gradient), `log_sum_sq_probs`, `mean_logits` and `is_top1`.

    Returns:
        `log_probs` and the extras, (N) each.
    """
    dtype = _product_dtype(hidden_ND, weight_VD)
    results = TokenLogProbs.apply(hidden_ND.to(dtype), weight_VD, bias_V, target_N, head, extras)
    return dict(zip(("log_probs", *extras), results, strict=True))  # type: ignore[arg-type]


def _product_dtype(hidden_ND: torch.Tensor, weight_VD: torch.Tensor | HeldWeight) -> torch.dtype:
    kind = hidden_ND.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    # A held weight is made for its reader, in the reader's dtype.
    return weight_VD.dtype if isinstance(weight_VD, torch.Tensor) else hidden_ND.dtype


class _Tiles:
    """The weight in the dtype of the products, to go through as often as there are products.

    A dense weight is one tile.
    """

    def __init__(self, weight_VD: torch.Tensor | HeldWeight, like: torch.Tensor) -> None:
        self.num_classes = weight_VD.shape[0]
        self._weight, self._like = weight_VD, like
        if isinstance(weight_VD, torch.Tensor):
            self._weight = _cast(weight_VD, like.dtype)

    def __iter__(self) -> Iterator[Tile]:
        if isinstance(self._weight, torch.Tensor):
            return iter([(slice(0, self.num_classes), self._weight)])
        return self._weight.tiles(self._like.dtype, self._like.device)


def _logits(
    hidden_CD: torch.Tensor, tiles: _Tiles, bias_V: torch.Tensor | None, head: Head
) -> torch.Tensor:
    """Make a chunk's logits, before the soft cap, in a buffer that the next chunk overwrites."""
    shape = (len(hidden_CD), tiles.num_classes)
    out = workspace("head.logits", shape, hidden_CD.dtype, hidden_CD.device)
    multiply(hidden_CD, tiles, out)
    if bias_V is not None:
        out.add_(bias_V)
    return out if head.logit_scale == 1.0 else out.mul_(head.logit_scale)


def _cast(weight_VD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a dense weight in the dtype of the products, through a buffer when it has another."""
    weight_VD = weight_VD.detach()
    if weight_VD.dtype == dtype:
        return weight_VD
    shape = tuple(weight_VD.shape)
    return workspace("head.weight", shape, dtype, weight_VD.device).copy_(weight_VD)


def _trainable(*parameters: torch.Tensor | HeldWeight | None) -> list[torch.Tensor]:
    """Return what can have a gradient."""
    return [p for p in parameters if isinstance(p, torch.Tensor)]


class HeadLoss(torch.autograd.Function):
    """The summed loss, whose gradients are made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor | HeldWeight,
        bias_V: torch.Tensor | None,
        target_N: torch.Tensor,
        head: Head,
    ) -> torch.Tensor:
        """Sum the loss and make the gradients for an upstream gradient of one."""
        ctx.parameters = _trainable(weight_VD, bias_V)
        needs_hidden, *needs = ctx.needs_input_grad[:3]
        with torch.autocast(hidden_ND.device.type, enabled=False):
            dhidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
            gradients = Gradients(ctx.parameters, head.num_chunks(hidden_ND))
            tiles = _Tiles(weight_VD, hidden_ND)
            one_N = target_N.new_ones(len(target_N), dtype=torch.float32)
            total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
            for part in head.chunks(hidden_ND):
                logits = _logits(hidden_ND[part], tiles, bias_V, head)
                loss_C, _ = cross_entropy_(
                    logits, target_N[part], one_N[part] if any((needs_hidden, *needs)) else None,
                    softcap=head.softcap, label_smoothing=head.label_smoothing,
                )  # fmt: skip
                total += loss_C.sum()
                _backward_chunk(
                    logits, hidden_ND[part], tiles, weight_VD if needs[0] else None,  # type: ignore[arg-type]
                    bias_V if needs[1] else None, head,
                    None if dhidden_ND is None else dhidden_ND[part], gradients,
                )  # fmt: skip
            if not len(hidden_ND):  # no rows, no gradients but zeros
                for parameter in ctx.parameters:
                    gradients.sum_of(parameter)
        taken = dict(zip(map(id, ctx.parameters), gradients.take(), strict=True))
        ctx.save_for_backward(dhidden_ND, taken.get(id(weight_VD)), taken.get(id(bias_V)))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """Scale the gradients that the forward pass made."""
        grads = [None if g is None else (g * upstream).to(g.dtype) for g in ctx.saved_tensors]
        return (*grads, None, None)


class TokenLogProbs(torch.autograd.Function):
    """Log-probabilities row by row, each with an upstream gradient of its own.

    The gradient of a row's hidden state is its upstream gradient times a vector that the forward pass
    makes. With a trained head, or a gradient for the entropy, the logits are made again instead.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor | HeldWeight,
        bias_V: torch.Tensor | None,
        target_N: torch.Tensor,
        head: Head,
        extras: tuple[str, ...],
    ) -> tuple[torch.Tensor, ...]:
        """Return log_probs and the extras."""
        needs_hidden, *needs = ctx.needs_input_grad[:3]
        direction_ND = torch.empty_like(hidden_ND) if needs_hidden and not any(needs) else None
        found = {name: hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32) for name in extras}
        loss_N = hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32)
        lse_N = torch.empty_like(loss_N)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            tiles = _Tiles(weight_VD, hidden_ND)
            one_N = torch.ones_like(loss_N)
            for part in head.chunks(hidden_ND):
                logits = _logits(hidden_ND[part], tiles, bias_V, head)
                _describe(
                    logits, target_N[part], head.softcap, {k: v[part] for k, v in found.items()}
                )
                loss_N[part], lse_N[part] = cross_entropy_(
                    logits, target_N[part], None if direction_ND is None else one_N[part],
                    softcap=head.softcap,
                )  # fmt: skip
                if direction_ND is not None:
                    multiply_back(logits, tiles, direction_ND[part])
                    if head.logit_scale != 1.0:
                        direction_ND[part].mul_(head.logit_scale)
        if "is_top1" in found:
            found["is_top1"] = found["is_top1"].bool()
        ctx.held = weight_VD if isinstance(weight_VD, HeldWeight) else None
        dense_VD = None if ctx.held is not None else weight_VD
        ctx.save_for_backward(
            hidden_ND, dense_VD, bias_V, target_N, lse_N, found.get("entropy"), direction_ND
        )
        ctx.head, ctx.entropy_at = head, extras.index("entropy") if "entropy" in extras else None
        ctx.mark_non_differentiable(*(v for k, v in found.items() if k != "entropy"))
        ctx.set_materialize_grads(False)
        return (-loss_N, *(found[name] for name in extras))

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_N: torch.Tensor | None,
        *grad_extras: torch.Tensor | None,  # type: ignore[override]
    ) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of the hidden states, the weight and the bias."""
        hidden_ND, weight_VD, bias_V, target_N, lse_N, entropy_N, direction_ND = ctx.saved_tensors
        grad_entropy = None if ctx.entropy_at is None else grad_extras[ctx.entropy_at]
        grad_N = torch.zeros_like(lse_N) if grad_N is None else grad_N
        if direction_ND is not None and grad_entropy is None:
            dhidden = direction_ND.mul(-grad_N[:, None]).to(direction_ND.dtype)
            return (dhidden, None, None, None, None, None)
        needs = ctx.needs_input_grad
        parameters = _trainable(weight_VD, bias_V)
        gradients = Gradients(parameters, ctx.head.num_chunks(hidden_ND))
        dhidden_ND = torch.empty_like(hidden_ND) if needs[0] else None
        tiles = _Tiles(weight_VD if ctx.held is None else ctx.held, hidden_ND)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for part in ctx.head.chunks(hidden_ND):
                logits = _logits(hidden_ND[part], tiles, bias_V, ctx.head)
                extra = None
                if grad_entropy is not None:
                    extra = _entropy_gradient(
                        logits, lse_N[part], entropy_N[part], grad_entropy[part], ctx.head.softcap
                    )
                cross_entropy_(logits, target_N[part], -grad_N[part], softcap=ctx.head.softcap)
                if extra is not None:
                    logits.add_(extra)
                _backward_chunk(
                    logits, hidden_ND[part], tiles, weight_VD if needs[1] else None,
                    bias_V if needs[2] else None, ctx.head,
                    None if dhidden_ND is None else dhidden_ND[part], gradients,
                )  # fmt: skip
        taken = dict(zip(map(id, parameters), gradients.take(), strict=True))
        return (dhidden_ND, taken.get(id(weight_VD)), taken.get(id(bias_V)), None, None, None)


def _backward_chunk(
    dlogits_CV: torch.Tensor,
    hidden_CD: torch.Tensor,
    tiles: _Tiles,
    trained_weight: torch.Tensor | None,
    trained_bias: torch.Tensor | None,
    head: Head,
    dhidden_CD: torch.Tensor | None,
    gradients: Gradients,
) -> None:
    """Go back through one chunk's product."""
    if head.logit_scale != 1.0:
        dlogits_CV.mul_(head.logit_scale)
    if dhidden_CD is not None:
        multiply_back(dlogits_CV, tiles, dhidden_CD)
    if trained_weight is not None:
        gradients.add_product(trained_weight, dlogits_CV, hidden_CD)
    if trained_bias is not None:
        gradients.add(trained_bias, dlogits_CV.sum(0, dtype=torch.float32))


def _capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    logits = logits.float()
    return logits if softcap is None else (logits / softcap).tanh_().mul_(softcap)


def _describe(
    logits_CV: torch.Tensor,
    target_C: torch.Tensor,
    softcap: float | None,
    found: dict[str, torch.Tensor],
) -> None:
    """Fill in what is asked for of each row's distribution."""
    if not found:
        return
    for row in range(0, len(logits_CV), 16):  # as many rows as stay in the cache
        part = slice(row, row + 16)
        z = _capped(logits_CV[part], softcap)
        if "is_top1" in found:
            found["is_top1"][part] = z.argmax(-1) == target_C[part]
        if "mean_logits" in found:
            found["mean_logits"][part] = z.mean(-1)
        if "entropy" in found or "log_sum_sq_probs" in found:
            log_p = torch.log_softmax(z, -1)
            if "log_sum_sq_probs" in found:
                found["log_sum_sq_probs"][part] = torch.logsumexp(2 * log_p, -1)
            if "entropy" in found:
                found["entropy"][part] = -(log_p.exp() * log_p).sum(-1)


def _entropy_gradient(
    logits_CV: torch.Tensor,
    lse_C: torch.Tensor,
    entropy_C: torch.Tensor,
    grad_C: torch.Tensor,
    softcap: float | None,
) -> torch.Tensor:
    """Return g dH/dz, dH/dz_j = -p_j (log p_j + H)."""
    z = _capped(logits_CV, softcap)
    log_p = z - lse_C[:, None]
    slope = -log_p.exp() * (log_p + entropy_C[:, None]) * grad_C[:, None]
    if softcap is not None:
        slope *= 1 - (z / softcap).square_()
    return slope
