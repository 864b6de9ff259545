"""The head gives plain cross entropy and its gradients from chunks of labelled rows."""

import pytest
import torch
from torch.nn import functional

from tests.engine.families import (
    adapted,
    batch,
    build,
    gradients,
    judge_norm,
    packed_batch,
    true_gradients,
)
from whet.engine import held, swap
from whet.engine.head import EXTRAS, Head, head_loss, read_head, token_log_probs
from whet.engine.held import EightBitWeight, HostWeight
from whet.engine.parity import judge
from whet.engine.projection import Unsupported

ROWS, WIDTH, VOCAB = 23, 24, 301  # neither rows nor classes fill a chunk or a power of two

HEADS = {
    "plain": Head(),
    "chunks that divide no rows": Head(chunk_rows=7),
    "one row a chunk": Head(chunk_rows=1),
    "a chunk of just all rows": Head(chunk_rows=ROWS),
    "soft cap": Head(softcap=2.0, chunk_rows=7),
    "label smoothing": Head(label_smoothing=0.1, chunk_rows=7),
    "logit scale": Head(logit_scale=0.3, chunk_rows=7),
    "all": Head(3.0, 1.7, 0.2, 7),
}
heads = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)


def make(dtype=torch.float32, rows=ROWS, bias=True):
    generator = torch.Generator().manual_seed(8)
    hidden = torch.randn(rows, WIDTH, generator=generator).to(dtype)
    weight = torch.randn(VOCAB, WIDTH, generator=generator).mul(0.5).to(dtype)
    bias = torch.randn(VOCAB, generator=generator).to(dtype) if bias else None
    target = torch.randint(VOCAB, (rows,), generator=generator)
    likeliest = functional.linear(hidden, weight, bias).argmax(-1)
    target[::3] = likeliest[::3]
    return hidden, weight, bias, target


def plain_logits(hidden, weight, bias, head):
    logits = functional.linear(hidden, weight, bias) * head.logit_scale
    if head.softcap is not None:
        logits = torch.tanh(logits / head.softcap) * head.softcap
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def plain_loss(hidden, weight, bias, target, head):
    logits = plain_logits(hidden, weight, bias, head)
    return functional.cross_entropy(
        logits, target, label_smoothing=head.label_smoothing, reduction="sum"
    )


def results(function, dtype, inputs, head, trained, factor=0.125):
    """The value, and the gradient of everything that is trained."""
    hidden, weight, bias, target = inputs
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    leaves = {k: None if v is None else v.detach().to(dtype).clone() for k, v in leaves.items()}
    needed = [k for k in leaves if leaves[k] is not None and (k == "hidden" or k in trained)]
    for name in needed:
        leaves[name].requires_grad_()
    value = function(*leaves.values(), target, head)
    grads = torch.autograd.grad(value * factor, [leaves[name] for name in needed])
    return {"loss": value.detach(), **dict(zip(needed, grads, strict=True))}


def check(head, inputs, trained=("weight", "bias"), dtype=torch.float32):
    ours = results(head_loss, dtype, inputs, head, trained)
    original = results(plain_loss, dtype, inputs, head, trained)
    truth = results(plain_loss, torch.float64, inputs, head, trained)
    assert ours.keys() == truth.keys()
    assert ours["hidden"].dtype == dtype and ours["loss"].dtype == torch.float32
    kind = judge
    if dtype == torch.bfloat16:  # one number's error is chance: it stays within a rounding
        kind = judge_norm
        loss = truth.pop("loss")
        assert (ours["loss"] - loss).abs() <= 2**-8 * loss
    judged = [kind(n, ours[n], original[n], truth[n]) for n in truth]
    assert not [one for one in judged if not one.passed]


@heads
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("trained", [(), ("weight",), ("weight", "bias")], ids=str)
def test_the_loss_is_cross_entropy(head, bias, trained):
    check(head, make(bias=bias), trained)


@heads
def test_in_bfloat16_the_loss_is_as_close_to_the_truth_as_cross_entropy(head):
    check(head, make(torch.bfloat16), (), torch.bfloat16)


