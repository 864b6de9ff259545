"""Cross entropy of a chunk of logits, whose gradient takes the logits' place.

z' = c tanh(z / c) with a soft cap c (Gemma 2), else z' = z.
Forward:   loss = lse(z') - (1 - e) z'[target] - e mean(z'), e the label smoothing; 0 for ignored rows.
Backward:  dz = g (softmax(z') - (1 - e) onehot - e / V) (1 - (z'/c)^2), written over z.
Sums in float32; reads and writes each logit once more than the product that made it.
"""

# ruff: noqa: ANN001, ANN202 -- Triton kernels carry no annotations

from __future__ import annotations

import torch

from whet.kernels.launch import constexpr, jit, launch, power_of_2, tanh, tl, uses_triton
from whet.kernels.spec import Aot, Case, Spec, Tensors, normal, wide

# Rows worked on at a time on the CPU: 16 x 49,152 float32 are 3 MB, which stay in the last cache level
# (EPYC Zen 5: 4.5 ms for 256 rows in blocks of 16, 28.7 ms in one piece).
BLOCK_BYTES = 3 << 20


def cross_entropy_(
    logits_NV: torch.Tensor,
    target_N: torch.Tensor,
    grad_N: torch.Tensor | None,
    *,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's loss, and write the gradient of the logits over them.

    Args:
        logits_NV: Logits before the soft cap; overwritten when grad_N is given.
        target_N: int64 class of each row, or ignore_index.
        grad_N: float32 gradient of each row's loss; None leaves the logits alone.
        softcap: The cap c, or None.
        label_smoothing: The share e spread over all classes.
        ignore_index: Rows with this target have loss 0 and gradient 0.

    Returns:
        (loss_N, lse_N), float32.
    """
    num, vocab = logits_NV.shape
    loss = torch.empty(num, dtype=torch.float32, device=logits_NV.device)
    lse = torch.empty_like(loss)
    if uses_triton(logits_NV):
        _launch(logits_NV, target_N, grad_N, softcap, label_smoothing, ignore_index, loss, lse)
        return loss, lse
    rows = max(1, BLOCK_BYTES // (4 * vocab)) if logits_NV.device.type == "cpu" else max(1, num)
    for start in range(0, num, rows):
        part = slice(start, min(num, start + rows))
        _block(
            logits_NV[part], target_N[part], None if grad_N is None else grad_N[part],
            softcap, label_smoothing, ignore_index, loss[part], lse[part],
        )  # fmt: skip
    return loss, lse


def _block(
    logits: torch.Tensor,
    target: torch.Tensor,
    grad: torch.Tensor | None,
    softcap: float | None,
    smoothing: float,
    ignore_index: int,
    loss: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    ignored = target == ignore_index
    column = target.masked_fill(ignored, 0)[:, None]
    z = logits if softcap is None else (logits.float() / softcap).tanh_().mul_(softcap)
    # One pass gives all: the largest probability is exp(0) / Z.
    p = torch.softmax(z, -1, dtype=torch.float32)
    top = p.amax(-1)
    torch.sub(z.amax(-1).float(), top.log(), out=lse)
    picked = z.gather(1, column)[:, 0].float()
    torch.sub(lse, picked, alpha=1 - smoothing, out=loss)
    if smoothing:
        loss.sub_(z.mean(-1, dtype=torch.float32), alpha=smoothing)
    loss.masked_fill_(ignored, 0)
    if grad is None:
        return
    if smoothing:
        p.sub_(smoothing / p.shape[-1])
    p.scatter_add_(1, column, p.new_full(column.shape, smoothing - 1))
    p.mul_(grad.masked_fill(ignored, 0)[:, None])
    if softcap is not None:
        p.mul_(1 - (z / softcap).square_())
    logits.copy_(p)


@jit
def _cross_entropy(
    z_ptr, target_ptr, grad_ptr, loss_ptr, lse_ptr, z_stride, vocab, ignore_index, softcap, smoothing,
    SOFTCAP: constexpr, SMOOTH: constexpr, BLOCK_V: constexpr,
):  # fmt: skip
    """Compute a row's loss and log-sum-exp, and write g dloss/dz over its logits z.

    loss = lse(z') - (1 - e) z'[target] - e mean(z');
    dz = g (softmax(z') - (1 - e) onehot - e / V) (1 - (z'/c)^2).
    The maximum and the sum go along the row together in float32, the sum rescaled where the maximum
    grows (arXiv 1805.02867). Reads z twice and writes it once; without gradients reads it once.
    """
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * z_stride
    target = tl.load(target_ptr + row)
    ignored = target == ignore_index
    # Before the sums, whose barriers keep a fast warp from writing the gradient there first.
    picked = tl.load(z_ptr + tl.where(ignored, 0, target)).to(tl.float32)
    top = -3.0e38  # finite, so that a block of minus infinities does not give inf - inf
    total = 0.0
    plain_sum = 0.0
    for start in range(0, vocab, BLOCK_V):
        col = start + tl.arange(0, BLOCK_V)
        z = tl.load(z_ptr + col, mask=col < vocab, other=-float("inf")).to(tl.float32)
        if SOFTCAP:
            z = tl.where(col < vocab, softcap * tanh(z / softcap), -float("inf"))
        if SMOOTH:
            plain_sum += tl.sum(tl.where(col < vocab, z, 0.0), 0)
        higher = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), 0)
        top = higher
    lse = top + tl.log(total)
    if SOFTCAP:
        picked = softcap * tanh(picked / softcap)
    loss = lse - (1 - smoothing) * picked
    if SMOOTH:
        loss -= smoothing * plain_sum / vocab
    tl.store(loss_ptr + row, tl.where(ignored, 0.0, loss))
    tl.store(lse_ptr + row, lse)
    if grad_ptr is not None:
        grad = tl.where(ignored, 0.0, tl.load(grad_ptr + row))
        for start in range(0, vocab, BLOCK_V):
            col = start + tl.arange(0, BLOCK_V)
            z = tl.load(z_ptr + col, mask=col < vocab, other=0.0).to(tl.float32)
            slope = 1.0
            if SOFTCAP:
                share = tanh(z / softcap)
                z = softcap * share
                slope = 1 - share * share
            dz = tl.exp(z - lse) - tl.where(col == target, 1 - smoothing, 0.0)
            if SMOOTH:
                dz -= smoothing / vocab
            dz *= grad * slope
            tl.store(z_ptr + col, dz.to(z_ptr.dtype.element_ty), mask=col < vocab)


def _options(vocab: int, softcap: float | None, smoothing: float) -> dict[str, int | bool]:
    block = min(4096, power_of_2(vocab))
    return {
        "SOFTCAP": softcap is not None, "SMOOTH": smoothing > 0, "BLOCK_V": block,
        "num_warps": 8,
    }  # fmt: skip


def _launch(
    logits: torch.Tensor,
    target: torch.Tensor,
    grad: torch.Tensor | None,
    softcap: float | None,
    smoothing: float,
    ignore_index: int,
    loss: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    num, vocab = logits.shape
    if num:
        launch(
            _cross_entropy, (num,), logits, target, grad, loss, lse, logits.stride(0), vocab,
            ignore_index, softcap or 1.0, smoothing, **_options(vocab, softcap, smoothing),
        )  # fmt: skip


def _make_inputs(
    case: Case, dtype: torch.dtype, device: str, generator: torch.Generator
) -> Tensors:
    num, vocab = case["N"], case["V"]
    target = torch.randint(0, vocab, (num,), generator=generator, device=device)
    target[: num // 3] = -100
    return {
        "logits": normal(
            (num, vocab), dtype, device, generator, pad=case.get("pad", 0), std=case.get("std", 3.0)
        ),
        "target": target,
        "grad": torch.rand(num, generator=generator, device=device) + 0.5,
    }


def _original(case: Case, inputs: Tensors) -> Tensors:
    logits, cap = inputs["logits"], case.get("softcap")
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    logits = wide(logits)
    loss = torch.nn.functional.cross_entropy(
        logits, inputs["target"], reduction="none", label_smoothing=case.get("smoothing", 0.0)
    )
    return {"loss": loss, "lse": logits.logsumexp(-1)}


def _forward(case: Case, inputs: Tensors) -> Tensors:
    logits, trained = inputs["logits"], "logits" not in case.get("frozen", ())
    loss, lse = cross_entropy_(
        logits, inputs["target"], inputs["grad"] if trained else None,
        softcap=case.get("softcap"), label_smoothing=case.get("smoothing", 0.0),
    )  # fmt: skip
    return {"loss": loss, "lse": lse} | ({"dlogits": logits} if trained else {})


def _bytes_moved(case: Case, dtype: torch.dtype) -> tuple[int, int]:
    return 3 * case["N"] * case["V"] * dtype.itemsize, 0


SPEC = Spec(
    name="cross_entropy",
    summary="Loss, log-sum-exp and the logits' gradient in their place; soft cap, label smoothing",
    traffic="3 elements a logit, loss and gradient together",
    cases=(
        Case("plain", {"N": 7, "V": 301, "pad": 3}),
        Case("soft cap, smoothing", {"N": 5, "V": 67, "softcap": 5.0, "smoothing": 0.1}),
        Case("smoothing, large logits", {"N": 4, "V": 4099, "smoothing": 0.2, "std": 20.0}),
        Case("soft cap, two blocks", {"N": 3, "V": 5001, "softcap": 30.0, "std": 10.0}),
        Case("no gradient", {"N": 6, "V": 70, "pad": 2, "softcap": 10.0, "frozen": ("logits",)}),
        Case("one row", {"N": 1, "V": 33}),
        Case("large vocabulary", {"N": 2, "V": 262143, "softcap": 30.0}),
    ),
    large=(
        Case("llama 3", {"N": 515, "V": 128256}),
        Case("gemma", {"N": 259, "V": 262144, "softcap": 30.0}),
        Case("gpt-2", {"N": 1025, "V": 50257, "smoothing": 0.1}),
    ),
    bench={
        "cpu": Case("N 256, V 49152", {"N": 256, "V": 49152}),
        "cuda": Case("N 4096, V 128256", {"N": 4096, "V": 128256}),
    },
    make_inputs=_make_inputs,
    original=_original,
    forward=_forward,
    upstream={"loss": "grad"},
    leaves=("logits",),
    bytes_moved=_bytes_moved,
    aot=(
        Aot(
            _cross_entropy,
            "*T *i64 *fp32 *fp32 *fp32 i32 i32 i32 fp32 fp32",
            (
                _options(128256, None, 0.0),
                _options(262144, 30.0, 0.1),
                _options(50257, None, 0.0) | {"grad_ptr": None},
            ),
        ),
    ),
)
SPECS = (SPEC,)
