"""Start the processes of a run through torchrun's own launcher, and say what ended them.

`whet train --nproc 8` starts itself eight times; a plain `torchrun -m whet train` or `accelerate launch
-m whet train` starts the same processes. Each writes what it died of where torchrun looks for it, so that
the first to fail is the one that is heard, and not those that lost it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from whet.config import Config
from whet.config_file import load_config
from whet.errors import InputError, Interrupted, WhetError
from whet.runs import RunFolder
from whet.train.world import size_in_environment

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

# What a process says that lost another one: torch's words, gloo's and NCCL's.
_LOST = re.compile(
    r"\b(gloo|nccl|connection (closed|reset)|socket|broken pipe|(tcp)?store)\b", re.IGNORECASE
)
# A process that lost another waits to be ended, so that the other's error is the one that is shown.
PATIENCE_SECONDS = 25
RUN_ID = "whet"  # of processes that whet has started itself


@dataclass(frozen=True, slots=True)
class Launch:
    """Processes to start.

    Args:
        nproc: On this machine; None: as many as a launcher started, or one.
        nnodes: Machines.
        node_rank: Number of this machine; the meeting point is on machine 0.
        rdzv: Where machines meet, as host:port.
        max_restarts: Times that all processes are started again after one has failed.
    """

    nproc: int | None = None
    nnodes: int = 1
    node_rank: int | None = None
    rdzv: str | None = None
    max_restarts: int = 0

    @property
    def size(self) -> int:
        """Processes in all."""
        return (self.nproc or 1) * self.nnodes


def must_start(launch: Launch) -> bool:
    """Say whether processes have to be started; they have been, under torchrun or accelerate.

    Raises:
        InputError: There are fewer than were asked for, or the options contradict each other.
    """
    size = size_in_environment()
    if size is not None:
        if launch.nproc is not None and launch.size != size:
            raise InputError(
                f"--nproc and --nnodes ask for {launch.size} processes", f"a launcher that made {size}",
                "leave --nproc out under torchrun and accelerate launch",
            )  # fmt: skip
        return False
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ:
        # accelerate launch --cpu --num_processes 2 without mpirun: it prepares for two and starts one.
        raise InputError(
            "accelerate launch was asked for several processes and has started one",
            fix="on a CPU use whet train --nproc N, or torchrun --nproc-per-node N -m whet train",
        )
    if launch.nnodes > 1 and (launch.rdzv is None or launch.node_rank is None):
        raise InputError(
            f"--nnodes {launch.nnodes} needs to know where the machines meet",
            fix="give --node-rank (0 on the first machine) and --rdzv HOST:PORT of machine 0",
        )
    if launch.node_rank is not None and launch.node_rank >= launch.nnodes:
        raise InputError(
            f"--node-rank counts from 0 to {launch.nnodes - 1}", f"{launch.node_rank}",
            "give each machine its own, and all the same --nnodes",
        )  # fmt: skip
    return launch.size > 1


def run_processes(arguments: Sequence[str], launch: Launch, tell: Callable[[str], None]) -> None:
    """Start this machine's processes, and wait until they are done.

    Args:
        arguments: Of `python -m whet`.
        launch: How many.
        tell: Called when this machine has to wait for others.

    Raises:
        Interrupted: The user stopped them; a checkpoint was written.
        InputError: There are fewer GPUs than processes.
        WhetError: One failed, in its own words.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    nproc = launch.nproc or 1
    _require_gpus(nproc)
    if launch.nnodes > 1:
        tell(f"machine {launch.node_rank} of {launch.nnodes}: waiting for all at {launch.rdzv} ...")
    # It tells of each process it ends; here the one that failed is told of, once.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    if launch.max_restarts:
        # torch 2.13 keeps one store through restarts, in which gloo finds the addresses of the processes
        # that have ended. This can go when each attempt has a store, or a prefix, of its own.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    with tempfile.TemporaryDirectory(prefix="whet-launch-") as logs, _passing_signals_on() as asked:
        try:
            elastic_launch(_launch_config(launch, logs), sys.executable)("-m", "whet", *arguments)
        except ChildFailedError as error:
            if asked:
                raise Interrupted(
                    "stopped", fix="go on with the same command and --resume"
                ) from None
            raise _what_ended(error.failures, launch.size) from None
        stopped = _read_stops(Path(logs))
    if stopped is not None:
        raise Interrupted(stopped)


