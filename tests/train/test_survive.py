"""Memory that runs out at any point of a step changes the passes, and nothing that is learned."""

import pytest
import torch

from whet.config_file import load_config
from whet.errors import WhetError
from whet.runs import RunFolder
from whet.train import survive, trainer
from whet.train.listen import LogListener
from whet.train.recipe import fit


class Heard(LogListener):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def losses(run):
    return [row["loss"] for row in run.metrics() if "loss" in row]


def events(run):
    return [row for row in run.metrics() if row.get("event") == "out_of_memory"]


@pytest.fixture
def plain(config):
    return load_config(
        config,
        ["lora.dropout=0", "train.max_steps=6", "data.heldout_fraction=0", "plan.probe=off"],
    )


def out_of_memory(kind):
    if kind == "cuda":
        return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    if kind == "cpu":
        return RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
            "you tried to allocate 99 bytes. Error code 12 (Cannot allocate memory)"
        )
    return MemoryError()


def inject(monkeypatch, phase, calls, kind="cuda"):
    """Have the n-th forward or backward pass fail, at its end, when its work is done and held."""
    seen = {"forward": 0, "backward": 0}

    def failing(name, original):
        def run(*args, **kwargs):
            seen[name] += 1
            held = original(*args, **kwargs)
            if name == phase and seen[name] in calls:
                raise out_of_memory(kind)
            return held

        return run

    step = trainer.WhetTrainer
    monkeypatch.setattr(step, "compute_loss", failing("forward", step.compute_loss))
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "backward", failing("backward", Accelerator.backward))


@pytest.mark.parametrize("kind", ["cuda", "cpu", "python"])
@pytest.mark.parametrize(("phase", "call"), [("forward", 1), ("forward", 3), ("backward", 2)])
def test_a_pass_that_runs_out_of_memory_is_run_again_smaller(plain, monkeypatch, phase, call, kind):
    whole = fit(load_config(plain, ["run.name=whole"]), listener=Heard())
    inject(monkeypatch, phase, {call}, kind)
    heard = Heard()
    run = fit(plain, listener=heard)
    assert losses(run) == pytest.approx(losses(whole), abs=1e-5)
    assert losses(run)[-1] == pytest.approx(losses(whole)[-1], abs=1e-5)
    (event,) = events(run)
    assert event["phase"] == phase and event["step"] == call
    assert event["tokens_per_pass"] <= whole.report["plan"]["tokens_per_pass"] // 2
    assert any("memory ran out in step" in note for note in heard.notes)
    assert run.report["training"] == whole.report["training"]


def test_a_later_pass_of_a_step_starts_the_step_anew(plain, monkeypatch):
    """Gradients of the passes before the failed one must not count twice."""
    cut = load_config(plain, ["plan.tokens_per_pass=70"])
    whole = fit(load_config(cut, ["run.name=whole"]), listener=Heard())
    inject(monkeypatch, "backward", {2})
    run = fit(cut, listener=Heard())
    assert events(run)[0]["pass"] == 2
    assert losses(run) == pytest.approx(losses(whole), abs=1e-5)


def test_a_step_that_fails_again_and_again_goes_down_to_single_examples(plain, monkeypatch):
    plain = load_config(plain, ["train.batch_size=16", "train.max_steps=2"])
    whole = fit(load_config(plain, ["run.name=whole"]), listener=Heard())
    inject(monkeypatch, "forward", {1, 2})
    run = fit(plain, listener=Heard())
    sizes = [event["tokens_per_pass"] for event in events(run)]
    assert len(sizes) == 2 and sizes[1] <= sizes[0] // 2
    assert losses(run) == pytest.approx(losses(whole), abs=1e-5)


