"""A run whose passes are recorded learns what a run without graphs learns."""

from types import SimpleNamespace

import pytest
import torch
from tests.engine.test_graphs import Recorder

from whet.config_file import load_config
from whet.engine.graphs import GraphedPasses
from whet.engine.passes import PackedPass
from whet.plan.speed import Speed
from whet.train import planning, recipe
from whet.train.listen import LogListener
from whet.train.world import World


class Heard(LogListener):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def short(config):
    return load_config(config, [
        "lora.dropout=0", "train.batch_size=3", "plan.tokens_per_pass=40", "data.heldout_fraction=0",
        "train.max_steps=8", "plan.probe=off",
    ])  # fmt: skip


@pytest.fixture
def recorder(monkeypatch):
    """Have every run record its passes, as if the CPU could.

    Attention on the CPU goes by the lengths that the host knows, so they must be those of the recording.
    """
    made = Recorder()

    def graphs(config, model, plan, packs, listener, world):
        return GraphedPasses(model, made, listener.note)

    monkeypatch.setattr(recipe, "choose_graphs", graphs)
    monkeypatch.setattr(PackedPass, "key", property(lambda self: (self.lengths, self.num_rows)))
    return made


def rows_of(run):
    return [(row["loss"], row["grad_norm"]) for row in run.metrics() if "loss" in row]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_recorded_run_has_the_losses_and_norms_of_an_eager_one(short, method, request):
    short = load_config(short, [f"train.parameters={method}", "train.learning_rate=1e-3"])
    eager = rows_of(recipe.fit(short, listener=Heard()))
    recorder = request.getfixturevalue("recorder")
    graphed = rows_of(recipe.fit(load_config(short, ["run.name=graphed"]), listener=Heard()))
    assert recorder.log.count("replay") >= recorder.log.count("record") > 0
    assert len(graphed) == len(eager) == 8
    for ours, theirs in zip(graphed, eager, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)  # rows of zeros are rounded into the sums


def test_memory_that_runs_out_clears_the_graphs(short, recorder):
    failures, record = [torch.OutOfMemoryError("CUDA out of memory")], recorder.record

    def record_with_a_failure(work):
        replay = record(work)

        def replay_or_fail():
            if failures:
                recorder.log.append("out of memory")
                raise failures.pop()
            replay()

        return replay_or_fail

    recorder.record = record_with_a_failure
    heard = Heard()
    run = recipe.fit(short, listener=heard)
    after = recorder.log[recorder.log.index("out of memory") + 1 :]
    assert after[0] == "release" and after.index("warm up") < after.index("replay")
    assert any("memory ran out" in note for note in heard.notes)
    assert len(rows_of(run)) == 8


def test_graphs_that_are_wished_for_on_the_cpu_are_told_once(short):
    heard = Heard()
    recipe.fit(load_config(short, ["engine.cuda_graphs='on'", "train.max_steps=2"]), listener=heard)
    assert heard.notes.count("no CUDA graphs: there is no CUDA device") == 1


@pytest.mark.parametrize("wish", ["auto", "off"])
def test_nobody_hears_of_graphs_that_were_not_wished_for(short, wish):
    heard = Heard()
    made = recipe.choose_graphs(
        load_config(short, [f"engine.cuda_graphs='{wish}'"]), None, None, True, heard, World()
    )  # type: ignore[arg-type]
    assert made is None and not heard.notes


def test_small_layers_wait_for_launches_and_large_ones_do_not():
    speed = Speed("a card", 300e12, 2e12, 12e9, 0.5, measured=False)

    def plan(layer_flops):
        return SimpleNamespace(
            choice=SimpleNamespace(tokens_per_pass=1024, policies=[None] * 30),
            workload=SimpleNamespace(lengths=(100, 300)),
            target=SimpleNamespace(speed=speed),
            flops_of=lambda lengths, labels: (30 * layer_flops * sum(lengths), 0),
        )

    assert planning._waits_for_launches(plan(4 * 3.5e6))  # 135M parameters, an adapter
    assert not planning._waits_for_launches(plan(4 * 200e6))  # 8B
