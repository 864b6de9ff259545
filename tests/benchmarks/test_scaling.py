"""The benchmarks of scaling and of quality: what they conclude, and that they run in small."""

import json
from types import SimpleNamespace

import pytest
from benchmarks.peers.turns import Run

from benchmarks import quality, scaling

SIZES = (256, 512, 1024, 2048, 4096, 8192, 16384)


@pytest.mark.parametrize("power", [0.5, 1.0, 1.3, 2.0])
def test_the_exponent_of_a_power_is_that_power(power):
    costs = [3e-4 * size**power for size in SIZES]
    assert scaling.fit_exponent(SIZES, costs) == pytest.approx(power, rel=1e-9)


def test_what_a_small_pass_costs_by_itself_does_not_hide_the_exponent():
    costs = [1e-3 * size for size in SIZES]
    costs[:3] = [1.0, 1.0, 1.0]
    assert scaling.fit_exponent(SIZES, costs) == pytest.approx(1, rel=1e-9)


def test_two_sizes_are_enough_for_an_exponent():
    assert scaling.fit_exponent((10, 100), (2.0, 20.0)) == pytest.approx(1, rel=1e-9)


def test_costs_are_split_into_their_linear_and_their_square_part():
    a, b, error = scaling.split_square(SIZES, [3e-3 * n + 4e-7 * n**2 for n in SIZES])
    assert (a, b) == (pytest.approx(3e-3, rel=1e-6), pytest.approx(4e-7, rel=1e-6))
    assert error < 1e-9


@pytest.mark.parametrize(("power", "expected"), [(0.9, (True, False)), (2.1, (False, True))])
def test_no_part_of_a_split_is_below_zero(power, expected):
    a, b, _ = scaling.split_square(SIZES, [1e-3 * n**power for n in SIZES])
    assert (a > 0, b > 0) == expected


def test_worse_than_linear_is_said():
    points = [scaling.Point(size, [1e-6 * size**1.2]) for size in SIZES]
    found = scaling.conclude("tokens", points)
    assert not found["linear"]
    assert "WORSE than linear" in found["sentence"]
    fine = scaling.conclude("tokens", [scaling.Point(size, [1e-3 * size]) for size in SIZES])
    assert "1.00: linear or better" in fine["sentence"]


def test_a_cube_is_not_taken_for_attention():
    points = [scaling.Point(size, [1e-3 * size + 1e-12 * size**3.5]) for size in SIZES]
    assert "THE REST IS NOT LINEAR" in scaling.conclude("length", points)["sentence"]


def test_the_parts_with_a_model_run_in_small(tiny_model, tmp_path):
    assert scaling.main(
        ["--parts", "length", "--most", "512", "--rounds", "1",
         "--model", str(tiny_model), "--out", str(tmp_path / "small")]
    ) in (0, 1)  # fmt: skip
    found = json.loads((tmp_path / "small.json").read_text())["parts"]
    assert [p["size"] for p in found["length"]["points"]] == [256, 512]
    assert all(p["seconds"] and p["notes"]["loss"] > 0 for p in found["length"]["points"])
    assert "## length" in (tmp_path / "small.md").read_text()
    assert (tmp_path / "small.png").stat().st_size


@pytest.mark.parametrize(
    ("name", "sizes"), [("tokens", (32, 64)), ("rank", (4, 8)), ("batch", (1, 9))]
)
def test_the_other_parts_run_in_small(tiny_model, name, sizes):
    arguments = SimpleNamespace(model=str(tiny_model), rounds=1, allowance=9)
    points = list(scaling.measure(name, sizes, arguments))
    assert tuple(point.size for point in points) == sizes


def test_the_data_pipeline_is_measured_on_rows_that_differ(tiny_model):
    point = scaling.prepare_rows(50, str(tiny_model))
    assert point.seconds[0] > 0
    assert point.notes["tokens"] > 50


