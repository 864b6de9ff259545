"""Policies change where saved tensors stay, never a gradient; workspaces are few and reused."""

import os
import tempfile
import threading

import pytest
import torch

from tests.engine.families import adapted, batch, build, gradients, in_nf4, packed_batch
from whet.engine import swap
from whet.engine.memory import Policy, SavedTensors, offload, release_workspaces, workspace
from whet.engine.swap import EngineSettings

POLICIES = {
    "hidden offloaded": Policy(hidden="offload"),
    "qkv offloaded": Policy(qkv="offload"),
    "qkv recomputed": Policy(qkv="recompute"),
    "attention offloaded": Policy(attention="offload"),
    "gate_up offloaded": Policy(gate_up="offload"),
    "gate_up recomputed": Policy(gate_up="recompute"),
    "all offloaded": Policy("offload", "offload", "offload", "offload"),
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
    monkeypatch.setattr("whet.engine.layer.CPU_BLOCK", 8)
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


def test_an_offloaded_tensor_comes_back_and_its_file_has_no_name(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    torch.manual_seed(0)
    tensors = [
        torch.randn(7, 5),
        torch.randn(7, 5, dtype=torch.bfloat16).t(),  # not contiguous
        torch.arange(3),
        torch.tensor(2.5),
        torch.empty(0, 4),
    ]
    away = [offload(tensor) for tensor in tensors]
    assert os.listdir(tmp_path) == []
    for tensor, offloaded in zip(tensors, away, strict=True):
        back = offloaded.fetch()
        assert back.dtype == tensor.dtype and torch.equal(back, tensor)
        assert not tensor.numel() or back.data_ptr() != tensor.data_ptr()


def test_a_training_pass_leaves_no_scratch_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with_policy(build("llama2"), POLICIES["all offloaded"], batch())
    assert os.listdir(tmp_path) == []


def test_an_offloaded_tensor_is_a_copy_that_later_writes_do_not_reach():
    tensor = torch.ones(4)
    away = offload(tensor)
    tensor.zero_()
    assert torch.equal(away.fetch(), torch.ones(4))


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
    from whet.engine import memory

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
