"""Attention over packed documents is dense masked attention, without the T x T matrix."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engine.families import adapted, build, gradients, judge_norm, packed_batch
from whet.engine import swap
from whet.engine.layer import attention_interface
from whet.engine.parity import judge
from whet.engine.unpad import from_lengths
from whet.engine.varlen import AtenFlash, Flex, Mask, varlen_backward, varlen_forward

LENGTHS = (5, 1, 70, 19)  # one token; more than a block of 64 queries


def visible(lengths, window, device="cpu"):
    """Which token sees which, (T, T)."""
    lengths = torch.tensor(lengths, device=device)
    document = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
    place = torch.arange(int(lengths.sum()), device=device)
    behind = place[:, None] - place[None]
    seen = (document[:, None] == document[None]) & (behind >= 0)
    return seen if window is None else seen & (behind < window)


def dense(q, k, v, lengths, mask):
    """Attention as it is written down: all scores of all tokens, in the dtype of the inputs."""
    repeat = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
    scores = torch.einsum("thk,shk->hts", q, k) * mask.scale
    if mask.softcap is not None:
        scores = torch.tanh(scores / mask.softcap) * mask.softcap
    scores = scores.masked_fill(~visible(lengths, mask.window, q.device), float("-inf"))
    high = torch.promote_types(q.dtype, torch.float32)
    weights = torch.softmax(scores, -1, dtype=high).to(q.dtype)
    return torch.einsum("hts,shk->thk", weights, v)


def make(heads, groups, width, dtype, lengths=LENGTHS, device="cpu"):
    """Queries, keys, values and a gradient of the output: views of wider buffers."""
    generator = torch.Generator().manual_seed(5)
    tokens, columns = sum(lengths), (heads + 2 * groups) * width
    more = 3 if device == "cpu" else 8  # flash attention on CUDA reads rows of 16-byte words
    buffer = torch.randn(tokens, columns + more, generator=generator).mul_(1.5).to(device, dtype)
    parts = buffer[:, :columns].split((heads * width, groups * width, groups * width), dim=1)
    q, k, v = (x.unflatten(1, (-1, width)) for x in parts)
    do = torch.randn(tokens, heads, width, generator=generator).to(device, dtype)
    return q, k, v, do


def run_dense(q, k, v, do, lengths, mask, dtype):
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    out = dense(*leaves, lengths, mask)
    return [out.detach(), *torch.autograd.grad(out, leaves, do.to(dtype))]


def run_ours(q, k, v, do, lengths, mask):
    packed = from_lengths(list(lengths))
    out, lse = varlen_forward(q, k, v, packed, mask)
    assert out.is_contiguous() and lse.dtype == torch.float32
    buffer = torch.full((len(q), q[0].numel() + 2 * k[0].numel() + 1), float("nan"), dtype=q.dtype)
    sizes = (q[0].numel(), k[0].numel(), v[0].numel(), 1)
    parts = buffer.split(sizes, dim=1)[:3]
    grads = [x.unflatten(1, (-1, q.shape[2])) for x in parts]
    varlen_backward(do, q, k, v, out, lse, packed, mask, *grads)
    return [out, *grads]


def faults(ours, original, truth):
    """What fails the triangulated bound; sixteen bits scatter, and are judged by all entries together."""
    wrong = []
    for number, name in enumerate(("out", "dq", "dk", "dv")):
        group = [found[number].double().flatten() for found in (ours, original, truth)]
        if not group[
            2
        ].any():  # who sees one token only: its score has no gradient, but its value has
            beside = [found[3].double().flatten() for found in (ours, original, truth)]
            group = [torch.cat(pair) for pair in zip(group, beside, strict=True)]
        judged = (judge if ours[number].dtype == torch.float32 else judge_norm)(name, *group)
        wrong += [] if judged.passed else [judged]
    return wrong


def compare(heads, groups, width, mask, dtype, lengths=LENGTHS):
    mask = replace(mask, scale=width**-0.5)
    inputs = make(heads, groups, width, dtype, lengths)
    truth = run_dense(*inputs, lengths, mask, torch.float64)
    original = run_dense(*inputs, lengths, mask, dtype)
    return faults(run_ours(*inputs, lengths, mask), original, truth)


MASKS = {
    "plain": Mask(0.2),
    "window 1": Mask(0.2, 1),
    "window 5": Mask(0.2, 5),
    "window past every document": Mask(0.2, 71),
    "soft cap": Mask(0.2, None, 2.0),
    "window and soft cap": Mask(0.2, 5, 2.0),
}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


@dtypes
@masks
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (6, 2), (3, 1)])
def test_grouped_heads_attend_as_dense_attention_does(heads, groups, mask, dtype):
    assert not compare(heads, groups, 32, mask, dtype)


@dtypes
@masks
@pytest.mark.parametrize("width", [12, 64, 80, 128, 256])
def test_heads_of_every_width_attend_as_dense_attention_does(width, mask, dtype):
    assert not compare(2, 1, width, mask, dtype, (4, 33))


@dtypes
@masks
def test_documents_of_one_token_get_their_own_values(mask, dtype):
    lengths = (1,) * 9
    q, k, v, do = make(4, 2, 32, dtype, lengths)
    out, dq, dk, dv = run_ours(q, k, v, do, lengths, mask)
    assert torch.equal(out, v.repeat_interleave(2, dim=1))
    truths = [run_dense(q, k, v, do, lengths, mask, kind) for kind in (dtype, torch.float64)]
    assert not faults([out, dq, dk, dv], *truths)


@masks
def test_a_hundred_documents_attend_as_dense_attention_does(mask):
    lengths = [1 + (7 * i) % 11 for i in range(100)]
    assert not compare(3, 1, 32, mask, torch.float32, lengths)


@masks
def test_a_document_is_bit_equal_alone_and_in_a_pack(mask):
    q, k, v, do = make(4, 2, 32, torch.float32)
    packed = run_ours(q, k, v, do, LENGTHS, mask)
    start = 0
    for length in LENGTHS:
        part = slice(start, start + length)
        start += length
        # The window of the pack's longest document decides the form; here it is the same one.
        alone = run_ours(*(x[part] for x in (q, k, v, do)), (length,), mask)
        if mask.window is None or mask.window < length:
            assert all(torch.equal(a, p[part]) for a, p in zip(alone, packed, strict=True))


def test_a_token_of_one_document_never_reaches_another():
    for mask in MASKS.values():
        q, k, v, do = make(4, 2, 32, torch.float32)
        before = run_ours(q, k, v, do, LENGTHS, mask)
        with torch.no_grad():
            for x in (q, k, v, do):
                x[6:76] = 1e4  # the third document
        after = run_ours(q, k, v, do, LENGTHS, mask)
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a[:6], b[:6]) and torch.equal(a[76:], b[76:])


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple | list) else [result]
        sizes = [x.nbytes for x in results if isinstance(x, torch.Tensor)]
        self.nbytes = max([self.nbytes, *sizes])
        return result


@masks
def test_six_thousand_tokens_of_short_documents_make_nothing_of_tokens_squared(mask):
    lengths = (40,) * 150
    inputs = make(2, 1, 32, torch.float32, lengths)
    with Largest() as largest:
        run_ours(*inputs, lengths, mask)
    assert 0 < largest.nbytes <= 6000 * (4 * 32 + 3) * 4  # the buffer of q, k and v


def test_one_long_document_under_a_window_makes_nothing_of_tokens_squared():
    inputs = make(1, 1, 32, torch.float32, (3000,))
    with Largest() as largest:
        run_ours(*inputs, (3000,), Mask(0.2, 50))
    assert 0 < largest.nbytes <= 3000 * 100 * 4


@pytest.mark.parametrize("family", ["smollm", "gemma2", "mixtral"])
def test_a_model_makes_nothing_of_tokens_squared_from_a_pack(family):
    model = adapted(build(family, num_hidden_layers=1))
    swap.attach(model)
    with Largest() as largest:
        gradients(model, packed_batch((30,) * 100))
    assert 0 < largest.nbytes < 3000 * 3000  # not even a mask of single bytes


def interface(q, k, v, lengths, **more):
    """Call attention_interface as transformers' attentions do, heads first."""
    heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
    packed = from_lengths(list(lengths))
    out, weights = attention_interface(None, *heads_first, None, whet_packed=packed, **more)
    assert weights is None
    return out[0]


