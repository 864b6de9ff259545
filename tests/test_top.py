"""`whet top` on run folders that grow, and the sensors on a machine that shows what a test says."""

import io
import json
import os
import sys
import threading
import time

import pytest
from rich.console import Console

from tests.fake_nvml import GIB, LAPTOP, RTX_4090, fake_nvml
from whet import top
from whet.runs import RunFolder
from whet.sensors import Sensors, training_gpus


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("run: {name: tiny}\n")
    (folder / "report.json").write_text(json.dumps({"plan": {"num_steps": 20}}))
    return RunFolder(folder)


def add_step(run, step, end="\n", **more):
    row = {
        "step": step, "loss": 2.0 / step, "learning_rate": 1e-4, "grad_norm": 1.0, "seconds": step * 0.5,
        "tokens_per_second": 1000.0 + step, "memory_bytes": GIB, "planned_bytes": 2 * GIB,
        "seconds_in": {"data": 0.0, "forward": 0.1, "backward": 0.3}, **more,
    }  # fmt: skip
    with open(run.metrics_file, "a") as file:
        file.write(json.dumps(row) + end)


def begin(run):
    """Have the run be trained by a living process that is not this one."""
    run.lock_file.write_text(str(os.getppid()))


@pytest.fixture
def nvml(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml([RTX_4090, LAPTOP]))


def test_every_gpu_is_read_and_what_it_lacks_is_left_out(nvml):
    found = Sensors().read()
    full, laptop = found["gpus"]
    assert full == {
        "index": 0, "name": "NVIDIA GeForce RTX 4090", "utilization": 0.87, "used_bytes": 11 * GIB,
        "total_bytes": 24 * GIB, "temperature_c": 66, "power_watts": 310.5, "power_limit_watts": 450.0,
    }  # fmt: skip
    assert laptop.keys() == {"index", "name", "used_bytes", "total_bytes"}
    assert 0 <= found["cpu_utilization"] <= 1
    assert 0 < found["ram_used_bytes"] <= found["ram_total_bytes"]


def test_a_run_reads_its_own_gpu_only(nvml):
    (gpu,) = Sensors(["GPU-2"]).read()["gpus"]
    assert gpu["index"] == 1
    assert "gpus" not in Sensors([]).read()  # a run on the CPU, beside a GPU
    assert "gpus" not in Sensors(["GPU-9"]).read()


def test_a_machine_without_nvml_tells_the_rest(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Sensors().read().keys() == {"cpu_utilization", "ram_used_bytes", "ram_total_bytes"}
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml([RTX_4090], starts=False))
    assert "gpus" not in Sensors().read()


def test_nvidia_smi_is_asked_where_nvml_is_not_there(monkeypatch, tmp_path):
    told = os.path.join(os.path.dirname(__file__), "doctor", "outputs", "csv_550_two.txt")
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat {told}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    first, second = Sensors(patient=True).read()["gpus"]
    assert first["utilization"] == 0.04 and first["power_watts"] == 23.31
    assert second["name"] == "NVIDIA GeForce RTX 3060"
    assert "gpus" not in Sensors().read()  # a run does not start programs at its log steps


def test_a_run_is_sampled_once_a_second_at_most(monkeypatch):
    sensors = Sensors([])
    now = [100.0]
    monkeypatch.setattr("whet.sensors.time.monotonic", lambda: now[0])
    assert sensors.sample() is not None
    now[0] += 0.9
    assert sensors.sample() is None
    now[0] += 0.2
    assert sensors.sample() is not None


def test_a_cpu_has_no_gpu_to_train_on():
    import torch

    assert len(training_gpus()) == (1 if torch.cuda.is_available() else 0)


def test_metrics_are_read_as_they_grow(run):
    tail = top.MetricsTail(run)
    assert tail.read() == []  # no step yet
    add_step(run, 1)
    assert [row["step"] for row in tail.read()] == [1]
    add_step(run, 2, end="")
    assert tail.read() == []  # half a line
    with open(run.metrics_file, "a") as file:
        file.write("\n")
    add_step(run, 3)
    assert [row["step"] for row in tail.read()] == [2, 3]
    with open(run.metrics_file, "a") as file:
        file.write('{"step": 4, "lo\n')
    add_step(run, 5)
    assert [row["step"] for row in tail.read()] == [5]
    assert [row["step"] for row in tail.rows] == [1, 2, 3, 5]


def test_a_resumed_run_is_read_anew(run):
    tail = top.MetricsTail(run)
    for step in (1, 2, 3):
        add_step(run, step)
    tail.read()
    run.forget_metrics_after(2)
    add_step(run, 3, loss=9.0)
    tail.read()
    assert [row["loss"] for row in tail.rows] == [2.0, 1.0, 9.0]


def test_a_snapshot_tells_where_a_run_is(run, nvml):
    for step in range(1, 11):
        add_step(run, step)
    with open(run.metrics_file, "a") as file:
        file.write(json.dumps({"step": 10, "heldout_loss": 0.5}) + "\n")
    begin(run)
    now = top.take_snapshot(run, top.MetricsTail(run), Sensors())
    assert (now.state, now.process, now.step, now.num_steps) == ("training", os.getppid(), 10, 20)
    assert (now.loss, now.heldout_loss, now.tokens_per_second) == (0.2, 0.5, 1010.0)
    assert now.step_seconds == 0.5 and now.eta_seconds == 5.0
    assert now.shares == pytest.approx({"forward": 0.25, "backward": 0.75})
    assert len(now.machine["gpus"]) == 2


