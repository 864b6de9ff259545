"""Answers a second: whet's loop and transformers' generate, in turns, in one process.

    python -m benchmarks.generate [--weights base lora nf4] [--dtype bfloat16] [--rounds 5] [--json FILE]

SmolLM2-135M, greedy, a given number of new tokens behind prompts of 9 to 23 tokens, one sequence and
four. Three ways: transformers' `generate` on a model that whet has not touched; the same `generate` after
`FastLanguageModel.for_inference`, whose new tokens the engine makes; and `whet generate`'s loop. Times
are of whole answers, prompts read, divided by the tokens of each. The floor is what one token cannot go
below: the bytes of the weights once, at the rate at which this machine copies memory.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from whet.answer import Request
from whet.decoding import Batch, make_decoder
from whet.engine import swap
from whet.engine.ready import decode_for_generate
from whet.generate import Sampling, complete
from whet.model.load import load_model, load_tokenizer
from whet.sections import ModelSection

PROMPTS = [
    "The capital of France is a large city with a river",
    "To bake bread one needs",
    "In the year 1905 a clerk in the patent office of Bern wrote four papers, of which the first",
    "An oak and an elm stood by the road, and the oak said",
]
Way = Callable[[list[list[int]]], list[list[int]]]


def load(kind: str, dtype: torch.dtype) -> Any:
    """Load the model, with an adapter of rank 16 on every linear layer, or in NF4, or as it is."""
    section = ModelSection(name="smollm2-135m", load_in_4bit=kind == "nf4")
    model: Any = load_model(section, dtype).eval()
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(
            task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"
        )
        model = get_peft_model(model, settings).eval()
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.002)
    return model


def ways(kind: str, dtype: torch.dtype, num_new: int) -> tuple[dict[str, Way], int]:
    """Return the three ways, and the bytes of the weights that a token goes through."""
    plain, ours = load(kind, dtype), load(kind, dtype)
    _repack_4bit(plain)
    tokenizer = load_tokenizer(ModelSection(name="smollm2-135m"))

    def by_generate(model: Any) -> Way:
        def run(prompts: list[list[int]]) -> list[list[int]]:
            longest = max(map(len, prompts))
            ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
            with torch.inference_mode():
                found = model.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=num_new, do_sample=False,
                    eos_token_id=None, pad_token_id=0,
                )  # fmt: skip
            return found[:, longest:].tolist()

        return run

    swap.attach(ours)
    reason = decode_for_generate(ours, True)
    if reason:
        print(f"{kind}: the engine does not decode: {reason}")
    batch = Batch(make_decoder(ours, tokenizer), tokenizer, [])
    sampling = Sampling(max_new_tokens=num_new, repetition_penalty=1.0)

    def by_loop(prompts: list[list[int]]) -> list[list[int]]:
        answers = complete(batch, [Request(ids, sampling) for ids in prompts], len(prompts))
        return [answer.tokens for answer in answers]

    num = sum(p.numel() for n, p in load("base", dtype).named_parameters())
    found: dict[str, Way] = {
        "transformers": by_generate(plain), "for_inference": by_generate(ours), "whet": by_loop,
    }  # fmt: skip
    return found, num * dtype.itemsize


def _repack_4bit(model: Any) -> None:
    """Let bitsandbytes repack 4-bit weights for inference as it does by itself; whet forbids it."""
    from bitsandbytes.functional import has_avx512bf16

    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = has_avx512bf16()


def copy_rate() -> float:
    """Return the bytes a second that this machine reads while it copies memory."""
    source = torch.ones(128 * 2**20, dtype=torch.uint8)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(10):
        start = time.perf_counter()
        target.copy_(source)
        best = max(best, len(source) / (time.perf_counter() - start))
    return best


def agreement(one: list[list[int]], other: list[list[int]]) -> float:
    """Return the share of tokens before the first that differs, over all answers."""
    same = 0
    for a, b in zip(one, other, strict=True):
        same += next((n for n, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
    return same / sum(map(len, one))


def measure(kind: str, dtype: torch.dtype, num_new: int, rounds: int) -> list[dict[str, Any]]:
    """Measure one kind of weights, one sequence and four."""
    found, weight_bytes = ways(kind, dtype, num_new)
    tokenizer = load_tokenizer(ModelSection(name="smollm2-135m"))
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROMPTS]
    rows = []
    for num in (1, len(prompts)):
        answers = {name: way(prompts[:num]) for name, way in found.items()}  # warm
        ms: dict[str, list[float]] = {name: [] for name in found}
        rates = []
        for _ in range(rounds):
            rates.append(copy_rate())
            for name, way in found.items():
                start = time.perf_counter()
                way(prompts[:num])
                ms[name].append((time.perf_counter() - start) / num_new * 1e3)
        middle = {name: statistics.median(values) for name, values in ms.items()}
        rows.append({
            "weights": kind, "dtype": str(dtype).removeprefix("torch."), "sequences": num,
            "new_tokens": num_new, "ms": ms, "median_ms": middle,
            "ratio": {name: middle["transformers"] / value for name, value in middle.items()},
            "copy_gb_per_s": statistics.median(rates) / 1e9,
            "floor_ms": weight_bytes / statistics.median(rates) * 1e3,
            "same_tokens": {name: agreement(answers["transformers"], value)
                            for name, value in answers.items()},
        })  # fmt: skip
        row = rows[-1]
        told = "  ".join(
            f"{name} {value:.1f} ms (x{row['ratio'][name]:.2f})" for name, value in middle.items()
        )
        print(
            f"{kind:5} {num} at once: {told}  floor {row['floor_ms']:.1f} ms at "
            f"{row['copy_gb_per_s']:.1f} GB/s  same tokens {row['same_tokens']['whet']:.0%}",
            flush=True,
        )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", nargs="+", default=["base", "lora", "nf4"])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, per step:"
    )
    dtype = getattr(torch, arguments.dtype)
    rows = [
        row
        for kind in arguments.weights
        for row in measure(kind, dtype, arguments.new_tokens, arguments.rounds)
    ]
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