def test_the_order_and_the_dropout_of_later_steps_are_what_they_were(config, monkeypatch):
    """The random state is put back: dropout draws the same numbers for a pass of the same shape."""
    settings = ["plan.tokens_per_pass=1", "train.max_steps=5", "data.heldout_fraction=0",
                "plan.probe=off"]  # fmt: skip
    config = load_config(config, settings)  # with dropout; an example a pass, so shapes stay
    whole = fit(load_config(config, ["run.name=whole"]), listener=Heard())
    inject(monkeypatch, "forward", {3})
    run = fit(config, listener=Heard())
    assert events(run)[0]["policy"]
    assert losses(run) == losses(whole)


def test_one_example_that_does_not_fit_ends_the_run_and_is_named(plain, monkeypatch):
    inject(monkeypatch, "forward", set(range(1, 100)))
    with pytest.raises(WhetError, match=r"one example alone .*rows\.jsonl:\d+") as told:
        fit(plain, listener=Heard())
    assert "model.max_length" in str(told.value) and "--resume" in str(told.value)
    run = RunFolder(plain.run.dir + "/tiny")
    assert len(events(run)) >= 2 and run.weights_dir is None


def test_other_errors_are_not_taken_for_it(plain, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(trainer.WhetTrainer, "compute_loss", broken)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        fit(plain, listener=Heard())


def test_a_resumed_run_goes_on_with_the_passes_it_had_come_to(plain, monkeypatch):
    settings = ["train.checkpoint_steps=3", "train.max_steps=8", "train.schedule=constant"]
    plain = load_config(plain, settings)
    with monkeypatch.context() as patch:
        inject(patch, "forward", {2})
        whole = fit(load_config(plain, ["run.name=whole"]), listener=Heard())
    with monkeypatch.context() as patch:
        inject(patch, "forward", {2})
        fit(load_config(plain, ["train.max_steps=3"]), listener=Heard())
    resumed = fit(plain, resume=True, listener=Heard())
    assert losses(resumed) == losses(whole)


def test_the_probe_that_runs_out_of_memory_makes_the_passes_smaller(plain, monkeypatch):
    probed = load_config(plain, ["plan.probe=on"])
    whole = fit(load_config(plain, ["run.name=whole"]), listener=Heard())
    inject(monkeypatch, "backward", {1})
    run = fit(probed, listener=Heard())
    assert len(events(run)) == 1
    assert losses(run) == pytest.approx(losses(whole), abs=1e-5)


def test_an_optimizer_that_steps_in_the_backward_pass_has_one_pass_and_no_second_try():
    survive.check_one_pass(1)
    with pytest.raises(WhetError, match="2 passes; lower train.batch_size"):
        survive.check_one_pass(2)
    with pytest.raises(WhetError, match="out of memory"):
        survive.check_one_pass(1, "CUDA out of memory")


class Moments(torch.optim.SGD):
    """Fails at given steps, before it writes or after."""

    fail_at, written = set(), False

    def step(self, closure=None):
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps in self.fail_at:
            if self.written:
                self.param_groups[0]["params"][0].data.add_(1)
                torch.autograd.graph.increment_version(self.param_groups[0]["params"][0])
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().step(closure)


def test_an_optimizer_that_has_not_written_yet_steps_again():
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer, told = Moments([weight], lr=0.5), []
    optimizer.fail_at = {1, 2}
    survive.step_again_when_out_of_memory_(optimizer, told.append)
    optimizer.step()
    assert torch.equal(weight.data, torch.full((3,), 0.5)) and len(told) == 2


def test_an_optimizer_that_has_written_is_not_trusted_again():
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer = Moments([weight], lr=0.5)
    optimizer.fail_at, optimizer.written = {1}, True
    survive.step_again_when_out_of_memory_(optimizer, lambda text: None)
    with pytest.raises(WhetError, match="adamw_8bit"):
        optimizer.step()


def test_an_optimizer_that_never_fits_is_given_up_in_a_sentence():
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer = Moments([weight], lr=0.5)
    optimizer.fail_at = set(range(9))
    survive.step_again_when_out_of_memory_(optimizer, lambda text: None)
    with pytest.raises(WhetError, match="optimizer's step"):
        optimizer.step()