@heads
def test_ignored_rows_count_nothing(head):
    inputs = make()
    inputs[3][[0, 5, 6, 22]] = -100
    check(head, inputs)


@heads
def test_every_row_ignored_is_a_loss_of_nothing_with_zero_gradients(head):
    hidden, weight, bias, target = make()
    found = results(
        head_loss, torch.float32, (hidden, weight, bias, target.fill_(-100)), head, ("weight",)
    )
    assert not any(value.any() for value in found.values())


def test_no_rows_at_all_are_a_loss_of_nothing():
    hidden, weight, bias, target = make(rows=0)
    hidden.requires_grad_()
    loss = head_loss(hidden, weight, bias, target, Head())
    loss.backward()
    assert loss == 0 and hidden.grad.shape == (0, WIDTH)


def test_the_hidden_states_may_be_frozen():
    hidden, weight, bias, target = make()
    weight.requires_grad_()
    head_loss(hidden, weight, bias, target, Head(chunk_rows=7)).backward()
    exact = weight.detach().double().requires_grad_()
    plain_loss(hidden.double(), exact, bias.double(), target, Head()).backward()
    plain = weight.detach().clone().requires_grad_()
    plain_loss(hidden, plain, bias, target, Head()).backward()
    assert judge("weight", weight.grad, plain.grad, exact.grad).passed


def test_strided_hidden_states_are_read_as_they_lie():
    hidden, weight, bias, target = make()
    wide = torch.zeros(ROWS, 2 * WIDTH)
    wide[:, ::2] = hidden
    plain = head_loss(hidden, weight, bias, target, Head())
    assert torch.equal(head_loss(wide[:, ::2], weight, bias, target, Head()), plain)


def test_under_autocast_products_are_in_its_type_and_gradients_in_the_weights():
    hidden, weight, bias, target = make(bias=False)
    found = []
    for function in (head_loss, plain_loss):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        with torch.autocast("cpu", torch.bfloat16):
            loss = function(*leaves, bias, target, Head())
        loss.backward()
        assert [x.grad.dtype for x in leaves] == [torch.float32] * 2
        found.append([loss.detach(), *(x.grad for x in leaves)])
    truth = results(
        plain_loss, torch.float64, (hidden, weight, bias, target), Head(), ("weight",), 1
    )
    for name, ours, original in zip(truth, *found, strict=True):
        assert judge(name, ours, original, truth[name]).passed, name


def describe(hidden, weight, bias, target, head):
    """Everything `token_log_probs` gives, in plain torch."""
    log_p = plain_logits(hidden, weight, bias, head)
    mean = log_p.mean(-1)
    is_top1 = log_p.argmax(-1) == target
    log_p = log_p.log_softmax(-1)
    return {
        "log_probs": log_p.gather(1, target[:, None])[:, 0],
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "log_sum_sq_probs": torch.logsumexp(2 * log_p, -1),
        "mean_logits": mean,
        "is_top1": is_top1,
    }


def weighed(found, extras):
    """One number from log-probabilities and entropies, each row weighed differently."""
    rows = torch.linspace(-1, 2, len(found["log_probs"])).to(found["log_probs"].dtype)
    value = (found["log_probs"] * rows).sum()
    return value + (found["entropy"] * rows.flip(0)).sum() if "entropy" in extras else value


NOT_SMOOTH = {name: head for name, head in HEADS.items() if not head.label_smoothing}


@pytest.mark.parametrize("extras", [(), ("entropy",), EXTRAS, ("is_top1", "mean_logits")], ids=str)
@pytest.mark.parametrize("head", NOT_SMOOTH.values(), ids=NOT_SMOOTH)
@pytest.mark.parametrize("trained", [(), ("weight", "bias")], ids=str)
def test_token_log_probs_and_extras_are_plain_torchs_with_gradients(head, extras, trained):
    inputs = make()

    def ours(hidden, weight, bias, target, head):
        described = token_log_probs(hidden, weight, bias, target, head, extras)
        found.append({k: v.detach() for k, v in described.items()})
        return weighed(described, extras)

    def plain(hidden, weight, bias, target, head):
        described = describe(hidden, weight, bias, target, head)
        found.append({k: v.detach() for k, v in described.items()})
        return weighed(described, extras)

    found = []
    programs = ((ours, torch.float32), (plain, torch.float32), (plain, torch.float64))
    grads = [results(f, dtype, inputs, head, trained, 1.0) for f, dtype in programs]
    assert list(found[0]) == ["log_probs", *extras]
    for name in found[0]:
        if name == "is_top1":
            assert torch.equal(found[0][name], found[2][name]) and found[0][name].any()
            assert found[0][name].dtype == torch.bool
        else:
            assert judge(name, *(one[name] for one in found)).passed, name
    for name in grads[2]:
        assert judge(name, *(one[name] for one in grads)).passed, name