@pytest.mark.parametrize("more", [
    {}, {"scaling": 0.3}, {"sliding_window": 5}, {"softcap": 2.0, "sliding_window": 3},
], ids=str)  # fmt: skip
def test_the_interface_is_dense_attention_with_gradients(more):
    q, k, v, do = make(6, 2, 32, torch.float32)
    mask = Mask(more.get("scaling", 32**-0.5), more.get("sliding_window"), more.get("softcap"))
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = interface(*leaves, LENGTHS, **more)
    ours = [out.detach(), *torch.autograd.grad(out, leaves, do)]
    kinds = (torch.float32, torch.float64)
    assert not faults(ours, *(run_dense(q, k, v, do, LENGTHS, mask, kind) for kind in kinds))


@pytest.mark.parametrize("width", [20, 48])
@pytest.mark.parametrize("more", [{}, {"sliding_window": 5}, {"softcap": 2.0}], ids=str)
def test_the_interface_takes_values_of_another_width(width, more):
    q, k, _, _ = make(4, 2, 32, torch.float32)
    generator = torch.Generator().manual_seed(6)
    v = torch.randn(len(q), 2, width, generator=generator)
    do = torch.randn(len(q), 4, width, generator=generator)
    mask = Mask(0.3, more.get("sliding_window"), more.get("softcap"))
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = interface(*leaves, LENGTHS, scaling=0.3, **more)
    ours = [out.detach(), *torch.autograd.grad(out, leaves, do)]
    kinds = (torch.float32, torch.float64)
    assert not faults(ours, *(run_dense(q, k, v, do, LENGTHS, mask, kind) for kind in kinds))


