"""The engine in a model of the drop-in API: put in, told what to keep, set aside to generate."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from whet.engine.memory import Policy
from whet.engine.swap import attach, base_of, set_paused, set_policies
from whet.errors import InputError
from whet.model import CausalLM
from whet.model.load import device
from whet.plan.memory import LEAST
from whet.plan.policy import policy_of_gradient_checkpointing

if TYPE_CHECKING:
    from whet.engine.report import SwapReport

logger = logging.getLogger(__name__)


def put_engine(model: CausalLM, checkpointing: bool | str = False) -> SwapReport:
    """Put the engine into a model and say what it does not compute.

    Args:
        model: A transformers model, or a peft model around one.
        checkpointing: As `use_gradient_checkpointing`.
    """
    report = attach(model)
    first, *kept = report.lines()
    logger.info(first)
    for line in kept:
        logger.warning(line)
    checkpoint(model, report, checkpointing)
    return report


def checkpoint(model: CausalLM, report: SwapReport | None, checkpointing: bool | str) -> None:
    """Say what is kept until the backward pass: by policy where layers are fused, else by transformers.

    Args:
        model: A model with the engine in it.
        report: What the engine computes.
        checkpointing: As `use_gradient_checkpointing`.
    """
    base = base_of(model)
    num = report.layers_total if report else 0
    if num:
        set_policies(model, policies_of(checkpointing, num))
    wanted = str(checkpointing).lower() != "false"
    set_checkpointing(base, wanted and (report is None or report.layers_fused < num))


def policies_of(checkpointing: bool | str, num_layers: int) -> tuple[Policy, ...]:
    """Return what each layer keeps, as `use_gradient_checkpointing` asks for it.

    Args:
        checkpointing: False, True or "unsloth". On a CPU tensors are in host memory already, so that
            "unsloth" is True there; scratch files are for `plan.policy: offload` alone.
        num_layers: How many layers there are.

    Raises:
        InputError: It is something else.
    """
    try:
        way = policy_of_gradient_checkpointing(checkpointing)
    except ValueError as error:
        raise InputError(str(error)) from error
    if way == "offload" and device().type == "cpu":
        way = "recompute"
    known = {"keep": Policy(), "recompute": LEAST}
    known["offload"] = replace(LEAST, hidden="offload", attention="offload")
    return (known[way],) * num_layers


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from a seed inside the body, and leave torch's random state as it was."""
    import torch

    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def set_aside(model: CausalLM, aside: bool) -> None:
    """Let transformers' own code run, with a cache, or the engine again.

    Args:
        model: A model with the engine in it.
        aside: Whether the engine is out of the way.
    """
    base = base_of(model)
    set_paused(base, aside)
    base.config.get_text_config().use_cache = aside
    if base.generation_config is not None:
        base.generation_config.use_cache = True


def is_checkpointing(base: CausalLM) -> bool:
    """Tell whether transformers' checkpointing is on."""
    return any(getattr(module, "gradient_checkpointing", False) for module in base.modules())


def set_checkpointing(base: CausalLM, on: bool) -> None:
    """Turn transformers' checkpointing on or off; without reentry frozen inputs need no gradient."""
    new = hasattr(base, "activation_checkpointing_enable")
    kind = "activation" if new else "gradient"
    if on:
        options = {f"{kind}_checkpointing_kwargs": {"use_reentrant": False}}
        getattr(base, f"{kind}_checkpointing_enable")(**options)
    elif is_checkpointing(base):
        getattr(base, f"{kind}_checkpointing_disable")()