def test_only_the_entropy_may_be_asked_for_a_gradient():
    hidden, weight, bias, target = make()
    kinds = (torch.float32, torch.float32, torch.float64)
    grads = []
    for function, kind in zip((token_log_probs, describe, describe), kinds, strict=True):
        leaf = hidden.to(kind).clone().requires_grad_()
        more = (("entropy",),) if function is token_log_probs else ()
        found = function(leaf, weight.to(kind), bias.to(kind), target, Head(chunk_rows=7), *more)
        found["entropy"].sum().backward()
        grads.append(leaf.grad)
    assert judge("hidden", *grads).passed


def test_what_has_no_gradient_says_so():
    hidden, weight, bias, target = make()
    found = token_log_probs(hidden.requires_grad_(), weight, bias, target, Head(), EXTRAS)
    needs = {name for name, value in found.items() if value.requires_grad}
    assert needs == {"log_probs", "entropy"}


def test_no_rows_have_no_log_probs():
    hidden, weight, bias, target = make(rows=0)
    found = token_log_probs(hidden.requires_grad_(), weight, bias, target, Head(), EXTRAS)
    assert all(value.shape == (0,) for value in found.values())
    found["log_probs"].sum().backward()
    assert hidden.grad.shape == (0, WIDTH)


def test_a_weight_of_another_type_is_what_products_are_made_in():
    hidden, weight, bias, target = make()
    half = head_loss(hidden, weight.bfloat16(), None, target, Head())
    same = head_loss(hidden.bfloat16(), weight.bfloat16(), None, target, Head())
    assert torch.equal(half, same)


def hold(weight):
    """A weight in 8 bit and the dense weight of the same values."""
    weight = EightBitWeight(weight)
    every = torch.arange(VOCAB)
    return weight, weight.look_up(every, weight.dtype, every.device)


@heads
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [(), ("bias",)], ids=str)
def test_a_weight_in_tiles_gives_the_loss_of_the_dense_one(head, dtype, trained, monkeypatch):
    monkeypatch.setattr(held, "TILE_ROWS", 64)
    hidden, weight, bias, target = make(dtype)
    eight, dense = hold(weight)

    def ours(hidden, _, bias, target, head):
        return head_loss(hidden, eight, bias, target, head)

    inputs = hidden, dense, bias, target
    found = results(ours, dtype, inputs, head, trained)
    original = results(plain_loss, dtype, inputs, head, trained)
    truth = results(plain_loss, torch.float64, inputs, head, trained)
    if dtype == torch.bfloat16:
        loss = truth.pop("loss")
        assert (found["loss"] - loss).abs() <= 2**-8 * loss
    kind = judge_norm if dtype == torch.bfloat16 else judge
    assert found.keys() >= truth.keys()
    assert not [n for n in truth if not kind(n, found[n], original[n], truth[n]).passed]


@pytest.mark.parametrize("extras", [(), EXTRAS], ids=str)
@pytest.mark.parametrize("trained", [(), ("bias",)], ids=str)
@pytest.mark.parametrize("head", [HEADS["plain"], Head(3.0, 1.7, 0.0, 7)], ids=["plain", "all"])
def test_a_weight_in_tiles_gives_the_log_probs_of_the_dense_one(head, extras, trained, monkeypatch):
    monkeypatch.setattr(held, "TILE_ROWS", 64)
    hidden, weight, bias, target = make()
    eight, dense = hold(weight)

    def ours(hidden, _, bias, target, head):
        return weighed(token_log_probs(hidden, eight, bias, target, head, extras), extras)

    def plain(hidden, weight, bias, target, head):
        return weighed(describe(hidden, weight, bias, target, head), extras)

    programs = ((ours, torch.float32), (plain, torch.float32), (plain, torch.float64))
    inputs = hidden, dense, bias, target
    found = [results(f, dtype, inputs, head, trained, 1.0) for f, dtype in programs]
    for name in found[2]:
        assert judge(name, *(one[name] for one in found)).passed, name


