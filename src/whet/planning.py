"""What `whet plan` does: read what of the data can be read, and plan, on this machine or for a card."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from whet.config import Config
from whet.data.gates import check_gates
from whet.data.prepare import prepare
from whet.data.store import count_labels, lengths_of
from whet.data.template import set_chat_template
from whet.errors import InputError
from whet.model.load import choose_dtype, load_tokenizer, max_length
from whet.model.load import device as here
from whet.plan.plan import Plan, make_plan, workload_of
from whet.plan.target import target_of


def plan_config(config: Config, device: str | None = None, memory: str | None = None) -> Plan:
    """Plan a config without loading a weight.

    Args:
        config: A checked config.
        device: `cpu`, `cuda` or a card's name; None is this machine's own, or a card with `memory`.
        memory: Memory to plan for, such as 12GB; None takes `plan.memory`, or 90% of what is free.

    Raises:
        InputError: The model, the card or the amount is not known.
    """
    limit = max_length(config.model)
    dtype, _ = choose_dtype(config.model.dtype, config.train.parameters != "lora")
    lengths, num_labels, why = _read_lengths(config, limit)
    workload = workload_of(config, lengths, num_labels, limit)
    target = target_of(device, memory or config.plan.memory, dtype, named=memory is not None)
    if target.device == "cuda" != here().type and not config.model.dtype:
        # The card is not here to be asked; what is sold today computes bfloat16.
        dtype = torch.bfloat16 if config.train.parameters == "lora" else torch.float32
    plan = make_plan(config, workload, target, dtype)
    return replace(plan, notes=(*plan.notes, *([why] if why else [])))


def _read_lengths(config: Config, limit: int) -> tuple[list[int] | None, int, str]:
    """Return the examples' lengths, the labels among them, and why they could not be read."""
    sources = config.data.train
    sources = [sources] if isinstance(sources, str) else sources
    if not all(sources) or not sources:
        return None, 0, "data.train names no file"
    if missing := [s for s in sources if Path(s).suffix and not Path(s).exists()]:
        raise InputError(f"there is no data file '{missing[0]}'", fix="check data.train")
    try:
        tokenizer = load_tokenizer(config.model)
    except InputError:
        return None, 0, f"'{config.model.name}' has no tokenizer here to measure the data with"
    template = set_chat_template(tokenizer, config.model.chat_template)
    try:
        data = prepare(config.data, tokenizer, limit, template)
        check_gates(data.report, config.data.allow)
    except InputError as error:
        if all(Path(s).exists() for s in sources):
            raise
        return None, 0, f"the data is not here: {error}"  # a Hub id, without a network
    return (
        lengths_of(data.train).tolist(),
        count_labels(data.train),
        "",
    )
