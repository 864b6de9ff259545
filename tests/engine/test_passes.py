"""A pass described on the host is the batch it stands for; rounded up, it is the same still."""

import contextlib
import itertools
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engine.families import adapted, build, gradients, true_gradients
from whet.engine import swap
from whet.engine.head import Head
from whet.engine.memory import planned_workspaces
from whet.engine.parity import judge
from whet.engine.passes import pack_pass
from whet.model.loss import summed_loss


def documents(lengths=(5, 1, 11, 8), vocab=301, prompt=2):
    """Token ids and labels of each document; a prompt at its start is not learned."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for length in lengths:
        ids = torch.randint(1, vocab, (length,), generator=generator).tolist()
        found.append((ids, [-100] * min(prompt, length) + ids[prompt:]))
    return found


def as_dict(parts):
    """What `Packing.batch` makes of them."""
    ids, labels = (list(itertools.chain.from_iterable(x)) for x in zip(*parts, strict=True))
    positions = [position for ids, _ in parts for position in range(len(ids))]
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "labels": torch.tensor([labels]),
    }


def learned(model, batch):
    """The summed loss of a pass, and every gradient."""
    model.train()
    model.zero_grad()
    loss, num = summed_loss(model, batch)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), num, grads


def same(ours, theirs):
    return (
        torch.equal(ours[0], theirs[0])
        and ours[1] == theirs[1]
        and ours[2].keys() == theirs[2].keys()
        and all(torch.equal(ours[2][name], grad) for name, grad in theirs[2].items())
    )


def test_a_pass_says_what_its_documents_are():
    made = pack_pass([([7, 8, 9], [7, 8, 9]), ([5], [5]), ([3, 4], [-100, 4])], 0, 2)
    assert made.input_ids.tolist() == [[7, 8, 9, 5, 3, 4, 0, 0]]
    assert made.packed.lengths == (3, 1, 2, 2) and made.packed.longest == 3
    assert made.packed.cu_seqlens.tolist() == [0, 3, 4, 6, 8]
    assert made.packed.cu_seqlens.dtype == torch.int32
    assert made.packed.positions_T.tolist() == [0, 1, 2, 0, 0, 1, 0, 1]
    assert made.rows_N.tolist() == [0, 1, 4] and made.target_N.tolist() == [8, 9, 4]
    assert made.num_labels == 3 and made.key == (8, 4, 3, 3)


def test_a_pass_goes_back_to_the_batch_it_stands_for():
    parts = documents()
    inputs = as_dict(parts)
    firsts = inputs["position_ids"] == 0
    expected = inputs["labels"].masked_fill(firsts, -100)
    for made in (pack_pass(parts), pack_pass(parts).rounded()):
        again = made.as_batch()
        assert torch.equal(again["input_ids"], inputs["input_ids"])
        assert torch.equal(again["position_ids"], inputs["position_ids"])
        assert torch.equal(again["labels"], expected)


def test_rounding_makes_shapes_repeat():
    first, second = (
        pack_pass(documents(lengths), 0, 32 - sum(lengths)).rounded()
        for lengths in ((5, 1, 11, 8), (4, 1, 12, 7))
    )
    assert first.key == second.key == (32, 8, 20, 16)
    assert len(first.lengths) == 8 and first.packed.cu_seqlens.tolist()[-4:] == [32] * 4
    assert first.packed.longest == 16
    assert first.num_rows % 4 == 0 and first.num_rows - first.num_labels < 4
    assert first.target_N[first.num_labels :].eq(-100).all()
    assert first.num_labels == pack_pass(documents()).num_labels


def test_what_is_full_is_rounded_to_itself_at_most():
    ids = list(range(1, 8))
    made = pack_pass([(ids, ids)]).rounded()
    assert made.key == (7, 1, 6, 7)


@pytest.mark.parametrize(
    "family", ["llama3", "gemma2", "gemma3", "gpt2", "phi4", "qwen3", "qwen3_moe", "deepseek_v3"]
)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_pass_is_its_batch_to_the_bit(family, method):
    model = build(family)
    if method == "lora":
        model = adapted(model)
    swap.attach(model)
    assert swap.takes_packed(model) and swap.fuses_head(model)
    parts = documents()
    theirs = learned(model, as_dict(parts))
    assert theirs[2] and same(learned(model, pack_pass(parts)), theirs)


@pytest.mark.parametrize("family", ["llama3", "gemma2", "gemma3", "gpt2", "qwen3"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_pass_that_is_rounded_up_learns_the_same(family, method):
    model = build(family)
    model = adapted(model) if method == "lora" else model
    parts = documents()
    inputs = as_dict(parts)
    inputs["labels"].masked_fill_(inputs["position_ids"] == 0, -100)
    truth, original = true_gradients(model, inputs), gradients(model, inputs)
    swap.attach(model)
    made = pack_pass(parts, 0, 7).rounded()
    assert made.num_tokens == 32 and made.num_rows > made.num_labels
    total, num, grads = learned(model, made)
    assert judge("loss", total / num, original[0], truth[0]).passed
    for name, grad in grads.items():
        assert judge(name, grad / num, original[1][name], truth[1][name]).passed, name


@pytest.mark.parametrize("rounded", [False, True])
def test_a_pass_without_labels_is_loss_0_with_zero_gradients(rounded):
    model = build("llama2")
    swap.attach(model)
    made = pack_pass([([3, 4, 5], [-100] * 3), ([6], [6])])
    loss, num, grads = learned(model, made.rounded() if rounded else made)
    assert loss == 0 and num == 0
    assert all(not grad.any() for grad in grads.values())
    assert swap.met(model)["unlabelled_batches"] == 1


def test_an_adapter_on_the_head_gets_the_batch_in_the_originals_form():
    model = adapted(build("llama2"), target_modules=["q_proj", "lm_head"])
    swap.attach(model)
    vars(swap.base_of(model))["_whet"].head = Head()  # as if it had been put on later
    parts = documents()
    theirs = learned(model, as_dict(parts))
    assert same(learned(model, pack_pass(parts)), theirs)
    assert "adapter on the head" in swap.met(model)["notes"]["head"]


def test_losses_of_the_router_are_the_originals_business():
    model = build("mixtral", output_router_logits=True)
    swap.attach(model)
    parts = documents()
    theirs = learned(model, as_dict(parts))
    assert same(learned(model, pack_pass(parts)), theirs)


def test_a_paused_engine_gets_the_batch_in_the_originals_form():
    model = build("llama2")
    swap.attach(model)
    parts = documents()
    with swap.paused(model):
        loss = model(whet_pass=pack_pass(parts), use_cache=False).loss
        inputs = as_dict(parts)
        inputs["labels"].masked_fill_(inputs["position_ids"] == 0, -100)
        assert torch.equal(loss, model(**inputs, use_cache=False).loss)


class NothingLeavesTheDevice(TorchDispatchMode):
    """Raises where a tensor is made from values, or copied to the host: both make a GPU's host wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].numel() > 1:
            assert kwargs.get("device") is None, f"a copy to {kwargs['device']}"
        if func is torch.ops.aten.lift_fresh.default:
            assert args[0].numel() == 1, "a tensor made from values of the host"
        return func(*args, **kwargs)


