"""A run is a folder: `runs/NAME`, which every front end reads and writes, and nothing else.

    config.yaml (resolved)   report.json   metrics.jsonl   samples.md   loss.png
    checkpoints/step-N/      adapter/ or model/

A write is whole or absent: files and folders are made under a temporary name and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from whet.config import Config
from whet.config_file import load_config, to_yaml
from whet.errors import InputError, WhetError

# Keys that a resumed run may change: they end, name or watch a run, but do not change its numbers
# up to the step it resumes from.
RESUMABLE_KEYS = {
    "run.name", "run.dir", "train.max_steps", "train.epochs", "train.log_steps",
    "train.checkpoint_steps", "train.keep_checkpoints", "eval.batch_size", "eval.exact_match",
    "eval.max_new_tokens", "eval.samples", "eval.max_rows", "eval.steps",
    "eval.patience", "eval.keep_best", "train.trackers",
    "parallel.strategy", "parallel.zero_stage", "parallel.offload",
}  # fmt: skip


_BEFORE_THE_FIRST_STEP = {"config.yaml", "report.json", ".lock"}


class RunFolder:
    """The files of one run.

    Args:
        path: The folder, whether it is there yet or not.
        writes: Whether this process writes reports and holds the lock; of several one does.
    """

    def __init__(self, path: str | Path, writes: bool = True) -> None:
        self.path, self.writes = Path(path), writes
        self.config_file = self.path / "config.yaml"
        self.report_file = self.path / "report.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.samples_file = self.path / "samples.md"
        self.plot_file = self.path / "loss.png"
        self.checkpoints_dir = self.path / "checkpoints"
        self.adapter_dir = self.path / "adapter"
        self.model_dir = self.path / "model"
        self.lock_file = self.path / ".lock"
        self.ranks_dir = self.path / "ranks"  # what the processes but the first have to say

    @staticmethod
    def is_run(path: str | Path) -> bool:
        """Whether a path is a run's folder, whatever state the run is in."""
        return (Path(path) / "config.yaml").is_file()

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Open a run that has something to load.

        Raises:
            InputError: There is no run there, or it has no trained weights yet.
        """
        run = cls(path)
        if not cls.is_run(path):
            raise InputError(
                f"'{path}' is not a run (a folder with config.yaml)",
                fix="`whet train` makes one under runs/",
            )
        if run.weights_dir is None:
            raise InputError(
                f"run '{path}' has no trained weights yet",
                fix="let `whet train` end, or go on with --resume",
            )
        return run

    @property
    def config(self) -> Config:
        """The resolved config the run was started with."""
        return load_config(self.config_file)

    @property
    def weights_dir(self) -> Path | None:
        """The finished adapter or model, or None before the end of training."""
        for folder in (self.adapter_dir, self.model_dir):
            if folder.is_dir():
                return folder
        return None

    @property
    def holder(self) -> int | None:
        """The living process that trains this run, or None; never this process itself."""
        return _living_holder(self.lock_file)

    @property
    def report(self) -> dict[str, Any]:
        """What report.json holds, or nothing yet."""
        if not self.report_file.is_file():
            return {}
        return json.loads(self.report_file.read_text(encoding="utf-8"))

    def update_report(self, **parts: Any) -> None:
        """Replace parts of report.json, by their top-level keys."""
        if not self.writes:
            return
        write_text(self.report_file, json.dumps({**self.report, **parts}, indent=2) + "\n")

    def checkpoints(self) -> list[Path]:
        """Return the whole checkpoints, oldest first."""
        found = [p for p in self.checkpoints_dir.glob("step-*") if p.name[5:].isdigit()]
        return sorted(found, key=lambda p: int(p.name[5:]))

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl; a line that a kill cut short is left out."""
        if not self.metrics_file.is_file():
            return []
        rows = []
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
        return rows

    def forget_metrics_after(self, step: int) -> None:
        """Drop the lines that a resumed run will write again."""
        kept = [row for row in self.metrics() if row["step"] <= step]
        write_text(self.metrics_file, "".join(json.dumps(row) + "\n" for row in kept))

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second process out of this run while the body lasts.

        Raises:
            InputError: A living process holds the run.
        """
        if not self.writes:
            yield
            return
        make_folder(self.path)
        holder = _living_holder(self.lock_file)
        if holder is not None:
            raise _being_trained(self, holder)
        write_text(self.lock_file, str(os.getpid()))
        for folder in (self.path, self.checkpoints_dir):
            for stale in folder.glob(".*.tmp"):  # of a process that was killed while writing
                shutil.rmtree(stale, ignore_errors=True)
        try:
            yield
        finally:
            self.lock_file.unlink(missing_ok=True)


def start_run(config: Config) -> tuple[RunFolder, Path | None]:
    """Make the folder of a new run; a run already there is moved aside, never overwritten.

    Only the remains of a run that never got to its first step are written over.

    Returns:
        The folder, and where the earlier run of that name went (or None).

    Raises:
        InputError: The earlier run is still being trained.
    """
    run = RunFolder(Path(config.run.dir) / config.run.name)
    moved = None
    if (holder := _living_holder(run.lock_file)) is not None:
        raise _being_trained(run, holder)
    if run.path.exists() and {p.name for p in run.path.iterdir()} - _BEFORE_THE_FIRST_STEP:
        number = 1
        while (moved := run.path.with_name(f"{run.path.name}.{number}")).exists():
            number += 1
        run.path.rename(moved)
    make_folder(run.path)
    write_text(run.config_file, to_yaml(config))
    run.report_file.unlink(missing_ok=True)
    return run, moved


def resume_run(
    config: Config, data_sha256: str, choose: Callable[[list[Path]], Path] = lambda found: found[-1]
) -> tuple[RunFolder, Path]:
    """Open a run that was interrupted, with the checkpoint to go on from.

    Args:
        config: The run's config; what it may change is in RESUMABLE_KEYS.
        data_sha256: Hash of the tokenised data, which must be what it was.
        choose: Returns one of its checkpoints, given oldest first; the newest if left out.

    Raises:
        InputError: There is nothing to resume, or the config would change the run's numbers.
    """
    run = RunFolder(Path(config.run.dir) / config.run.name)
    if not RunFolder.is_run(run.path):
        raise InputError(f"there is no run '{run.path}' to resume", fix="start it without --resume")
    changed = [
        f"{key}: {old!r} became {new!r}"
        for key, old, new in _differences(run.config, config)
        if key not in RESUMABLE_KEYS
    ]
    if changed:
        raise InputError.listing(
            f"run '{run.path}' cannot go on with other settings; put these back, or start anew "
            "without --resume:",
            changed,
        )
    if run.report.get("data", {}).get("sha256", data_sha256) != data_sha256:
        raise InputError(
            f"the data has changed since run '{run.path}' began, so it cannot go on as it was",
            fix="put the rows back, or start anew without --resume",
        )
    checkpoints = run.checkpoints()
    if not checkpoints:
        raise InputError(
            f"run '{run.path}' has no checkpoint to resume from", fix="start it without --resume"
        )
    checkpoint = choose(checkpoints)
    write_text(run.config_file, to_yaml(config))
    return run, checkpoint


def _differences(old: Config, new: Config) -> Iterator[tuple[str, Any, Any]]:
    before, after = old.model_dump(), new.model_dump()
    for section, value in before.items():
        if not isinstance(value, dict):
            if value != after[section]:
                yield section, value, after[section]
            continue
        for key, inner in value.items():
            if inner != after[section][key]:
                yield f"{section}.{key}", inner, after[section][key]


def _being_trained(run: RunFolder, holder: int) -> InputError:
    return InputError(
        f"run '{run.path}' is being trained by process {holder}",
        fix="wait for it, or give this one another name with --set run.name=NAME",
    )


def _living_holder(lock_file: Path) -> int | None:
    """Return the process that holds a lock, or None when there is none or it has died."""
    try:
        pid = int(lock_file.read_text())
        os.kill(pid, 0)
    except (FileNotFoundError, ValueError, ProcessLookupError):
        return None
    except PermissionError:
        return pid  # alive, and somebody else's
    return None if pid == os.getpid() else pid


# --- whole writes --------------------------------------------------------------------------------


def make_folder(path: Path) -> None:
    """Make a folder and its parents.

    Raises:
        InputError: The path is taken by a file, or may not be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"folder '{path}' cannot be made: {error.strerror}", fix="choose another run.dir"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all.

    Raises:
        WhetError: The disk is full or cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give the body a temporary folder that becomes `path` when the body ends well.

    A folder already at `path` is replaced in that moment; a failure leaves it as it was.

    Raises:
        WhetError: The disk is full or cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    # safetensors writes files that only their owner may read.
                    file.chmod(temporary.stat().st_mode & 0o666)
                    with open(file, "rb") as handle:
                        os.fsync(handle.fileno())
            if path.exists():
                old = path.with_name(f".{path.name}.old")
                shutil.rmtree(old, ignore_errors=True)
                os.replace(path, old)
                os.replace(temporary, path)
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write in the body into one sentence with the path and the remedy.

    Raises:
        WhetError: The disk is full, a limit is reached, or the place may not be written.
    """
    try:
        yield
    except OSError as error:
        raise _write_error(path, error.errno, error.strerror or str(error)) from error
    except _native_write_errors() as error:
        if not any(sign in str(error).lower() for sign in _SIGNS_OF_A_FAILED_WRITE):
            raise
        raise _write_error(path, None, str(error)) from error


# torch.save and safetensors report a failed write in types and words of their own.
_SIGNS_OF_A_FAILED_WRITE = (
    "os error", "no space left", "file write failed", "failed writing file", "unexpected pos",
    "iostream error",
)  # fmt: skip


def _native_write_errors() -> tuple[type[Exception], ...]:
    from safetensors import SafetensorError

    return RuntimeError, SafetensorError


def _write_error(path: Path, number: int | None, words: str) -> WhetError:
    free = shutil.disk_usage(_existing_parent(path)).free
    if number in (errno.ENOSPC, errno.EDQUOT) or "no space left" in words.lower():
        words = "the disk is full"
    return WhetError(
        f"'{path}' could not be written: {words}",
        f"{free / 2**20:,.0f} MiB free there",
        "nothing half-written was left; make room or choose another run.dir, then go on with --resume",
    )


def require_free(path: Path, num_bytes: int, purpose: str) -> None:
    """Stop before the work when its result would not fit on the disk.

    Args:
        path: Where it will be written.
        num_bytes: How much, in bytes.
        purpose: What for, as the sentence's subject.

    Raises:
        WhetError: Less is free.
    """
    free = shutil.disk_usage(_existing_parent(path)).free
    if free < num_bytes:
        raise WhetError(
            f"{purpose} needs {num_bytes / 2**20:,.0f} MiB at '{path}'",
            f"{free / 2**20:,.0f} MiB free",
            "make room or choose another folder",
        )


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