@pytest.mark.parametrize("more", [{}, {"sliding_window": 5}, {"softcap": 2.0}], ids=str)
def test_dropout_through_the_interface_drops_and_keeps_the_mean(more):
    q, k, v, _ = make(2, 1, 16, torch.float32, (3, 9))
    torch.manual_seed(0)
    plain = interface(q, k, v, (3, 9), **more)
    dropped = torch.stack([
        interface(q, k, v, (3, 9), dropout=0.25, **more) for _ in range(400)
    ])  # fmt: skip
    assert not torch.equal(dropped[0], dropped[1])
    error = dropped.std(0) / len(dropped) ** 0.5
    assert ((dropped.mean(0) - plain).abs() <= 5 * error).all()  # five standard errors


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [64, 128])
@masks
@pytest.mark.parametrize("backend", [AtenFlash, Flex])
def test_a_backend_on_cuda_attends_as_dense_attention_does(backend, mask, width, dtype):
    if backend is AtenFlash and (dtype == torch.float32 or mask.softcap is not None):
        pytest.skip("flash attention in torch takes 16 bits and no soft cap")
    if backend is AtenFlash and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("flash attention needs compute capability 8.0")
    mask = replace(mask, scale=width**-0.5)
    q, k, v, do = make(6, 2, width, dtype, device="cuda")
    packed = from_lengths(list(LENGTHS), "cuda")
    out, lse = backend.forward(q, k, v, packed, mask)
    assert out.is_contiguous() and lse.dtype == torch.float32 and lse.shape == (6, len(q))
    grads = backend.backward(do, q, k, v, out, lse, packed, mask)
    assert [g.shape for g in grads] == [x.shape for x in (q, k, v)]
    truth = run_dense(q, k, v, do, LENGTHS, mask, torch.float64)
    original = run_dense(q, k, v, do, LENGTHS, mask, dtype)
    assert not faults([out, *grads], original, truth)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [32, 80, 256])
@masks
def test_whatever_backend_cuda_takes_attends_as_dense_attention_does(mask, width, dtype):
    mask = replace(mask, scale=width**-0.5)
    q, k, v, do = make(4, 1, width, dtype, device="cuda")
    packed = from_lengths(list(LENGTHS), "cuda")
    out, lse = varlen_forward(q, k, v, packed, mask)
    buffer = torch.empty(len(q), 6 * width, dtype=dtype, device="cuda")
    parts = buffer.split((4 * width, width, width), dim=1)
    grads = [x.unflatten(1, (-1, width)) for x in parts]
    varlen_backward(do, q, k, v, out, lse, packed, mask, *grads)
    truth = run_dense(q, k, v, do, LENGTHS, mask, torch.float64)
    original = run_dense(q, k, v, do, LENGTHS, mask, dtype)
    assert not faults([out, *grads], original, truth)
