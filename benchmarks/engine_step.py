"""One optimizer step with the engine in and out: the same rows, in turns, in one process.

    python -m benchmarks.engine_step --dtype bfloat16 [--nf4] [--data rows.json] [--json FILE]

SmolLM2-135M, LoRA of rank 16 on every linear layer, eight rows in four padded passes of two (a step of
2 x 4). Rows are Alpaca's columns, or the quickstart's messages when no file is named. "Out" is plain
transformers + peft through `model(..., labels=...)`. Memory is the peak above the loaded model, of a
process that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from whet.engine import swap
from whet.model.load import load_model, load_tokenizer
from whet.sections import ModelSection

ROWS, PASSES = 8, 4
QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart" / "train.jsonl"


def read_rows(file: Path, tokenizer: Any, num: int = ROWS) -> list[tuple[list[int], list[int]]]:
    """Return ids and labels of the first rows; the prompt is not learned."""
    text = file.read_text()
    rows = json.loads(text) if text.lstrip().startswith("[") else map(json.loads, text.splitlines())
    made = []
    for row in list(rows)[:num]:
        if "messages" in row:
            prompt, answer = (message["content"] for message in row["messages"][-2:])
        else:
            prompt, answer = f"{row['instruction']}\n{row['input']}\n", row["output"]
        a, b = tokenizer(prompt)["input_ids"], tokenizer(answer + tokenizer.eos_token)["input_ids"]
        made.append((a + b, [-100] * len(a) + b))
    return made


def batches(rows: list[tuple[list[int], list[int]]]) -> list[dict[str, torch.Tensor]]:
    """Pad the rows on the right, pass by pass, as a plain collator does."""
    made = []
    size = ROWS // PASSES
    for start in range(0, ROWS, size):
        part = rows[start : start + size]
        longest = max(len(ids) for ids, _ in part)
        space = [longest - len(ids) for ids, _ in part]
        made.append(
            {
                "input_ids": torch.tensor(
                    [i + [0] * s for (i, _), s in zip(part, space, strict=True)]
                ),
                "attention_mask": torch.tensor(
                    [[1] * len(i) + [0] * s for (i, _), s in zip(part, space, strict=True)]
                ),
                "labels": torch.tensor(
                    [y + [-100] * s for (_, y), s in zip(part, space, strict=True)]
                ),
            }
        )
    return made


def stepper(arguments: argparse.Namespace) -> tuple[Any, Callable[[], float], dict[str, int]]:
    """Load the model with its adapter, and return it with a function that makes one step."""
    from peft import LoraConfig, get_peft_model

    section = ModelSection(name="smollm2-135m", load_in_4bit=arguments.nf4)
    tokenizer = load_tokenizer(section)
    model: Any = load_model(section, getattr(torch, arguments.dtype))
    settings = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(model, settings).train()
    parts = batches(read_rows(arguments.data, tokenizer))
    count = sum(int((part["labels"][:, 1:] != -100).sum()) for part in parts)
    tokens = {
        "tokens": sum(int(part["attention_mask"].sum()) for part in parts),
        "padded_tokens": sum(part["input_ids"].numel() for part in parts),
        "labelled_tokens": count,
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)  # the same weights at every step

    def step() -> float:
        total = 0.0
        for part in parts:
            loss = model(**part, num_items_in_batch=count, use_cache=False).loss
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        return total

    return model, step, tokens


def resident_bytes(peak: bool = False) -> int:
    """Return this process's resident memory, or its peak since it was last forgotten (Linux)."""
    status = Path("/proc/self/status").read_text()
    key = "VmHWM:" if peak else "VmRSS:"
    return int(status.split(key)[1].split()[0]) * 1024


def measure_memory(arguments: argparse.Namespace) -> int:
    """Return the peak above the loaded model of a few steps, all of one kind."""
    model, step, _ = stepper(arguments)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    before = resident_bytes()
    if arguments.only == "in":
        swap.attach(model, swap.EngineSettings(check="off"))
    for _ in range(3):
        step()
    return resident_bytes(peak=True) - before


def main() -> None:
    """Measure and print; the last line says what it comes to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--nf4", action="store_true", help="frozen weights in NF4")
    parser.add_argument("--data", type=Path, default=QUICKSTART)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=["in", "out"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(measure_memory(arguments))
        return
    model, step, tokens = stepper(arguments)
    report = swap.attach(model)
    seconds: dict[str, list[float]] = {"in": [], "out": []}
    losses: dict[str, float] = {}
    step()
    for _ in range(arguments.rounds):
        for kind in ("in", "out"):
            start = time.perf_counter()
            if kind == "in":
                losses[kind] = step()
            else:
                with swap.paused(model):
                    losses[kind] = step()
            seconds[kind].append(time.perf_counter() - start)
    command = [sys.executable, "-m", "benchmarks.engine_step", *sys.argv[1:], "--only"]
    memory = {
        kind: int(
            subprocess.run([*command, kind], capture_output=True, check=True).stdout.split()[-1]
        )
        for kind in ("in", "out")
    }
    middle = {kind: statistics.median(values) for kind, values in seconds.items()}
    kind = f"{arguments.dtype}{', NF4' if arguments.nf4 else ''}"
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {kind}"
    )
    print(f"{tokens}; {report.lines()[0]}; loss {losses['in']:.5f} and {losses['out']:.5f}")
    for name in ("in", "out"):
        spread = f"{min(seconds[name]):.2f} to {max(seconds[name]):.2f}"
        print(
            f"engine {name:3}  {middle[name]:6.2f} s ({spread})  {memory[name] / 2**30:5.2f} GiB above"
        )
    print(f"ratio {middle['out'] / middle['in']:.2f}, memory {memory['in'] / memory['out']:.2f}")
    if arguments.json:
        found = {"kind": kind, **tokens, "seconds": seconds, "memory_bytes": memory, "loss": losses}
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
