"""The tables of docs/scale.md: 8, 64 and 1,024 GPUs, 8B, 70B and 405B, by calculation alone.

    python -m benchmarks.scale            print the tables
    python -m benchmarks.scale --write    put them into docs/scale.md

A model of one layer of each shape is planned and deepened; no weight is made and nothing is measured.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.shapes import SHAPES
from whet.config import Config
from whet.config_file import load_config
from whet.plan.parallel import (
    RankPlan,
    Ranks,
    checkpoint_of,
    largest_that_fits,
    plan_strategy,
    ranks_of,
    strategies,
)
from whet.plan.plan import Plan, make_plan, workload_of
from whet.plan.target import target_of
from whet.plan.traffic import Cluster

PAGE = Path(__file__).parents[1] / "docs/scale.md"
MODELS = {"8B": "llama-3.1-8b", "70B": "llama-3.1-70b", "405B": "llama-3.1-405b"}
SIZES = (8, 64, 1024)
TOKENS = 4096  # one example of so many for each GPU in a step
BEGIN, END = "<!-- benchmarks/scale.py: begin -->\n", "<!-- benchmarks/scale.py: end -->\n"


@functools.cache
def _one_layer(model: str, full: bool) -> tuple[Config, Plan]:
    """Plan one layer of a shape, for one example and one GPU."""
    shape = {**SHAPES[MODELS[model]], "num_hidden_layers": 1}
    dtype = torch.float32 if full else torch.bfloat16
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        settings = {
            "model": {"name": folder, "dtype": None if full else "bfloat16"},
            "data": {"train": "rows.jsonl"},
            "train": {"batch_size": 1, "parameters": "full" if full else "lora"},
        }
        config = load_config(settings, [])
        workload = workload_of(config, [TOKENS] * 1024, 1024 * TOKENS, TOKENS)
        target = target_of("H100", None, dtype)
        return config, make_plan(config, workload, target, dtype, advise=False)


def ranks_for(model: str, full: bool, num: int) -> Ranks:
    """Describe a run of a shape on machines with eight H100 each.

    Args:
        model: Of MODELS.
        full: Train all weights, in float32 with bfloat16 products; else adapters of rank 16.
        num: GPUs.
    """
    config, plan = _one_layer(model, full)
    whole = replace(plan.workload, batch_size=num)
    depth = SHAPES[MODELS[model]]["num_hidden_layers"]
    return ranks_of(config, plan, Cluster(num, num // 8), whole).deepened(depth)


def tables() -> str:
    """Return all tables as Markdown."""
    return "\n".join(line for full in (False, True) for line in _tables(full)) + "\n"


def _tables(full: bool) -> Iterator[str]:
    yield f"### {'Full fine-tuning' if full else 'LoRA, rank 16'}"
    one: dict[str, Ranks] = {}
    for model in MODELS:
        one[model] = ranks_for(model, full, 8)
        yield from ("", f"**{model}**", "")
        yield (
            "| GPUs | strategy | a rank, GiB | host, a node, GiB | sent a step, GiB | computing, s "
            "| communication, s | of it waiting, s | fits |"
        )
        yield "|---:|---|---:|---:|---:|---:|---:|---:|---|"
        for num in SIZES:
            ranks = one[model] if num == 8 else ranks_for(model, full, num)
            for strategy in strategies(ranks):
                yield _row(num, plan_strategy(ranks, strategy))
    yield from ("", "Checkpoints, and the deepest model of the 8B's layers that fits:", "")
    yield "| | a checkpoint, GB | to write at 2 GB/s, s |"
    yield "|---|---:|---:|"
    for model, ranks in one.items():
        found = checkpoint_of(ranks)
        yield f"| {model} | {found.num_bytes / 1e9:,.1f} | {found.seconds:,.1f} |"
    yield from ("", "| GPUs | ddp | fsdp | zero3 + offload |", "|---:|---:|---:|---:|")
    for num in SIZES:
        ranks = one["8B"] if num == 8 else ranks_for("8B", full, num)
        known = {s.name(num): s for s in strategies(ranks)}
        cells = [
            f"{largest_that_fits(ranks, known[name]) / 1e9:,.1f}B"
            for name in ("ddp", "fsdp", "zero3 + offload")
        ]
        yield f"| {num:,} | {' | '.join(cells)} |"
    yield ""


def _row(num: int, plan: RankPlan) -> str:
    host = f"{plan.host_bytes / 2**30:,.0f}" if plan.host_bytes else ""
    return (
        f"| {num:,} | {plan.name} | {plan.choice.peak_bytes / 2**30:,.1f} | {host} "
        f"| {plan.sent_bytes / 2**30:,.1f} | {plan.choice.step_seconds:.2f} "
        f"| {plan.communication_seconds:.2f} | {plan.exposed_seconds:.2f} "
        f"| {'not run' if plan.why_not else 'yes' if plan.fits else 'no'} |"
    )


def rewritten(page: str) -> str:
    """Return a page with its tables made again."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + tables() + END + rest.split(END)[1]


def main() -> None:
    """Print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put them into docs/scale.md")
    if parser.parse_args().write:
        PAGE.write_text(rewritten(PAGE.read_text()))
    else:
        print(tables())


if __name__ == "__main__":
    main()
