import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.peers import report
from benchmarks.peers.__main__ import is_slower, parse
from benchmarks.peers.examples import write_rows
from benchmarks.peers.job import Job, Workload
from benchmarks.peers.registry import PEERS
from benchmarks.peers.turns import Run, take_turns
from benchmarks.peers.worker import Watch
from benchmarks.peers.workloads import WORKLOADS

WORK = Workload("t", warm=1, rounds=3, batch_size=2, accumulation=1)


def run_of(peer, seconds=1.0, loss=2.0, norm=1.0, steps=4, variant="default", above=100):
    job = Job(peer, variant, {}, WORK, "m", "r", f"/x/{peer}-{variant}", "cpu")
    memory = {"loaded": 10, "above": above}
    step = {"seconds": seconds, "loss": loss, "grad_norm": norm, "entered": 7, "memory": memory}
    return Run(job, [dict(step) for _ in range(steps)], ready_seconds=5.0)


def entries_of(*runs, heldout=None):
    return report.enter(
        WORK, runs, [runs[0]] * len(runs), heldout or {}, [8] * 4, [4e9] * 4, flops=1e10
    )


def test_a_run_that_computes_something_else_is_shown_and_does_not_count():
    found = entries_of(
        run_of("whet", 1.0),
        run_of("hf", 3.0),
        run_of("trl", 0.1, loss=2.03),
        run_of("unsloth", 0.1, norm=0.0),
        run_of("hf", 0.1, variant="whole", steps=2),
    )
    assert [entry.name for entry in found if not entry.invalid] == ["whet default", "hf default"]
    reasons = {entry.name: entry.invalid for entry in found}
    assert "2.0300 at step 1, hf default has 2.0000" in reasons["trl default"]
    assert "gradient norm 0" in reasons["unsloth default"]
    assert "did not finish" in reasons["hf whole"]
    assert "3.00 times as fast as the fastest valid other (transformers" in report.verdict(found)


def test_weights_that_end_elsewhere_do_not_count_either():
    whet, hf = run_of("whet"), run_of("hf")
    heldout = {str(hf.job.trained): 1.5, str(whet.job.trained): 1.52}
    found = entries_of(whet, hf, heldout=heldout)
    assert "held-out loss 1.5200, hf default has 1.5000" in found[0].invalid
    heldout[str(whet.job.trained)] = 1.51
    assert not entries_of(whet, hf, heldout=heldout)[0].invalid


def test_a_difference_under_ten_percent_is_called_equal():
    assert "whet is as fast as" in report.verdict(entries_of(run_of("whet"), run_of("hf", 1.09)))
    assert "1.11 times as fast" in report.verdict(entries_of(run_of("whet"), run_of("hf", 1.11)))
    assert "0.80 times as fast" in report.verdict(entries_of(run_of("whet"), run_of("hf", 0.8)))


def test_a_ratio_is_that_of_the_same_steps():
    """A step of long rows is slow for all; medians of the seconds would compare other steps."""
    whet, hf = run_of("whet"), run_of("hf")
    for number, (a, b) in enumerate([(9, 9), (1, 2), (10, 20), (4, 8)]):
        whet.steps[number]["seconds"], hf.steps[number]["seconds"] = a, b
    entry = entries_of(whet, hf)[1]
    assert entry.ratio == 2.0 and entry.step_seconds == 8.0
    assert entry.first_step_seconds == 5 + 9 and entry.all_steps_seconds == 5 + 39
    assert entry.mfu == pytest.approx(4e9 / 8 / 1e10)


