"""Checkpoints: what is in one, how it is written, and how a damaged one is found out.

    step-N/  adapter_model.safetensors or model.safetensors   tokenizer and model files
             optimizer.pt  scheduler.pt  scaler.pt (float16)  rng_state.pth (Python, numpy, torch, CUDA;
             rng_state_N.pth of process N where there were several)
             trainer_state.json   whet_state.json (sampler, planner, held-out losses)   manifest.json

A checkpoint is made in a temporary folder and renamed. Its manifest has the SHA-256 of every file, and a
checkpoint that does not match it is refused by name: a torn or edited one would train on, wrongly.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from transformers import Trainer

from whet.errors import InputError
from whet.runs import RunFolder, whole_folder
from whet.train.optimizers import (
    load_outside_state_,
    move_state_,
    outside_state,
    state_loading,
    turn_optimizer,
)
from whet.train.randoms import random_file, random_state
from whet.train.shards import (
    WholeState,
    gather_state,
    gather_weights,
    load_optimizer_state,
    save_spread,
)

if TYPE_CHECKING:
    from whet.config import Config
    from whet.model import Tokenizer
    from whet.train.trainer import WhetTrainer

MANIFEST = "manifest.json"
STATE = "whet_state.json"
OUTSIDE = "optimizer_attributes.pt"  # of optimizers whose state_dict is not all of their state


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint was written after."""
    return int(checkpoint.name.removeprefix("step-"))


def write_checkpoint(trainer: WhetTrainer) -> Path:
    """Write the state of a run whole, and drop the oldest checkpoints beyond `keep_checkpoints`.

    Args:
        trainer: Between two steps.

    Returns:
        The checkpoint's folder.
    """
    step, run = trainer.state.global_step, trainer.run_folder
    path = run.checkpoints_dir / f"step-{step}"
    # What takes all processes comes first; then rank 0 writes and the others wait for it.
    whole = None if trainer.shards is None else gather_state(trainer)
    randoms = trainer.world.gather(random_state())
    if trainer.world.is_first:
        with whole_folder(path) as folder:
            _write_files(trainer, folder, whole, randoms)
            write_manifest(folder, step)
        _drop_old(run, step, trainer.whet_config.train.keep_checkpoints, trainer.watch.kept_step)
    trainer.world.agree(step)
    return path


