"""Policies change where saved tensors stay, never a gradient; workspaces are few and reused."""

import gc
import os
import threading

import pytest
import torch

from tests.engine.families import adapted, batch, build, gradients, in_nf4, packed_batch
from whet.engine import attention_half, layer, memory, swap
from whet.engine.memory import Policy, SavedTensors, release_workspaces, workspace
from whet.engine.offload import offload_bytes
from whet.engine.swap import EngineSettings

ALL = Policy("offload", "offload", "offload", "offload")
POLICIES = {
    "hidden offloaded": Policy(hidden="offload"),
    "qkv offloaded": Policy(qkv="offload"),
    "qkv recomputed": Policy(qkv="recompute"),
    "attention offloaded": Policy(attention="offload"),
    "gate_up offloaded": Policy(gate_up="offload"),
    "gate_up recomputed": Policy(gate_up="recompute"),
    "all offloaded": ALL,
    "least": Policy("offload", "recompute", "offload", "recompute"),
}
MODELS = {
    "llama lora": lambda: adapted(build("llama3")),
    "llama full": lambda: build("llama3"),
    "llama nf4": lambda: adapted(in_nf4(build("llama3"))),
    "gemma2 full, norms behind": lambda: build("gemma2"),
    "qwen3 full, norms of heads": lambda: build("qwen3"),
    "gpt2 lora, plain mlp": lambda: adapted(build("gpt2")),
}


def with_policy(model, policy, inputs):
    swap.attach(model, EngineSettings(check="off", policies=policy))
    return gradients(model, inputs)


@pytest.mark.parametrize("name", MODELS)
def test_no_policy_changes_a_bit_of_the_loss_or_of_any_gradient(name):
    model, inputs = MODELS[name](), batch()
    loss, kept = with_policy(model, Policy(), inputs)
    assert kept
    for where, policy in POLICIES.items():
        found = with_policy(model, policy, inputs)
        assert torch.equal(found[0], loss), where
        assert found[1].keys() == kept.keys(), where
        assert not [n for n, g in found[1].items() if not torch.equal(g, kept[n])], where


def test_each_layer_may_have_a_policy_of_its_own():
    model, inputs = build("llama3"), packed_batch()
    _, kept = with_policy(model, Policy(), inputs)
    _, mixed = with_policy(model, (POLICIES["least"], Policy(qkv="offload")), inputs)
    assert all(torch.equal(mixed[n], kept[n]) for n in kept)


def test_blocks_of_tokens_change_no_policy(monkeypatch):
    # More tokens than one block: sums over blocks, and the last one is not full.
    monkeypatch.setitem(layer.BLOCK_TOKENS, "cpu", 8)
    model, inputs = build("gemma2"), packed_batch((7, 12, 2))
    _, kept = with_policy(model, Policy(), inputs)
    for policy in POLICIES.values():
        _, found = with_policy(model, policy, inputs)
        assert all(torch.equal(found[n], kept[n]) for n in kept)


def saved_bytes(model, policy, inputs):
    """Bytes that the layers' functions leave with autograd between forward and backward."""
    swap.attach(model, EngineSettings(check="off", policies=policy))
    seen = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return sum(seen.values())


def test_what_is_recomputed_or_offloaded_is_not_kept():
    model, inputs = adapted(build("llama2")), packed_batch()
    tokens, layers, width = 25, 2, 4
    kept = saved_bytes(model, Policy(), inputs)
    gate_up = tokens * 2 * 128 * width * layers
    qkv = tokens * (4 + 2 * 2) * 16 * width * layers
    attention = tokens * (64 + 4) * width * layers  # the output, and a log-sum-exp of each head
    for away in ("recompute", "offload"):
        assert kept - saved_bytes(model, Policy(gate_up=away), inputs) == gate_up
        assert kept - saved_bytes(model, Policy(qkv=away), inputs) == qkv
    assert kept - saved_bytes(model, Policy(attention="offload"), inputs) == attention
    assert saved_bytes(model, Policy(hidden="offload"), inputs) < kept


def test_nothing_is_saved_under_recompute_or_for_none():
    saved = SavedTensors()
    saved.put("a", torch.ones(2), "recompute")
    saved.put("b", None, "keep")

    class Context:
        saved_tensors = ()

        def save_for_backward(self, *tensors):
            self.saved_tensors = tensors

    context = Context()
    saved.close(context)
    assert saved.open(context) == {}


