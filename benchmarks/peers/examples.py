"""The rows that every framework gets: tokenised once, in whet's environment, and written down."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.peers.job import Workload

PROMPT = "### Instruction:\n{instruction}\n\n### Response:\n"
QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart" / "train.jsonl"


def write_rows(work: Workload, model: str, data: Path | None, folder: Path) -> tuple[Path, Path]:
    """Write the rows that are trained on, and those of the evaluation.

    Args:
        work: The workload.
        model: Folder with the tokenizer.
        data: Folder with the public sample files; None uses the quickstart's rows for everything.
        folder: Where the two files go.

    Returns:
        The two files: `input_ids` and `labels` (preference pairs: three texts) in JSON lines.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    makers = {"alpaca": _alpaca, "pairs": _pairs, "long": _long}
    folder.mkdir(parents=True, exist_ok=True)
    found = makers[work.data](tokenizer, work, data)
    files = folder / "rows.jsonl", folder / "heldout.jsonl"
    # The evaluation's rows come first, so that they are the same however many steps there are.
    heldout = _alpaca(tokenizer, work, data)
    _write(files[1], [next(heldout) for _ in range(work.heldout)])
    if work.data == "alpaca":
        found = heldout
    _write(files[0], [next(found) for _ in range(work.rows)])
    return files


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _forever(rows: Iterable[Any], work: Workload) -> Iterator[Any]:
    """Repeat rows for as long as they are wanted."""
    yield from (kept := list(rows))
    if not kept:
        raise ValueError(f"no row of '{work.data}' has at most {work.length} tokens")
    while True:
        yield from kept


def _alpaca(tokenizer: Any, work: Workload, data: Path | None) -> Iterator[dict[str, Any]]:
    def rows() -> Iterator[dict[str, Any]]:
        for question, answer in _turns(data):
            prompt = tokenizer(PROMPT.format(instruction=question))["input_ids"]
            learned = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
            if len(prompt) + len(learned) <= work.length:
                labels = [-100] * len(prompt) + learned
                yield {"input_ids": prompt + learned, "labels": labels}

    return _forever(rows(), work)


def _turns(data: Path | None) -> list[tuple[str, str]]:
    if data is None:
        lines = [json.loads(line)["messages"] for line in QUICKSTART.read_text().splitlines()]
        return [(m[-2]["content"], m[-1]["content"]) for m in lines]
    rows = json.loads((data / "alpaca_en_demo.json").read_text())
    return [("\n\n".join(filter(None, [r["instruction"], r["input"]])), r["output"]) for r in rows]


def _long(tokenizer: Any, work: Workload, data: Path | None) -> Iterator[dict[str, Any]]:
    """Cut one long text into rows of exactly `length` tokens, all of them learned."""
    if data is None:
        text = "\n".join(f"{q}\n{a}" for q, a in _turns(None))
    else:
        text = (data / "wiki_demo.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, verbose=False)["input_ids"]
    start = 0
    while True:
        row = (ids + ids)[start : start + work.length]
        row = row * -(-work.length // len(row))
        yield {"input_ids": row[: work.length], "labels": row[: work.length]}
        start = (start + work.length) % len(ids)


def _pairs(tokenizer: Any, work: Workload, data: Path | None) -> Iterator[dict[str, Any]]:
    if data is None:
        turns = _turns(None)
        rows = [
            {"prompt": PROMPT.format(instruction=q), "chosen": a, "rejected": other}
            for (q, a), (_, other) in zip(turns, turns[1:], strict=False)
        ]
    else:
        rows = [
            {
                "prompt": PROMPT.format(
                    instruction="\n\n".join(turn["value"] for turn in row["conversations"])
                ),
                "chosen": row["chosen"]["value"],
                "rejected": row["rejected"]["value"],
            }
            for row in json.loads((data / "dpo_en_demo.json").read_text())
        ]

    def fits(row: dict[str, str]) -> bool:
        return all(
            len(tokenizer(row["prompt"] + row[kind])["input_ids"]) < work.length
            for kind in ("chosen", "rejected")
        )

    return _forever((row for row in rows if fits(row)), work)
