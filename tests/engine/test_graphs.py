"""Recorded passes learn what eager ones learn; what cannot be recorded runs as ever, and says why."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.engine.families import adapted, build, in_float64, judge_norm
from whet.engine import swap
from whet.engine.graphs import CudaRecorder, GraphedPasses, reason_against
from whet.engine.held import HostWeight
from whet.engine.memory import Policy
from whet.engine.passes import pack_pass
from whet.engine.swap import EngineSettings
from whet.model.loss import summed_loss


class Recorder:
    """Plays a CUDA graph on the CPU: a recording does nothing, and a replay does the work again."""

    most_bytes = 100

    def __init__(self):
        self.log, self.num_bytes, self.failure = [], 0, None

    def warm_up(self, work):
        self.log.append("warm up")
        work()

    def record(self, work):
        self.log.append("record")
        if self.failure:
            raise self.failure

        def replay():
            self.log.append("replay")
            work()

        return replay

    def release(self):
        self.log.append("release")


def pass_of(seed, lengths=(5, 1, 11), padding=7):
    """A pass of one shape for each choice of lengths, with other tokens for each seed."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(1, 301, (n,), generator=generator).tolist() for n in lengths]
    return pack_pass([(i, i) for i in ids], 0, padding).rounded()


def learner(model):
    def learn(batch, num_items):
        loss = summed_loss(model, batch)[0] / num_items
        loss.backward()
        return loss.detach()

    return learn


def with_engine(method="lora", family="llama3", **more):
    model = build(family, **more)
    model = adapted(model) if method == "lora" else model
    swap.attach(model)
    return model.train()


def graphed(model, **more):
    reasons = []
    return GraphedPasses(model, Recorder(), reasons.append, **more), reasons


def run_step(model, batches, num_items, graphs=None, device="cpu"):
    """One optimizer step's loss and gradients."""
    num_items = torch.tensor(num_items, device=device)
    learn, losses = learner(model), []
    if graphs is not None:
        graphs.begin_step()
    for batch in batches:
        loss = None if graphs is None else graphs.run(batch, num_items, learn)
        losses.append(learn(batch, num_items) if loss is None else loss)
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return torch.stack(losses), grads