def test_the_pace_of_a_resumed_run_is_its_own(run):
    for step, seconds in ((1, 100.0), (2, 200.0), (3, 1.0), (4, 2.0), (5, 3.0)):
        add_step(run, step, seconds=seconds)
    assert top.take_snapshot(run, top.MetricsTail(run), Sensors()).step_seconds == 1.0


def test_a_run_that_is_not_trained_is_stopped_or_ended(run):
    assert top.take_snapshot(run, top.MetricsTail(run), Sensors()).state == "stopped"
    run.adapter_dir.mkdir()
    ended = top.take_snapshot(run, top.MetricsTail(run), Sensors())
    assert ended.state == "ended" and ended.eta_seconds is None and ended.loss is None
    assert top.plain_line(ended).startswith("ended  step 0/20  CPU")


def test_the_view_shows_run_and_machine(run, nvml):
    for step in range(1, 5):
        add_step(run, step)
    begin(run)
    out = Console(file=io.StringIO(), width=110)
    out.print(top.render(top.take_snapshot(run, top.MetricsTail(run), Sensors())))
    text = out.file.getvalue()
    for words in (
        "step 4/20", "ETA 0:08", "0.5000", "1,004 tokens/s", "0.5 s a step", "backward 75%",
        "1.00 of 2.00 planned GiB", "87%, 11.0 of 24.0 GiB, 66 °C, 310 of 450 W", "RTX 4090",
        "1.0 of 4.0 GiB", "CPU", "RAM", f"process {os.getppid()}",
    ):  # fmt: skip
        assert words in text, text


def test_a_line_of_blocks_falls_with_the_loss():
    assert top.sparkline([3.0, 2.0, 1.0]) == "█▅▁" or top.sparkline([3.0, 2.0, 1.0]) == "█▄▁"
    assert top.sparkline([1.0, 1.0]) == "▁▁"
    assert top.sparkline([float("nan"), 2.0]) == "▁" and top.sparkline([]) == ""
    assert len(top.sparkline(list(range(100)))) == top.BAR_WIDTH


def test_a_pipe_gets_a_line_for_each_step_until_the_run_ends(run):
    begin(run)
    add_step(run, 1)
    lines = []

    def train():
        for step in (2, 3):
            while len(lines) < step - 1:
                time.sleep(0.005)
            add_step(run, step)
        while len(lines) < 3:
            time.sleep(0.005)
        run.adapter_dir.mkdir()
        run.lock_file.unlink()

    other = threading.Thread(target=train)
    other.start()
    out = Console(file=io.StringIO())
    top.follow(run, out, interval=0.01, write=lines.append)
    other.join()
    assert [line.split()[:3] for line in lines] == [
        ["training", "step", "1/20"],
        ["training", "step", "2/20"],
        ["training", "step", "3/20"],
        ["ended", "step", "3/20"],
    ]
    assert all("\x1b" not in line for line in lines)


def test_a_terminal_gets_a_view_that_moves(run):
    begin(run)
    add_step(run, 1)
    out = Console(file=io.StringIO(), force_terminal=True, width=100)

    def train():
        while "step 1/20" not in out.file.getvalue():
            time.sleep(0.005)
        add_step(run, 2)
        while "step 2/20" not in out.file.getvalue():
            time.sleep(0.005)
        run.lock_file.unlink()

    other = threading.Thread(target=train)
    other.start()
    top.follow(run, out, interval=0.01)
    other.join()
    assert "stopped" in out.file.getvalue()


def command(monkeypatch, capsys, *arguments):
    from whet.cli import main

    monkeypatch.setattr(sys, "argv", ["whet", "top", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        told = capsys.readouterr()
        return end.code or 0, told.out, told.err
    raise AssertionError("the command line always exits")


def test_once_and_json_are_for_scripts(run, monkeypatch, capsys, nvml):
    begin(run)
    add_step(run, 7)
    code, out, _ = command(monkeypatch, capsys, run.path, "--once", "--json")
    found = json.loads(out)
    assert code == 0 and found["step"] == 7 and found["machine"]["gpus"][0]["temperature_c"] == 66
    code, out, _ = command(monkeypatch, capsys, run.path, "--once")
    assert code == 0 and "step 7/20" in out and "GPU 0 87%" in out and out.count("\n") == 1


def test_a_folder_that_is_no_run_is_told(tmp_path, monkeypatch, capsys):
    code, _, err = command(monkeypatch, capsys, tmp_path)
    assert code == 2 and "is not a run" in err


def test_training_logs_the_machine(config, monkeypatch):
    from whet.train.recipe import fit

    monkeypatch.setattr("whet.sensors.REST_SECONDS", 0.0)
    made = fit(
        config.model_copy(update={"eval": config.eval.model_copy(update={"exact_match": False})})
    )
    steps = [row for row in made.metrics() if "loss" in row]
    assert steps and all(row["machine"]["ram_total_bytes"] > 0 for row in steps)
    now = top.take_snapshot(made, top.MetricsTail(made), Sensors())
    assert now.state == "ended" and now.step == now.num_steps == steps[-1]["step"]