def test_under_autocast_a_weight_in_host_memory_is_cast_tile_by_tile(monkeypatch):
    hidden, weight, _, target = make()
    found = []
    for given in (weight, HostWeight(weight)):
        monkeypatch.setattr(held, "TILE_ROWS", 64)
        leaf = hidden.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = head_loss(leaf, given, None, target, Head())
        loss.backward()
        assert leaf.grad.dtype == torch.float32
        found.append((loss.detach(), leaf.grad))
    exact = results(plain_loss, torch.float64, (hidden, weight, None, target), Head(), (), 1)
    for name, (original, ours) in zip(exact, zip(*found, strict=True), strict=True):
        assert judge_norm(name, ours[None], original[None], exact[name][None]).passed, name


def test_a_head_that_is_no_plain_linear_layer_is_refused_with_its_reason():
    from peft import LoraConfig, get_peft_model

    model = build("llama2")
    config = LoraConfig(r=2, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(model, config).get_base_model()
    with pytest.raises(Unsupported, match="adapter on the head"):
        read_head(model.get_output_embeddings())
    report = swap.attach(model)
    assert [p.reason for p in report.parts if p.part == "head"] == ["an adapter on the head"]


def whole(model, inputs, **more):
    """Compare original and engine in one whole model; return the engine's gradients."""
    truth = true_gradients(model, inputs)
    original = gradients(model, inputs, **more)
    swap.attach(model)
    ours = gradients(model, inputs, **more)
    assert judge("loss", ours[0], original[0], truth[0]).passed
    assert ours[1].keys() == original[1].keys()
    for name, grad in ours[1].items():
        assert judge(name, grad, original[1][name], truth[1][name]).passed, name
    return ours[1]


def test_a_tied_embedding_gets_the_gradients_of_both_its_uses():
    model = build("llama3")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    found = whole(model, batch())
    assert "model.embed_tokens.weight" in found and "lm_head.weight" not in found


def test_a_head_that_is_trained_in_full_beside_an_adapter_is_fused():
    model = adapted(
        build("llama2"), target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"]
    )
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.mul_(1.5)
    found = whole(model, batch())
    assert any("modules_to_save" in name for name in found)
    report = swap.report_of(model)
    assert [p.fused for p in report.parts if p.part == "head"] == [True]


@pytest.mark.parametrize("count", [11, torch.tensor(11), torch.tensor(11.0)], ids=repr)
def test_num_items_in_batch_divides_the_summed_loss(count):
    model, inputs = build("gemma2"), batch()
    labelled = int((inputs["labels"][:, 1:] != -100).sum())
    original = gradients(model, inputs, num_items_in_batch=count)
    exact = true_gradients(model, inputs)
    swap.attach(model)
    ours = gradients(model, inputs, num_items_in_batch=count)
    truth = exact[0] * labelled / 11
    assert judge("loss", ours[0], original[0], truth).passed
    for name, grad in ours[1].items():
        truth = exact[1][name] * labelled / 11
        assert judge(name, grad, original[1][name], truth).passed, name


def test_small_chunks_give_the_loss_of_one_chunk():
    model, inputs = build("llama2"), packed_batch()
    swap.attach(model)
    whole_loss, whole_grads = gradients(model, inputs)
    swap.attach(model, swap.EngineSettings(head_rows=4))
    loss, grads = gradients(model, inputs)
    truth = true_gradients(model, inputs)
    assert judge("loss", loss, whole_loss, truth[0]).passed
    for name, grad in grads.items():
        assert judge(name, grad, whole_grads[name], truth[1][name]).passed, name