def test_a_workspace_is_reused_and_grows():
    release_workspaces()
    cpu = torch.device("cpu")
    first = workspace("test", (3, 5), torch.float32, cpu)
    again = workspace("test", (7, 2), torch.bfloat16, cpu)  # fewer bytes, another shape and type
    assert again.data_ptr() == first.data_ptr()
    assert again.shape == (7, 2) and again.is_contiguous()
    larger = workspace("test", (4, 5), torch.float32, cpu)
    assert larger.shape == (4, 5)
    assert workspace("test", (3, 5), torch.float32, cpu).data_ptr() == larger.data_ptr()
    assert workspace("other", (3, 5), torch.float32, cpu).data_ptr() != larger.data_ptr()
    release_workspaces()


def test_each_thread_has_workspaces_of_its_own():
    cpu = torch.device("cpu")
    mine, theirs = workspace("test", (8,), torch.float32, cpu), []
    thread = threading.Thread(
        target=lambda: theirs.append(workspace("test", (8,), torch.float32, cpu))
    )
    thread.start()
    thread.join()
    assert theirs[0].data_ptr() != mine.data_ptr()
    release_workspaces()


def test_a_second_step_allocates_no_new_workspace():
    model, inputs = adapted(build("llama2")), batch()
    release_workspaces()
    with_policy(model, Policy(), inputs)
    before = {name: buffer.data_ptr() for name, buffer in vars(memory._workspaces).items()}
    gradients(model, inputs)
    assert before == {name: buffer.data_ptr() for name, buffer in vars(memory._workspaces).items()}
    assert before


def test_passes_that_overlap_do_not_share_what_they_saved():
    model, batches = adapted(build("qwen3")), (packed_batch((9, 4)), batch())
    policy = Policy(qkv="recompute")
    alone = [with_policy(model, policy, inputs)[1] for inputs in batches]
    losses = [model(**inputs, use_cache=False).loss for inputs in batches]
    for loss, expected in zip(losses, alone, strict=True):
        model.zero_grad()
        loss.backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert all(torch.equal(found[name], grad) for name, grad in expected.items())


class Sine(torch.autograd.Function):
    """A half in small: saves its input by policy."""

    @staticmethod
    def forward(ctx, x, policy="offload"):
        saved = SavedTensors()
        saved.put("x", x, policy)
        saved.close(ctx)
        ctx.saved = saved
        return torch.cat([x.sin(), x.new_zeros(1)])  # grows, so that logs tell halves by their size

    @staticmethod
    def backward(ctx, dy):
        return dy[:-1] * ctx.saved.open(ctx)["x"].cos(), None


def chain(x, policies):
    outputs = [x]
    for policy in policies:
        outputs.append(Sine.apply(outputs[-1], policy))
    return outputs


def attached(model, policy=ALL):
    swap.attach(model, EngineSettings(check="off", policies=policy))
    return model


def kept_gradients(model, inputs):
    return gradients(attached(model, Policy()), inputs)[1]


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert not [name for name, grad in found.items() if not torch.equal(grad, expected[name])]


def test_a_training_pass_leaves_no_scratch_file(scratch):
    gradients(attached(build("llama2")), batch())
    assert offload_bytes().held_bytes
    assert os.listdir(scratch) == []


def test_later_steps_make_no_new_buffer(either, made):
    model, inputs = attached(adapted(build("llama2"))), batch()
    gradients(model, inputs)
    first = list(made)
    assert len(first) > 1
    for _ in range(3):
        gradients(model, inputs)
    assert made == first


def test_passes_of_other_lengths_reuse_the_buffers_of_the_longest(either, made):
    model = attached(adapted(build("llama2")))
    gradients(model, packed_batch((9, 8, 9)))
    first = list(made)
    for lengths in ((1,), (12, 13), (24,), (3, 3), (11, 14), (20, 6)):
        gradients(model, packed_batch(lengths))
    assert made == first


def test_a_loss_that_is_held_holds_no_buffer_after_its_backward_pass(either):
    model = attached(build("llama2"))
    loss = model.train()(**batch(), use_cache=False).loss
    assert offload_bytes().used_bytes
    loss.backward()
    assert not offload_bytes().used_bytes


def test_a_pass_without_backward_gives_its_buffers_back(either):
    model = attached(build("llama2"))
    loss = model.train()(**batch(), use_cache=False).loss
    assert offload_bytes().used_bytes
    del loss
    gc.collect()
    assert not offload_bytes().used_bytes