def _require_gpus(nproc: int) -> None:
    import torch

    num = torch.cuda.device_count()
    if torch.cuda.is_available() and num < nproc:
        raise InputError(
            f"--nproc {nproc} needs as many GPUs", f"{num}", f"set --nproc {num} or less"
        )


def _launch_config(launch: Launch, logs: str) -> Any:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    settings: dict[str, Any] = {}
    if "signals_to_handle" in LaunchConfig.__dataclass_fields__:
        settings["signals_to_handle"] = "SIGHUP,SIGQUIT"  # the others are `_passing_signals_on`'s
    if launch.rdzv is not None:
        host, _, port = launch.rdzv.rpartition(":")
        if not host or not port.isdigit():
            raise InputError("--rdzv is HOST:PORT", launch.rdzv)
        # What other machines reach this one by: its name is often known to nobody else.
        address = _address_towards(host, int(port))
        settings["local_addr"] = address
        # gloo listens where the name leads, which on many machines is the loopback alone.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface_of(address))
        settings["rdzv_configs"] = {"is_host": launch.node_rank in (None, 0)}
    return LaunchConfig(
        min_nodes=launch.nnodes,
        max_nodes=launch.nnodes,
        nproc_per_node=launch.nproc or 1,
        run_id=RUN_ID,
        rdzv_backend="c10d",
        rdzv_endpoint=launch.rdzv or "localhost:0",
        max_restarts=launch.max_restarts,
        logs_specs=DefaultLogsSpecs(log_dir=logs),
        **settings,
    )


def _address_towards(host: str, port: int) -> str:
    """Return this machine's address on the way to another; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        try:
            way.connect((host, port))
        except OSError as error:
            raise InputError(
                f"there is no way to '{host}': {error.strerror or error}", fix="check --rdzv"
            ) from error
        return way.getsockname()[0]


def _interface_of(address: str) -> str:
    """Return the name of the network interface that has an address."""
    import psutil

    return next(
        name
        for name, found in psutil.net_if_addrs().items()
        if any(one.address == address for one in found)
    )


@contextlib.contextmanager
def _passing_signals_on() -> Iterator[list[int]]:
    """Pass a wish to stop on to the processes, which end with a checkpoint; the second ends them.

    Yields:
        The signals that came.
    """
    import psutil

    came: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        came.append(number)
        children = psutil.Process().children()
        if len(came) > 1 or not children:  # none yet: the machines have not met
            raise KeyboardInterrupt
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGINT)

    before = {name: signal.signal(name, pass_on) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _what_ended(failures: dict[int, ProcessFailure], size: int) -> WhetError:
    """Return the error of the process that failed first, in its own words."""

    def order(rank: int) -> tuple[bool, int]:
        return bool(_record_of(failures[rank]).get("lost")), failures[rank].timestamp

    rank = min(failures, key=order)
    failure, record = failures[rank], _record_of(failures[rank])
    code, fix = record.get("exit_code", 1), None
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        words = f"it was killed by {name}"
        if name == "SIGKILL":
            words += ", as the system does when the machine's memory runs out"
    else:
        words = record.get("text") or f"it ended with code {failure.exitcode} and said nothing"
    if code != InputError.exit_code:
        fix = "the others were ended; go on with the same command and --resume"
    kind = InputError if code == InputError.exit_code else WhetError
    return kind(f"process {rank} of {size}: {words}", fix=fix)


def _record_of(failure: ProcessFailure) -> dict[str, Any]:
    found = failure.error_file_data
    return found.get("whet", {}) if isinstance(found, dict) else {}


def _read_stops(logs: Path) -> str | None:
    """Return what a process said that was asked to stop, and did."""
    for file in sorted(logs.rglob("error.json")):
        record = json.loads(file.read_text(encoding="utf-8")).get("whet", {})
        if record.get("exit_code") == Interrupted.exit_code:
            return record["text"]
    return None


@contextlib.contextmanager
def as_one_of_several(tell: Callable[[str], None]) -> Iterator[None]:
    """Have whatever ends this process told by its launcher.

    Args:
        tell: Called with a mistake where torchrun's own words, which are many, would hide it.

    Raises:
        SystemExit: With the exit code, once the launcher has the words.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if size_in_environment() is None or not file:
        yield
        return
    try:
        yield
    except Exception as error:
        lost = _has_lost_another(error)
        if lost:
            time.sleep(PATIENCE_SECONDS)  # the launcher ends this process meanwhile
        elif not isinstance(error, WhetError):
            traceback.print_exc()
        elif os.environ.get("TORCHELASTIC_RUN_ID") != RUN_ID:
            tell(f"whet: process {os.environ['RANK']}: {error}")
        code = getattr(error, "exit_code", 1)
        _write_record(Path(file), error, code, lost)
        # Stopping as asked is no failure, after which torchrun would start all processes again.
        sys.exit(0 if code == Interrupted.exit_code else code)


