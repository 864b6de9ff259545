"""Optimizer steps in packed passes and on padded batches, the same rows in turns, in one process.

    python -m benchmarks.passes --data rows.json [--dtype bfloat16] [--nf4] [--steps 4] [--json FILE]

SmolLM2-135M, LoRA of rank 16 on every linear layer, steps of eight rows in a seeded order, four ways:
`packed` is what `whet train` does; `padded` is whet on padded batches of 2 with 4 accumulated, which the
engine unpads; `computed` is the same with the padding computed, as an engine without unpadding would (the
mask is left out); `plain` is the padded batches through transformers and peft alone. Then the gradient
of the first step in one pass, two passes and one example a pass, in float32.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine_step import QUICKSTART, read_rows
from whet.data.packing import Packing, StepSampler, efficiency
from whet.data.tokenize import IGNORED, Tokens, collate
from whet.engine import swap
from whet.model.load import load_model, load_tokenizer
from whet.model.loss import summed_loss
from whet.sections import ModelSection

BATCH, PER_PASS, SEED = 8, 2, 3407


def load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Load the model with its adapter and the tokenizer."""
    from peft import LoraConfig, get_peft_model

    section = ModelSection(name="smollm2-135m", load_in_4bit=arguments.nf4)
    model: Any = load_model(section, getattr(torch, arguments.dtype))
    settings = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    torch.manual_seed(SEED)
    model = get_peft_model(model, settings).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # an adapter that is zero would hide errors in half of the gradients
            torch.nn.init.normal_(parameter, std=0.01)
    return model, load_tokenizer(section)


def run_step(model: Any, batches: list[dict[str, torch.Tensor]], num_items: int) -> float:
    """Run the passes of a step and return its loss; gradients stay."""
    total = 0.0
    for batch in batches:
        loss = summed_loss(model, batch)[0] / num_items
        loss.backward()
        total += float(loss.detach())
    return total


def compare_gradients(arguments: argparse.Namespace, rows: list[Tokens]) -> list[str]:
    """Return the lines of the table: one step's gradient for three values of tokens_per_pass."""
    exact = argparse.Namespace(**{**vars(arguments), "dtype": "float32"})
    model, _ = load(exact)
    swap.attach(model)
    num_items = sum(row.num_labels for row in rows)
    whole = sum(len(row.input_ids) for row in rows)
    lines, first = [], None
    for size in (whole, whole // 2 + 64, 1):
        model.zero_grad()
        packing = Packing(size)
        passes = packing.passes(rows)
        loss = run_step(model, [packing.batch(group, 0) for group in passes], num_items)
        flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        first = flat if first is None else first
        apart = float((flat - first).norm() / first.norm())
        lines.append(
            f"tokens_per_pass {size:5}: {len(passes)} passes, loss {loss:.7f}, "
            f"gradient norm {float(flat.norm()):.7f}, apart {apart:.1e}"
        )
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--nf4", action="store_true", help="frozen weights in NF4")
    parser.add_argument("--data", type=Path, default=QUICKSTART)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model, tokenizer = load(arguments)
    rows = [
        Tokens(ids, [IGNORED, *labels[1:]], str(number))
        for number, (ids, labels) in enumerate(
            read_rows(arguments.data, tokenizer, BATCH * arguments.steps)
        )
    ]
    sampler = StepSampler([len(row.input_ids) for row in rows], BATCH, SEED)
    steps = [[rows[i] for i in step] for step in sampler]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    report = swap.attach(model)
    packing = Packing(max(sum(len(row.input_ids) for row in step) for step in steps))
    batches = {
        "packed": [[packing.batch(g, 0) for g in packing.passes(step)] for step in steps],
        "padded": [
            [collate(step[i : i + PER_PASS], 0) for i in range(0, BATCH, PER_PASS)]
            for step in steps
        ],
    }
    batches["computed"] = [
        [{k: v for k, v in part.items() if k != "attention_mask"} for part in passes]
        for passes in batches["padded"]
    ]
    batches["plain"] = batches["padded"]
    seconds: dict[str, list[float]] = {kind: [] for kind in batches}
    for round_ in range(arguments.rounds + 1):
        for kind, parts in batches.items():
            start = time.perf_counter()
            for step, passes in zip(steps, parts, strict=True):
                num_items = sum(row.num_labels for row in step)
                if kind == "plain":
                    with swap.paused(model):
                        run_step(model, passes, num_items)
                else:
                    run_step(model, passes, num_items)
                optimizer.step()
                optimizer.zero_grad()
            if round_:  # the first warms up
                seconds[kind].append((time.perf_counter() - start) / len(steps))
    real = sum(len(row.input_ids) for row in rows)
    entered = sum(part["input_ids"].numel() for passes in batches["padded"] for part in passes)
    kind = f"{arguments.dtype}{', NF4' if arguments.nf4 else ''}"
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, {kind}; {report.lines()[0]}")
    print(
        f"{len(rows)} rows in {len(steps)} steps, {real:,} tokens; padding efficiency: padded "
        f"{real / entered:.1%}, packed {efficiency(packing, steps):.1%}, packed to 32 lengths "
        f"{efficiency(Packing(packing.tokens_per_pass, buckets=True), steps):.1%}"
    )
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        print(
            f"{name:8} {middle[name]:6.2f} s a step ({min(values):.2f} to {max(values):.2f}), "
            f"{middle[name] / middle['packed']:.2f} times packed"
        )
    lines = compare_gradients(arguments, steps[0])
    print("\n".join(lines))
    if arguments.json:
        found = {"kind": kind, "seconds": seconds, "gradients": lines, "tokens": real}
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
