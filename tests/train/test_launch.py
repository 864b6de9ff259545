"""Starting processes: who is asked, what ends them, and what is said of it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from whet.config_file import load_config
from whet.errors import InputError
from whet.runs import RunFolder
from whet.train.launch import Launch, _has_lost_another, as_launched, must_start

CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate"
MEANT = {
    "multi_gpu.yaml": ("auto", 2, False),
    "fsdp.yaml": ("fsdp", 2, False),
    "zero2.yaml": ("deepspeed", 2, True),
    "zero3.yaml": ("deepspeed", 3, True),
    "tp.yaml": ("tp", 2, False),
}


def environment(file, monkeypatch):
    """Return the environment that `accelerate launch --config_file` gives to its processes."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    arguments = ["--config_file", str(file), "-m", "whet", "train", "my.yaml"]
    args, defaults, _ = launch._validate_launch_command(
        launch.launch_command_parser().parse_args(arguments)
    )
    assert defaults.num_processes == args.num_processes > 1
    if args.use_deepspeed:
        pytest.importorskip("deepspeed")
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        return prepare_deepspeed_cmd_env(args)[1]
    return prepare_multi_gpu_env(args)


@pytest.mark.parametrize("name", sorted(MEANT))
def test_accelerate_reads_the_config_and_whet_takes_its_strategy(name, monkeypatch):
    found = environment(CONFIGS / name, monkeypatch)
    for key, value in found.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    config = as_launched(load_config({"data": {"train": "rows.jsonl"}}))
    parallel = config.parallel
    assert (parallel.strategy, parallel.zero_stage, parallel.offload) == MEANT[name]


def test_every_config_is_tested():
    assert sorted(MEANT) == sorted(file.name for file in CONFIGS.iterdir())


def test_a_world_that_is_smaller_than_asked_stops_the_run(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert must_start(Launch(nproc=2))
    assert not must_start(Launch(nproc=1))
    with pytest.raises(InputError, match="--node-rank"):
        must_start(Launch(nproc=2, nnodes=2))
    with pytest.raises(InputError, match="counts from 0 to 1; got 5"):
        must_start(Launch(nproc=2, nnodes=2, node_rank=5, rdzv="localhost:29500"))
    with monkeypatch.context() as patch:  # accelerate launch --cpu --num_processes 2
        patch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        patch.setenv("MASTER_PORT", "29500")
        with pytest.raises(InputError, match="has started one"):
            must_start(Launch())
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not must_start(Launch())
    with pytest.raises(InputError, match="ask for 4 processes"):
        must_start(Launch(nproc=4))


def test_accelerate_really_leaves_that_trace(monkeypatch):
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    arguments = ["--cpu", "--num_processes", "2", "-m", "whet", "train", "my.yaml"]
    args, _, _ = launch._validate_launch_command(
        launch.launch_command_parser().parse_args(arguments)
    )
    for key, value in prepare_simple_launcher_cmd_env(args)[1].items():
        monkeypatch.setenv(key, value)
    with pytest.raises(InputError, match="has started one"):
        must_start(Launch())


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True),
        (RuntimeError("NCCL communicator was aborted on rank 1"), True),
        (RuntimeError("Broken pipe: recvValue failed on SocketImpl"), True),
        (RuntimeError("don't know how to restore data location"), False),
        (ValueError("Connection closed"), False),
    ],
)
def test_an_error_of_its_own_is_told_from_the_loss_of_another(error, lost):
    assert _has_lost_another(error) is lost


# --- real processes -----------------------------------------------------------------------------------