@contextlib.contextmanager
def without_values(model):
    """Let a model have shapes alone: whoever looks at a value in the body gets an error."""
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    before = []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                before.append((module._parameters, name, parameter))
                fake = mode.from_tensor(parameter.detach())
                module._parameters[name] = torch.nn.Parameter(fake, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                before.append((module._buffers, name, buffer))
                module._buffers[name] = mode.from_tensor(buffer)
    try:
        with planned_workspaces("cuda"), mode, NothingLeavesTheDevice():
            yield mode
    finally:
        for holder, name, value in before:
            holder[name] = value


@pytest.mark.parametrize("family", ["llama3", "gemma3", "gpt2", "phi4", "qwen3"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_no_value_of_a_pass_is_read_on_the_host(family, method):
    model = build(family)
    model = adapted(model) if method == "lora" else model
    swap.attach(model)
    model.train()
    parts = documents()
    made = pack_pass(parts)
    with without_values(model) as mode:
        loss, _ = summed_loss(model, replace(made, flat=mode.from_tensor(made.flat)))
        loss.backward()
        assert sum(p.grad is not None for p in model.parameters()) > 5


def test_the_other_form_of_a_batch_is_read_on_the_host():
    model = build("llama3")
    swap.attach(model)
    model.train()
    inputs = as_dict(documents())
    with without_values(model) as mode, pytest.raises(DynamicOutputShapeException):
        summed_loss(model, {key: mode.from_tensor(value) for key, value in inputs.items()})