def is_first() -> bool:
    """Say whether this process is the one that talks to people."""
    return size_in_environment() is None or os.environ["RANK"] == "0"


def _has_lost_another(error: Exception) -> bool:
    from torch.distributed import DistError

    if isinstance(error, DistError):
        return True
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None


def _write_record(file: Path, error: Exception, code: int, lost: bool) -> None:
    """Write what ended a process, in the form that torchrun reads."""
    text = str(error) if isinstance(error, WhetError) else f"{type(error).__name__}: {error}"
    if lost:
        text = f"it lost another process ({text.splitlines()[0]})"
    # torchrun prints it; a wrong config needs no stack.
    stack = text if isinstance(error, WhetError) else traceback.format_exc()
    about = {"py_callstack": stack, "timestamp": str(int(time.time()))}
    message = {"message": text, "errorCode": code, "extraInfo": about}
    record = {"message": message, "whet": {"text": text, "exit_code": code, "lost": lost}}
    file.write_text(json.dumps(record), encoding="utf-8")


def goes_on_after_a_restart(config: Config) -> bool:
    """Say whether torchrun has started the processes again, and there is something to go on from."""
    run = RunFolder(Path(config.run.dir) / config.run.name)
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 and bool(run.checkpoints())


def as_launched(config: Config) -> Config:
    """Return the config with the strategy that `accelerate launch --config_file` asked for.

    whet spreads the model itself, the same way whoever started the processes, so that accelerate's own
    preparation is told to do nothing.

    Raises:
        InputError: It asks for something else than the config, or for what whet does not do.
    """
    changes = list(_wishes_of_accelerate())
    if not changes:
        return config
    wished = changes[0].partition("=")[2]
    if config.parallel.strategy not in ("auto", wished):
        raise InputError(
            f"accelerate's config asks for {wished}, and whet's for {config.parallel.strategy}",
            fix="leave --strategy and parallel.strategy out, or use another accelerate config",
        )
    return load_config(config, changes)


def _wishes_of_accelerate() -> Iterator[str]:
    found = os.environ
    # The first alone is not the launcher's: transformers sets it for every run with DeepSpeed.
    stage = found.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    if found.get("ACCELERATE_USE_DEEPSPEED") == "true" and stage is not None:
        yield "parallel.strategy=deepspeed"
        yield f"parallel.zero_stage={3 if stage == '3' else 2}"
        if found.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none") != "none":
            yield "parallel.offload=true"
    elif found.pop("ACCELERATE_USE_FSDP", "false") == "true":
        if found.get("FSDP_VERSION", "1") != "2":
            raise InputError(
                "accelerate's config asks for FSDP1, which whet does not run",
                fix="set fsdp_version: 2 in its fsdp_config (examples/accelerate/fsdp.yaml)",
            )
        yield "parallel.strategy=fsdp"
        if found.get("FSDP_OFFLOAD_PARAMS", "false") == "true":
            yield "parallel.offload=true"
    elif found.pop("ACCELERATE_USE_PARALLELISM_CONFIG", "false") == "true":
        if int(found.get("PARALLELISM_CONFIG_TP_SIZE", "1")) != size_in_environment():
            raise InputError(
                "accelerate's config mixes tensor parallel with something else",
                fix="set parallelism_config_tp_size to the number of processes",
            )
        yield "parallel.strategy=tp"