def train(model, graphs, device="cpu"):
    """Three steps of two shapes, three passes each; every step divides by another number."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for step in range(3):
        batches = [
            pass_of(10 * step + number, lengths).to(torch.device(device))
            for number, lengths in enumerate([(5, 1, 11), (14, 9), (5, 1, 11)])
        ]
        found.append(run_step(model, batches, 40 + step, graphs, device))
        optimizer.step()
        model.zero_grad()
    return found


@pytest.mark.parametrize("method", ["lora", "full"])
def test_replayed_steps_are_eager_steps(method):
    model = with_engine(method)
    eager = train(copy.deepcopy(model), None)
    graphs, reasons = graphed(model)
    ours = train(model, graphs)
    assert not reasons and not graphs.reason
    # Each step has three passes of two shapes: each shape is warmed up, recorded, and replayed.
    log = [word for word in graphs.recorder.log if word != "release"]
    assert log.count("warm up") == 2 and log.count("record") == 2 and log.count("replay") == 7
    for (losses, grads), (expected, originals) in zip(ours, eager, strict=True):
        assert torch.equal(losses, expected)
        assert grads.keys() == originals.keys()
        assert all(torch.equal(grads[name], grad) for name, grad in originals.items())


def test_gradients_stay_in_place_from_step_to_step():
    model = with_engine()
    graphs, _ = graphed(model)
    run_step(model, [pass_of(0)], 9, graphs)
    where = {n: p.grad.data_ptr() for n, p in model.named_parameters() if p.grad is not None}
    assert len(where) == sum(p.requires_grad for p in model.parameters())
    for to_none in (True, False):
        model.zero_grad(set_to_none=to_none)
        graphs.begin_step()
        for name, parameter in model.named_parameters():
            if name in where:
                assert parameter.grad.data_ptr() == where[name] and not parameter.grad.any()


def test_gradients_that_are_there_are_added_to():
    model = with_engine()
    graphs, _ = graphed(model)
    for seed in range(2):
        run_step(model, [pass_of(seed)], 9, graphs)
        model.zero_grad()
    _, alone = run_step(model, [pass_of(3)], 9, graphs)
    _, twice = run_step(model, [pass_of(3)], 9, graphs)
    assert all(torch.equal(twice[name], 2 * grad) for name, grad in alone.items())
    for parameter in model.parameters():  # somebody put others there
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    _, more = run_step(model, [pass_of(3)], 9, graphs)
    for name, grad in alone.items():
        assert torch.allclose(more[name], 1 + grad, rtol=1e-6, atol=0)


def test_a_parameter_without_a_gradient_keeps_none():
    model = with_engine()
    model.unused = nn.Parameter(torch.ones(3))
    graphs, _ = graphed(model)
    for seed in range(3):
        run_step(model, [pass_of(seed)], 9, graphs)
        assert model.unused.grad is None
        model.zero_grad()
    assert graphs.recorder.log[-1] == "replay"


def test_the_graph_unused_for_longest_is_dropped():
    model = with_engine()
    graphs, _ = graphed(model, most_graphs=2)
    shapes = [pass_of(0, lengths) for lengths in ((5, 1, 11), (14, 9), (30, 2))]
    a, b, c = shapes
    assert len({batch.key for batch in shapes}) == 3
    run_step(model, [a, b, c, a, b, a, c], 9, graphs)  # c takes the place of b
    graphs.recorder.log.clear()
    run_step(model, [a, c], 9, graphs)
    assert graphs.recorder.log == ["replay"] * 2
    run_step(model, [b], 9, graphs)
    assert graphs.recorder.log == ["replay"] * 2 + ["record", "replay"]


def test_other_policies_and_other_adapters_void_the_graphs():
    model = with_engine()
    graphs, reasons = graphed(model)
    run_step(model, [pass_of(0), pass_of(1)], 9, graphs)
    graphs.recorder.log.clear()
    swap.set_policies(model, [Policy(gate_up="recompute")] * 2)
    run_step(model, [pass_of(2)], 9, graphs)
    assert graphs.recorder.log == ["release", "warm up"]
    run_step(model, [pass_of(3)], 9, graphs)
    for parameter in [p for n, p in model.named_parameters() if "lora_A" in n]:
        parameter.requires_grad_(False)
    graphs.recorder.log.clear()
    run_step(model, [pass_of(4)], 9, graphs)
    assert graphs.recorder.log == ["release", "warm up"]
    swap.set_policies(model, [Policy(hidden="offload")] * 2)
    run_step(model, [pass_of(5)], 9, graphs)
    assert graphs.recorder.log[-1] == "release"
    assert reasons == ["saved tensors go to host memory (plan.policy)"]
    swap.set_policies(model, [Policy()] * 2)
    run_step(model, [pass_of(6)], 9, graphs)
    assert graphs.recorder.log[-1] == "warm up" and not graphs.reason


@pytest.mark.parametrize("failure", [
    torch.OutOfMemoryError("CUDA out of memory.\nTried"), RuntimeError("operation not permitted"),
])  # fmt: skip
def test_a_recording_that_fails_leaves_eager_passes(failure):
    model = with_engine()
    expected = run_step(copy.deepcopy(model), [pass_of(n) for n in range(4)], 9)
    graphs, reasons = graphed(model)
    graphs.recorder.failure = failure
    losses, grads = run_step(model, [pass_of(n) for n in range(4)], 9, graphs)
    assert torch.equal(losses, expected[0])
    assert all(torch.equal(grads[name], grad) for name, grad in expected[1].items())
    assert reasons == [f"a pass could not be recorded: {str(failure).splitlines()[0]}"]
    assert graphs.reason == reasons[0] and not graphs.begin_step()
    assert graphs.recorder.log == ["release", "warm up", "record", "release"]


def test_graphs_that_hold_too_much_are_dropped():
    model = with_engine()
    graphs, reasons = graphed(model)
    graphs.recorder.num_bytes = 101
    run_step(model, [pass_of(n) for n in range(3)], 9, graphs)
    assert len(reasons) == 1 and "recorded passes hold" in reasons[0]
    assert graphs.recorder.log[-1] == "release"


def test_cleared_graphs_are_recorded_again_and_the_step_goes_on():
    model = with_engine()
    expected = run_step(copy.deepcopy(model), [pass_of(n) for n in range(6)], 9)
    graphs, learn, losses = graphed(model)[0], learner(model), []
    graphs.begin_step()
    for number in range(6):
        if number == 3:
            graphs.clear()
        losses.append(graphs.run(pass_of(number), torch.tensor(9), learn))
    assert torch.equal(torch.stack(losses), expected[0])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, expected[1][name])
    log = [word for word in graphs.recorder.log if word != "release"]
    once = ["warm up", "record", "replay", "replay"]  # recorded, it is replayed at once
    assert log == 2 * once


def offloaded(model):
    swap.set_policies(model, [Policy(qkv="offload")] * 2)


def watched(model):
    next(p for p in model.parameters() if p.requires_grad).register_hook(lambda grad: None)


def on_the_host(model):
    held = HostWeight(torch.zeros(2, 2))
    model.get_input_embeddings().held = held


def halved(model):
    next(p for n, p in model.named_parameters() if "embed" in n).data = torch.zeros(
        301, 64, dtype=torch.float16
    )


@pytest.mark.parametrize("change, words", [
    (offloaded, "plan.policy"), (watched, "takes gradients"), (on_the_host, "plan.embeddings"),
    (halved, "loss scale"), (swap.detach, "not in the model"),
])  # fmt: skip
def test_what_cannot_be_recorded_says_why(change, words):
    model = with_engine()
    assert reason_against(model) == ""
    change(model)
    assert words in reason_against(model)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_layers_with_their_own_code_are_not_recorded(family):
    assert "not fused" in reason_against(with_engine("full", family))


def test_dropout_is_not_recorded():
    model = adapted(build("llama3"), lora_dropout=0.1)
    swap.attach(model)
    assert "dropout" in reason_against(model)


def test_debugging_is_not_recorded():
    model = build("llama3")
    swap.attach(model, EngineSettings(debug=True))
    assert "engine.debug" in reason_against(model)


def test_what_falls_back_in_the_first_pass_is_not_recorded():
    model = with_engine()
    graphs, reasons = graphed(model)
    graphs.begin_step()
    # Seen only when a layer runs: its body got a hook.
    swap.base_of(model).model.layers[1].mlp.register_forward_hook(lambda *_: None)
    for seed in range(3):
        assert (graphs.run(pass_of(seed), torch.tensor(9), learner(model)) is None) == (seed > 0)
    assert len(reasons) == 1 and "not fused while training" in reasons[0]


def cuda_model(method):
    model = build("llama3", torch.bfloat16, num_hidden_layers=4)
    model = adapted(model) if method == "lora" else model
    return model.cuda().train()


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_replay_on_cuda_is_the_eager_pass(method):
    model = cuda_model(method)
    truth_model = in_float64(model.cpu())
    model.cuda()
    for one in (model, truth_model):
        swap.attach(one, EngineSettings(check="off"))
    truth = train(truth_model.train(), None)
    eager = train(copy.deepcopy(model), None, "cuda")
    reasons = []
    graphs = GraphedPasses(model, CudaRecorder(torch.device("cuda")), reasons.append)
    ours = train(model, graphs, "cuda")
    assert not reasons and len(graphs._graphs) == 2
    assert 0 < graphs.recorder.num_bytes < graphs.recorder.most_bytes
    for found, original, exact in zip(ours, eager, truth, strict=True):
        assert judge_norm("loss", found[0].cpu(), original[0].cpu(), exact[0]).passed
        assert found[1].keys() == original[1].keys()
        for name, grad in found[1].items():
            sides = (grad.cpu(), original[1][name].cpu(), exact[1][name])
            assert judge_norm(name, *sides).passed, name


@pytest.mark.gpu
def test_a_replay_on_cuda_takes_documents_of_other_lengths():
    model = cuda_model("lora")
    swap.attach(model)
    device = torch.device("cuda")
    first, other = pass_of(0, (5, 1, 11)).to(device), pass_of(1, (4, 3, 10), 7).to(device)
    assert first.key == other.key and first.lengths != other.lengths
    graphs = GraphedPasses(model, CudaRecorder(device))
    run_step(model, [first] * 3, 20, graphs, "cuda")
    model.zero_grad()
    losses, grads = run_step(model, [other], 20, graphs, "cuda")
    model.zero_grad()
    expected, originals = run_step(model, [other], 20, None, "cuda")
    assert torch.allclose(losses, expected, rtol=2**-8, atol=0)
    for name, grad in originals.items():
        assert (grads[name] - grad).norm() <= 2**-6 * grad.norm(), name


@pytest.mark.gpu
def test_the_host_waits_for_nothing_in_a_pass_on_cuda():
    model = cuda_model("lora")
    swap.attach(model)
    batch = pass_of(0).to(torch.device("cuda"))
    num_items, learn = torch.tensor(9, device="cuda"), learner(model)
    learn(batch, num_items)  # compiles kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        learn(replace(batch), num_items)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_recording_that_fails_on_cuda_leaves_the_stream_and_eager_passes():
    model = cuda_model("lora")
    swap.attach(model)
    reasons, device = [], torch.device("cuda")
    graphs, learn = GraphedPasses(model, CudaRecorder(device), reasons.append), learner(model)
    stream = torch.cuda.current_stream()

    def looks(batch, num_items):
        loss = learn(batch, num_items)
        loss.item()
        return loss

    graphs.begin_step()
    for seed in range(3):
        batch, num_items = pass_of(seed).to(device), torch.tensor(9, device=device)
        loss = graphs.run(batch, num_items, looks)
        loss = looks(batch, num_items) if loss is None else loss
        assert loss.isfinite()
    assert len(reasons) == 1 and "could not be recorded" in reasons[0]
    assert torch.cuda.current_stream() == stream