def test_the_tables_and_the_plot_show_every_run(tmp_path):
    runs = [run_of("whet"), run_of("hf", 2.0), replace(run_of("trl", steps=0), failure="boom")]
    found = entries_of(*runs)
    text = report.plain_table(*report.table(found))
    assert len(text.splitlines()) == 4 and "boom" in text
    assert report.markdown_table(*report.table(found)).count("\n") == 4
    result = json.loads(json.dumps(report.to_json(WORK, found, runs)))
    report.plot([result], tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_a_slower_tree_is_told_from_noise():
    entries = [{"invalid": ""}, {"ratio": 0.85}]
    assert is_slower({"entries": entries})
    entries[1]["ratio"] = 0.95
    assert not is_slower({"entries": entries})


def test_every_workload_names_variants_and_peers_that_exist():
    for work in WORKLOADS.values():
        for peer, variants in work.variants.items():
            assert set(variants) <= set(PEERS[peer].variants)
    for peer in PEERS.values():
        assert set(peer.tuned.values()) <= set(peer.variants)
        folder = Path(report.__file__).parent / "requirements"
        assert peer.requirements is None or (folder / f"{peer.requirements}.txt").exists()


@pytest.mark.parametrize(
    "words", [["--peers", "x"], ["--workloads", "x"], ["--rounds", "2"], ["--data", "/no"]]
)
def test_wrong_words_are_refused_before_anything_is_made(words, capsys):
    with pytest.raises(SystemExit):
        parse(words)
    assert "error:" in capsys.readouterr().err


def test_a_framework_that_cannot_start_is_a_line_and_not_the_end(tmp_path):
    job = Job("nothing", "default", {}, WORK, "m", "r", str(tmp_path), "cpu")
    said = []
    found = take_turns([job], [Path(sys.executable)], 1, said.append)
    assert "No module named 'benchmarks.peers.nothing'" in found[0].failure
    assert "nothing default" in said[0]


def test_adapters_of_all_frameworks_start_from_the_same(tiny_model):
    from benchmarks.peers import hf

    started = []
    for seed in (1, 2):  # whatever drew the adapter first
        torch.manual_seed(seed)
        job = Job(
            "hf", "default", {}, replace(WORK, dtype="float32"), str(tiny_model), "", "", "cpu"
        )
        model = hf.load(job)
        watch = Watch(job, sys.stdout, 0.0)
        watch.start_from_the_same(model)
        started.append({n: p.clone() for n, p in model.named_parameters() if "lora_" in n})
        model(input_ids=torch.zeros((2, 5), dtype=torch.long))
        assert watch.entered == 10
    assert all(torch.equal(p, started[1][name]) for name, p in started[0].items())
    assert all(bool(p.any()) == ("lora_A" in name) for name, p in started[0].items())


def test_rows_that_are_all_too_long_are_told(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="no row of 'alpaca' has at most 3 tokens"):
        write_rows(replace(WORK, length=3, heldout=1), str(tiny_model), None, tmp_path)


@pytest.mark.slow
def test_whet_and_transformers_do_the_same_work_in_turns(tiny_model, tmp_path):
    work = replace(
        WORK, model=str(tiny_model), dtype="float32", length=256, heldout=4, data="alpaca"
    )
    rows, heldout = write_rows(work, str(tiny_model), None, tmp_path)
    jobs = [
        Job(peer, "default", {}, work, str(tiny_model), str(rows), str(tmp_path / peer), "cpu")
        for peer in ("whet", "hf")
    ]
    runs = take_turns(jobs, [Path(sys.executable)] * 2, 1, lambda line: None)
    assert [run.failure for run in runs] == ["", ""]
    for own, other in zip(runs[0].steps, runs[1].steps, strict=True):
        assert own["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert own["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-2)
        assert own["entered"] <= other["entered"]
    assert all(run.job.trained.is_dir() and run.versions["torch"] for run in runs)

    from benchmarks.peers.evaluate import load, loss_of
    from peft import PeftModel

    lines = [json.loads(line) for line in heldout.read_text().splitlines()]
    losses = [
        loss_of(
            PeftModel.from_pretrained(load(str(tiny_model), False, "cpu"), str(r.job.trained)),
            lines,
        )
        for r in runs
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