def _write_files(
    trainer: WhetTrainer, folder: Path, whole: WholeState | None, randoms: list[dict[str, Any]]
) -> None:
    """Write everything but the manifest, in rank 0."""
    if whole is None:
        trainer.save_model(str(folder), _internal_call=True)
        trainer._save_optimizer_and_scheduler(str(folder))
    else:
        save_spread(trainer, folder, whole.weights)
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(str(folder))
        torch.save(whole.optimizer, folder / "optimizer.pt")
        torch.save(trainer.lr_scheduler.state_dict(), folder / "scheduler.pt")  # type: ignore[union-attr]
    if outside := outside_state(trainer.optimizer, trainer.whet_config.train.optimizer):
        torch.save(outside, folder / OUTSIDE)
    trainer._save_scaler(str(folder))
    if trainer.world.size == 1:
        trainer._save_rng_state(str(folder))
    else:
        for share, state in enumerate(randoms[:: trainer.world.tensor]):
            torch.save(state, folder / random_file(share))
    trainer.state.save_to_json(str(folder / "trainer_state.json"))
    state = {
        "tokens_seen": trainer.tokens_seen,
        "tokens_per_pass": trainer.packing.tokens_per_pass,
        "times_eased": trainer.times_eased,
        "sampler": trainer.sampler.position(trainer.state.global_step),
        "watch": trainer.watch.to_dict(),
    }
    (folder / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def restore_checkpoint(trainer: WhetTrainer, folder: Path) -> None:
    """Put back what transformers does not know of: the planner's state, counts, and the watch.

    Args:
        trainer: Whose weights are loaded already.
        folder: A checkpoint that was found whole.

    Raises:
        InputError: The rows would come in another order than they would have.
    """
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    trainer.tokens_seen = state["tokens_seen"]
    # The passes are those of the run so far: another cut would round otherwise.
    trainer.packing = replace(trainer.packing, tokens_per_pass=state["tokens_per_pass"])
    for _ in range(state["times_eased"]):
        trainer.settings.ease()
        trainer.times_eased += 1
    trainer.watch.load(state["watch"])
    position = trainer.sampler.position(step_of(folder))
    if position != state["sampler"]:
        raise InputError(
            f"'{folder}' was written in another order of the rows",
            f"{position}, and it was {state['sampler']}",
            "use the torch and numpy that the run began with (report.json: versions), or start anew",
        )


def load_optimizer(trainer: WhetTrainer, folder: str | None, load: Callable[[str], None]) -> None:
    """Load the optimizer's state, with the classes that it may hold.

    Args:
        trainer: Whose optimizer is made.
        folder: The checkpoint, or None.
        load: transformers' way to load it.
    """
    if folder is None:
        return
    assert trainer.optimizer is not None
    if trainer.world.size > 1:
        kept = torch.load(f"{folder}/scheduler.pt", map_location="cpu", weights_only=True)
        scheduler: Any = trainer.lr_scheduler
        scheduler.load_state_dict(kept)
    if trainer.shards is not None:
        load_optimizer_state(trainer, folder)
        return
    with state_loading(trainer.whet_config.train.optimizer):
        if trainer.world.size == 1:
            load(folder)
        else:  # transformers 5.17 would load it to `cpu:0`, a place that torch does not know
            kept = torch.load(f"{folder}/optimizer.pt", map_location="cpu", weights_only=True)
            trainer.optimizer.load_state_dict(kept)
    move_state_(trainer.optimizer)
    outside = Path(folder) / OUTSIDE
    if outside.is_file():
        kept = torch.load(outside, map_location="cpu", weights_only=True)
        load_outside_state_(trainer.optimizer, kept)


def _drop_old(run: RunFolder, step: int, keep: int, best: int) -> None:
    """Remove checkpoints but the newest and the best; later ones are those that a resume refused."""
    done = [path for path in run.checkpoints() if step_of(path) <= step]
    for old in done[:-keep]:
        if step_of(old) != best:
            shutil.rmtree(old)


def write_manifest(folder: Path, step: int) -> None:
    """Write down what each file of a checkpoint is, as the last of them.

    Args:
        folder: The checkpoint, complete.
        step: The step that it was written after.
    """
    files = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    text = json.dumps({"step": step, "files": files}, indent=2) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def fault_of(folder: Path) -> str:
    """Say why a checkpoint cannot be trusted; nothing when it is as it was written."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return f"{MANIFEST} is missing"
    try:
        written = json.loads(manifest.read_text(encoding="utf-8"))
        files = {
            name: (about["bytes"], about["sha256"]) for name, about in written["files"].items()
        }
        step = written["step"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not readable"
    if step != step_of(folder):
        return f"it was written after step {step}"
    there = {
        str(file.relative_to(folder))
        for file in folder.rglob("*")
        # A hidden file is what a file manager leaves behind; nothing reads it.
        if file.is_file() and not file.name.startswith(".") and file != manifest
    }
    if extra := sorted(there - files.keys()):
        return f"{extra[0]} was added"
    for name, (num_bytes, sha256) in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != num_bytes:
            return f"{name} has {file.stat().st_size:,} bytes and had {num_bytes:,}"
        if _sha256(file) != sha256:
            return f"{name} is not what was written"
    return ""


def newest_whole(checkpoints: Sequence[Path], tell: Callable[[str], None]) -> Path:
    """Return the newest checkpoint that is as it was written.

    Args:
        checkpoints: Oldest first.
        tell: Called with a sentence for each that is refused.

    Raises:
        InputError: None is.
    """
    faults = []
    for checkpoint in reversed(checkpoints):
        fault = fault_of(checkpoint)
        if not fault:
            return checkpoint
        faults.append(f"'{checkpoint}' is damaged: {fault}")
        if len(faults) < len(checkpoints):
            tell(f"{faults[-1]}; the one before it is tried")
    raise InputError.listing("no checkpoint can be resumed from; start without --resume:", faults)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while block := handle.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def load_weights(trainer: WhetTrainer, step: int) -> str:
    """Load the weights of an earlier checkpoint of this run, and nothing else of it.

    Args:
        trainer: After training.
        step: Which.

    Returns:
        Why they could not be loaded, or nothing.
    """
    folder = trainer.run_folder.checkpoints_dir / f"step-{step}"
    fault = fault_of(folder)
    if not fault:
        Trainer._load_from_checkpoint(trainer, str(folder))  # not the rest of the state
    return fault


def load_before_spreading(model: Any, folder: Path) -> None:
    """Load a checkpoint's weights into a model that is still whole.

    Args:
        model: Adapted as the checkpoint's was.
        folder: A checkpoint that was found whole.
    """
    if hasattr(model, "load_adapter") and hasattr(model, "peft_config"):
        model.load_adapter(str(folder), "default", is_trainable=True)
        return
    for file in sorted(folder.glob("model*.safetensors")):
        model.load_state_dict(load_file(file), strict=False)


def settle(trainer: WhetTrainer, tell: Callable[[str], None]) -> dict[str, Any]:
    """Give the model the weights that the run ends with: the last, or the best.

    Args:
        trainer: After training.
        tell: Called with a sentence on which they are.

    Returns:
        What report.json says of it.
    """
    turn_optimizer(trainer.optimizer, "eval")
    watch, last = trainer.watch, trainer.state.global_step
    if not watch.best_step:
        return {}
    report: dict[str, Any] = {
        "best_step": watch.best_step, "best_heldout_loss": watch.best_loss, "saved_step": last,
        "stopped_early": watch.stopped,
    }  # fmt: skip
    if watch.stopped:
        tell(
            f"stopped after step {last}: {watch.num_worse} measurements in a row without a better "
            f"held-out loss than {watch.best_loss:.4f} of step {watch.best_step}"
        )
    if watch.keep and watch.best_step != last:
        if fault := load_weights(trainer, watch.best_step):
            tell(f"the last weights are saved: the checkpoint of step {watch.best_step}: {fault}")
        else:
            report["saved_step"] = watch.best_step
            tell(
                f"the weights of step {watch.best_step} are saved, which have the best held-out "
                f"loss, {watch.best_loss:.4f}"
            )
    return report


def keep_pissa_start(model: Any, folder: str) -> None:
    """Save the adapter PiSSA starts from, which its conversion to plain LoRA subtracts again.

    Args:
        model: The adapted model, before training.
        folder: Where to.
    """
    settings = model.peft_config["default"]
    settings.init_lora_weights = True
    model.save_pretrained(folder)
    settings.init_lora_weights = "pissa"


def save_weights(
    run: RunFolder, config: Config, trainer: WhetTrainer, tokenizer: Tokenizer, start: str
) -> None:
    """Write adapter/ or model/ whole, which is what the run is for.

    Args:
        run: The run's folder.
        config: Its config.
        trainer: With the trained model.
        tokenizer: Saved with it.
        start: The folder of `keep_pissa_start`.
    """
    lora = config.train.parameters == "lora"
    options: dict[str, Any] = {}
    if lora and config.lora.init == "pissa":
        # PiSSA moves part of the base into the adapter: saved as it is, it would not fit the base.
        options["path_initial_model_for_weight_conversion"] = start
    weights = None if trainer.shards is None else gather_weights(trainer)
    if trainer.world.is_first:
        model: Any = trainer.model
        with whole_folder(run.adapter_dir if lora else run.model_dir) as folder:
            if weights is None:
                model.save_pretrained(str(folder), **options)
            else:
                save_spread(trainer, folder, weights)
            tokenizer.save_pretrained(str(folder))
    trainer.world.agree(None)