def runs_of(kind, losses):
    return [
        {"kind": kind, "framework": name, "seed": seed, "heldout_loss": loss, "losses": [2.0, loss],
         "versions": {"torch": "2"}}
        for name, values in losses.items()
        for seed, loss in values.items()
    ]  # fmt: skip


def test_a_difference_is_held_against_the_deviation_over_seeds():
    found = quality.summarise(
        runs_of("lora", {"whet": {1: 1.0, 2: 1.1, 3: 1.2}, "hf": {1: 1.01, 2: 1.1, 3: 1.2}}), "lora"
    )
    assert found["noise"] == pytest.approx(0.0976, abs=1e-3)
    assert found["difference"] == pytest.approx(-0.01 / 3)
    assert found["within_noise"]
    apart = quality.summarise(
        runs_of("lora", {"whet": {1: 1.0, 2: 1.1}, "hf": {1: 1.2, 2: 1.3}}), "lora"
    )
    assert not apart["within_noise"]
    assert "OUTSIDE seed noise" in quality.sentence("lora", apart)


def test_no_conclusion_is_drawn_before_both_frameworks_have_the_same_seeds():
    assert not quality.summarise(
        runs_of("lora", {"whet": {1: 1.0, 2: 1.1}, "hf": {1: 1.0}}), "lora"
    )


def test_rows_are_taken_in_epochs_and_the_seed_is_their_order(tmp_path):
    pool, orders = [f"row {number}" for number in range(5)], []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        quality.write_order(pool, 12, seed, tmp_path / name)
        orders.append((tmp_path / name).read_text().splitlines())
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0][:5]) == sorted(orders[0][5:10]) == pool
    assert len(orders[0]) == 12


def test_held_out_rows_are_never_trained_on(tiny_model, tmp_path):
    arguments = quality.parse(["--length", "512", "--heldout", "6"])
    arguments.data = None
    pool, heldout = quality.write_pool(arguments, str(tiny_model), tmp_path)
    apart = heldout.read_text().splitlines()
    assert len(apart) == 6
    assert pool and len(set(pool)) == len(pool)
    assert not set(pool) & set(apart)


def test_an_interrupted_benchmark_goes_on_where_it_was(tiny_model, tmp_path, monkeypatch, capsys):
    made = []

    def take_turns(jobs, pythons, threads, tell):
        (job,) = jobs
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append((job.peer, job.seed))
        job.trained.mkdir()
        steps = [{"loss": 2.0 - 0.1 * at, "grad_norm": 1.0} for at in range(job.work.steps)]
        return [Run(job, steps, versions={"torch": "2"})]

    def losses(work, model, heldout, folders):
        return [3.0 if folder == "-" else 1.0 + len(made) / 100 for folder in folders]

    monkeypatch.setattr(quality, "take_turns", take_turns)
    monkeypatch.setattr(quality, "heldout_losses", losses)
    monkeypatch.setattr("whet.model.load.resolve", lambda name: str(tiny_model))
    words = ["--seeds", "2", "--steps", "3", "--kinds", "lora", "--heldout", "4", "--length", "512"]
    words += ["--out", str(tmp_path / "small"), "--jobs-dir", str(tmp_path / "jobs")]
    with pytest.raises(KeyboardInterrupt):
        quality.main(words)
    assert len(json.loads((tmp_path / "small.json").read_text())["runs"]) == 3
    made.append("the interruption")
    quality.main(words)
    assert [run for run in made if len(run) == 2] == [
        ("whet", 3407), ("hf", 3407), ("whet", 3408), ("hf", 3408),
    ]  # fmt: skip
    page = (tmp_path / "small.md").read_text()
    assert "| lora | whet | 3.00000 | 1.01000 | 1.03000 |" in page
    assert (tmp_path / "small.png").stat().st_size
    with pytest.raises(SystemExit, match="choose another --out"):
        quality.main([*words, "--steps", "4"])