@pytest.mark.parametrize("where", ["varlen_forward", "varlen_backward"])
def test_a_pass_that_fails_gives_its_buffers_back(where, either, monkeypatch):
    model, inputs = attached(build("llama2", num_hidden_layers=3)), batch()
    expected = gradients(model, inputs)[1]
    calls, original = [], getattr(attention_half, where)

    def fail(*args):
        calls.append(where)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory")
        return original(*args)

    with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
        patched.setattr(attention_half, where, fail)
        gradients(model, inputs)
    gc.collect()
    assert not offload_bytes().used_bytes
    assert_equal(gradients(model, inputs)[1], expected)


@pytest.mark.parametrize("last_first", [True, False])
def test_passes_that_overlap_bring_back_their_own(last_first, either):
    model, batches = adapted(build("qwen3")), [packed_batch((9, 4)), batch(), packed_batch()]
    alone = [kept_gradients(model, inputs) for inputs in batches]
    attached(model)
    passes = [
        (model(**inputs, use_cache=False).loss, expected)
        for inputs, expected in zip(batches, alone, strict=True)
    ]
    for loss, expected in reversed(passes) if last_first else passes:
        model.zero_grad()
        loss.backward()
        assert_equal(
            {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected
        )
    assert not offload_bytes().used_bytes


def test_layers_of_any_policy_bring_back_their_own(lazy):
    model, inputs = adapted(build("gemma2", num_hidden_layers=5)), batch()
    expected = kept_gradients(model, inputs)
    policies = [ALL, Policy(), Policy(qkv="offload"), Policy(gate_up="recompute"), ALL]
    for turn in range(5):
        attached(model, tuple(policies[turn:] + policies[:turn]))
        assert_equal(gradients(model, inputs)[1], expected)
    assert not offload_bytes().used_bytes


def test_a_retained_graph_brings_its_tensors_back_again(either):
    model, inputs = build("llama2"), batch()
    expected = kept_gradients(model, inputs)
    loss = attached(model)(**inputs, use_cache=False).loss
    for retain in (True, True, False):
        model.zero_grad()
        loss.backward(retain_graph=retain)
        assert bool(offload_bytes().used_bytes) is retain
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert_equal(found, expected)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_while_a_half_is_in_use_the_one_before_it_comes_back(lazy):
    *_, y = chain(torch.ones(1, requires_grad=True), ["offload"] * 4)
    # A tensor is let go of when the next half has done its work, not before.
    assert lazy.log == [
        ("send", 1),
        ("send", 2), ("let go", 1),
        ("send", 3), ("let go", 2),
        ("send", 4), ("let go", 3),
    ]  # fmt: skip
    lazy.log.clear()
    y.sum().backward()
    # The last one never left.
    assert lazy.log == [
        ("land", 4), ("bring", 3),
        ("land", 3), ("bring", 2),
        ("land", 2), ("bring", 1),
        ("land", 1),
    ]  # fmt: skip


def test_a_half_that_keeps_everything_lets_the_one_before_it_go_and_is_stepped_over(lazy):
    policies = ["offload", "keep", "offload", "keep", "keep"]
    *_, y = chain(torch.ones(1, requires_grad=True), policies)
    assert lazy.log == [("send", 1), ("let go", 1), ("send", 3), ("let go", 3)]
    lazy.log.clear()
    y.sum().backward()
    assert lazy.log == [("bring", 3), ("land", 3), ("bring", 1), ("land", 1)]


def test_a_tensor_on_its_way_that_nobody_opens_is_freed(lazy):
    x = torch.ones(1, requires_grad=True)
    outputs = chain(x, ["offload"] * 3)
    torch.autograd.grad(outputs[3].sum(), outputs[2])
    assert lazy.log[-1] == ("bring", 2) and lazy.flying
    del outputs
    gc.collect()
    assert not lazy.flying and lazy.log[-1] == ("abandon", 2)
    assert not offload_bytes().used_bytes


def test_more_halves_may_be_on_their_way(lazy, monkeypatch):
    monkeypatch.setattr(memory, "PREFETCH_HALVES", 2)
    x = torch.ones(1, requires_grad=True)
    *_, y = chain(x, ["offload"] * 4)
    lazy.log.clear()
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert [one for one in lazy.log if one[0] == "bring"] == [
        ("bring", 3),
        ("bring", 2),
        ("bring", 1),
    ]
    *_, kept = chain(x, ["keep"] * 4)
    assert torch.equal(grad, torch.autograd.grad(kept.sum(), x)[0])
