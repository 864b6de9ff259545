"""The work that is measured, by name."""

from __future__ import annotations

from benchmarks.peers.job import Workload

# One row: padding-free or not is the same there, and a step takes half a minute.
_LONG = {"hf": ["default"], "trl": ["default"], "unsloth": ["default", "kept"]}
_ALL = [
    # CPU: a real model of 135 M weights.
    Workload("alpaca-bf16", rounds=3, heldout=16, device="cpu"),
    Workload("alpaca-fp32", dtype="float32", device="cpu"),
    Workload("alpaca-nf4", load_in_4bit=True, rounds=3, heldout=16, device="cpu"),
    Workload("alpaca-full", dtype="float32", parameters="full", learning_rate=2e-5, device="cpu"),
    Workload(
        "long-4k",
        data="long",
        length=4096,
        batch_size=1,
        accumulation=1,
        rounds=3,
        heldout=8,
        device="cpu",
        variants=_LONG,
        at_once=3,
    ),
    Workload(
        "long-16k",
        data="long",
        length=16384,
        batch_size=1,
        accumulation=1,
        rounds=3,
        device="cpu",
        variants=_LONG,
        at_once=3,
    ),
    Workload("pairs-bf16", data="pairs", length=1024, batch_size=2, accumulation=2, device="cpu"),
    # The same in small: seconds a run, for tests and for `make bench-quick`.
    Workload("quick", batch_size=2, accumulation=2, length=256, rounds=5, heldout=4, device="cpu"),
]
# GPU: published shapes with seeded weights (benchmarks.shapes), Alpaca rows of 2 x 4 and long rows.
for _model, _nf4 in (
    ("qwen2.5-0.5b", False),
    ("llama-3.2-1b", False),
    ("llama-3.2-3b", False),
    ("llama-3.1-8b", False),
    ("llama-3.1-8b", True),
    ("qwen3-14b", True),
    ("llama-3.1-70b", True),
):
    _kind = "qlora" if _nf4 else "lora"
    for _rank in (16, 32):
        _name = f"{_model}-{_kind}" + ("" if _rank == 16 else f"-r{_rank}")
        _ALL.append(
            Workload(_name, _model, load_in_4bit=_nf4, rank=_rank, warm=3, rounds=10, device="cuda")
        )
    for _length in (512, 2048, 4096, 16384, 65536):
        _rows = max(1, 8192 // _length)
        _ALL.append(
            Workload(
                f"{_model}-{_kind}-{_length}",
                _model,
                data="long",
                load_in_4bit=_nf4,
                length=_length,
                batch_size=min(2, _rows),
                accumulation=max(1, _rows // 2),
                warm=2,
                rounds=6,
                heldout=8,
                device="cuda",
            )
        )
_ALL += [
    Workload(f"{_model}-full", _model, parameters="full", learning_rate=1e-5, warm=3, device="cuda")
    for _model in ("qwen2.5-0.5b", "llama-3.2-1b", "llama-3.2-3b")
]

WORKLOADS: dict[str, Workload] = {work.name: work for work in _ALL}