@pytest.fixture
def command(tiny_model, rows_file, tmp_path):
    """A function that starts `whet train` on the tiny model, with options, and returns the process."""
    file = tmp_path / "run.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "run": {"name": "run", "dir": str(tmp_path / "runs")},
                "model": {"name": str(tiny_model), "dtype": "float32"},
                "lora": {"rank": 4},
                "data": {"train": str(rows_file)},
                "train": {"batch_size": 4, "max_steps": 6, "checkpoint_steps": 2},
                "plan": {"probe": "off"},
                "engine": {"check": "off"},
            }
        )
    )

    def start(*options, python=("-m", "whet"), before=(), stderr=subprocess.STDOUT):
        return subprocess.Popen(
            [*before, sys.executable, *python, "train", str(file), *options],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    start.run = RunFolder(tmp_path / "runs" / "run")
    return start


def until(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def steps_done(run):
    return max((row["step"] for row in run.metrics() if "loss" in row), default=0)


def workers(process):
    """Return the processes of a run, by their ranks."""
    import psutil

    children = psutil.Process(process.pid).children()
    found = {}
    for child in children:
        environment = child.environ()
        if "RANK" in environment:
            found[int(environment["RANK"])] = child
    return found


def test_a_killed_process_ends_the_run_in_words_and_the_run_goes_on(command):
    process = command("--nproc", "2", "--set", "train.max_steps=4000")
    until(lambda: steps_done(command.run) >= 4 or process.poll() is not None)
    workers(process)[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 1, out
    assert time.monotonic() - killed < 60
    last = out.strip().splitlines()[-1]
    assert last.startswith("whet: process 1 of 2: it was killed by SIGKILL") and "--resume" in last
    assert "gloo" not in out
    done = steps_done(command.run)
    process = command("--resume", "--set", f"train.max_steps={done + 2}")  # in one process
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert steps_done(command.run) == done + 2


def test_a_wish_to_stop_reaches_all_processes_and_they_leave_a_checkpoint(command):
    process = command("--nproc", "2", "--set", "train.max_steps=4000")
    until(lambda: steps_done(command.run) >= 2 or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 130, out
    assert "with a checkpoint" in out.strip().splitlines()[-1]
    done = steps_done(command.run)
    assert command.run.checkpoints()[-1].name == f"step-{done}"


FAULTY = """
import os, sys
from whet.train.trainer import WhetTrainer

step = WhetTrainer.training_step

def training_step(self, *args, **kwargs):
    if self.state.global_step == 3 and os.environ["RANK"] == "1":
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            raise ValueError("a fault of its own")
    return step(self, *args, **kwargs)

WhetTrainer.training_step = training_step
"""


def test_the_first_error_is_told_and_max_restarts_goes_on_by_itself(command, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nif 'TORCHELASTIC_RUN_ID' in os.environ:\n    import faulty\n"
    )
    (tmp_path / "faulty.py").write_text(FAULTY)
    paths = [str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    process = command("--nproc", "2")
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "process 1 of 2: ValueError: a fault of its own" in out.strip().splitlines()[-1]
    assert "Connection closed" not in out
    # And to a pipeline that reads standard output, where there is one object and nothing else.
    process = command("--nproc", "2", "--max-restarts", "1", "--json", stderr=subprocess.PIPE)
    out, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert "going on from" in told and "step 6/6" in told
    summary = json.loads(out)
    assert summary["status"] == "done" and summary["steps"] == steps_done(command.run) == 6
    assert command.run.report["processes"] == 2


def namespaces(names):
    """Make network namespaces on one bridge, as hosts; return why that cannot be done."""
    try:
        made = [subprocess.run(["ip", "netns", "add", name], capture_output=True) for name in names]
    except FileNotFoundError:
        return "there is no `ip` here"
    if any(done.returncode for done in made):
        return "this user may not make network namespaces"
    first, second = names
    for line in (
        f"link add {first} netns {first} type veth peer name {second} netns {second}",
        f"-n {first} addr add 10.77.0.1/24 dev {first}",
        f"-n {second} addr add 10.77.0.2/24 dev {second}",
        f"-n {first} link set {first} up",
        f"-n {second} link set {second} up",
        f"-n {first} link set lo up",
        f"-n {second} link set lo up",
    ):
        if subprocess.run(["ip", *line.split()], capture_output=True).returncode:
            return "network namespaces cannot be joined here"
    return ""


@pytest.mark.slow
def test_two_machines_meet_and_train_together(command):
    names = [f"whet{os.getpid()}{letter}" for letter in "ab"]
    try:
        if reason := namespaces(names):
            pytest.skip(reason)
        options = ["--nproc", "1", "--nnodes", "2", "--rdzv", "10.77.0.1:29517"]
        machines = [
            command(
                *options, "--node-rank", str(number), before=("ip", "netns", "exec", name)
            )
            for number, name in enumerate(names)
        ]  # fmt: skip
        outs = [machine.communicate(timeout=400)[0] for machine in machines]
        assert [machine.returncode for machine in machines] == [0, 0], outs
        assert steps_done(command.run) == 6
        assert command.run.report["processes"] == 2
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_ports_and_hosts_that_are_wrong_are_said(command):
    process = command("--nproc", "1", "--nnodes", "2", "--node-rank", "0", "--rdzv", "nowhere")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and "HOST:PORT" in out
