"""What whet's cost grows with: nothing but attention may be worse than linear.

    python -m benchmarks.scaling [--parts tokens,length,rank,batch,rows] [--long] [--out FILE]

SmolLM2-135M in bfloat16 with LoRA and the engine, in one process: whole optimizer steps on documents of
random tokens, one size varied at a time. Then the data pipeline, `whet.data.prepare.prepare`, on
generated chat rows, each number of rows in a process of its own. The exponent is the slope of
log(seconds) over log(size), least squares over the upper half of the sizes, where what a pass costs by
itself no longer hides it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import ROOT
from benchmarks.peers.report import markdown_table
from benchmarks.peers.worker import Memory
from benchmarks.quality import head_of

LINEAR = 1.05  # an exponent up to this is called linear
ROUNDS = 3
DOCUMENT = 128  # tokens of a document where their length is not what is varied
PASS = 1024  # tokens of a pass where that is not what is varied
RANK = 16
SEED = 3407


@dataclass(frozen=True)
class Part:
    """One thing that is varied.

    Args:
        title: Of the plot and of the table.
        unit: What a size counts.
        sizes: From small to large.
        quadratic: Whether attention's part grows with the square of the size.
    """

    title: str
    unit: str
    sizes: tuple[int, ...]
    quadratic: bool = False


PARTS = {
    "tokens": Part(
        f"tokens of a pass, in documents of {DOCUMENT}", "token", (256, 512, 1024, 2048, 4096, 8192)
    ),
    "length": Part(
        "tokens of the only document", "token", (256, 512, 1024, 2048, 4096, 8192, 16384), True
    ),
    "rank": Part(
        f"LoRA rank, a pass of {PASS} tokens", "rank", (4, 8, 16, 32, 64, 128, 256)
    ),
    "batch": Part(
        f"rows of {DOCUMENT} tokens an optimizer step, {PASS} tokens a pass", "row",
        (1, 2, 4, 8, 16, 32),
    ),
    "rows": Part("rows of the data pipeline", "row", (1_000, 10_000, 100_000)),
}  # fmt: skip


@dataclass
class Point:
    """What one size took.

    Args:
        size: The size.
        seconds: Of each timed run.
        above_bytes: Peak resident memory above what was there before; None where it cannot be told.
        notes: More about it, for the result file.
    """

    size: int
    seconds: list[float]
    above_bytes: int | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Median of the seconds."""
        return statistics.median(self.seconds)


def upper_half(values: Sequence[Any]) -> Sequence[Any]:
    """Return the upper half of some values: the middle one among them, two at least."""
    return values[min(len(values) // 2, len(values) - 2) :]


def fit_exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return the slope of log(cost) over log(size), least squares over the upper half of the sizes."""
    import numpy

    x, y = (numpy.log(upper_half(values)) for values in (sizes, costs))
    return float(numpy.polyfit(x, y, 1)[0])


def split_square(sizes: Sequence[float], costs: Sequence[float]) -> tuple[float, float, float]:
    """Split costs into a n + b n^2, least squares of the relative error over the upper half.

    Returns:
        a and b, neither below zero, and the largest relative error of a size.
    """
    import numpy

    n, y = (numpy.asarray(upper_half(values), dtype=float) for values in (sizes, costs))
    terms = numpy.stack([n, n**2], axis=1) / y[:, None]
    scale = terms.max(axis=0)  # the two columns are thousands apart
    a, b = numpy.linalg.lstsq(terms / scale, numpy.ones_like(y), rcond=None)[0] / scale
    if min(a, b) < 0:  # then the other alone
        alone = terms.sum(axis=0) / (terms**2).sum(axis=0)
        a, b = (alone[0], 0.0) if b < 0 else (0.0, alone[1])
    error = numpy.abs(terms @ numpy.array([a, b]) - 1).max()
    return float(a), float(b), float(error)


def make_model(name: str, rank: int) -> tuple[Any, Any]:
    """Load a model in bfloat16 with its adapter and the engine, and make its optimizer."""
    import torch
    from peft import LoraConfig, get_peft_model

    from whet.engine import swap
    from whet.model.load import load_model
    from whet.sections import ModelSection

    torch.manual_seed(SEED)
    base: Any = load_model(ModelSection(name=name), torch.bfloat16)
    settings = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear"
    )
    model = get_peft_model(base, settings).train()
    swap.attach(model, swap.EngineSettings(strict=True))
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)


def make_step(
    model: Any, optimizer: Any, num: int, length: int, tokens_per_pass: int
) -> Callable[[], float]:
    """Return a function that makes one optimizer step on random documents, all tokens learned."""
    from benchmarks.passes import run_step
    from whet.data.packing import Packing
    from whet.data.tokenize import Tokens

    dice, vocabulary = random.Random(SEED), model.config.vocab_size
    documents = [[dice.randrange(vocabulary) for _ in range(length)] for _ in range(num)]
    rows = [Tokens(ids, list(ids), "") for ids in documents]
    packing = Packing(tokens_per_pass)
    passes: list[Any] = [packing.packed_pass(group, 0, False) for group in packing.passes(rows)]

    def step() -> float:
        loss = run_step(model, passes, num * (length - 1))
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def watch_memory() -> Callable[[], int | None]:
    """Return a function that tells the peak of resident memory above what is held now."""
    memory = Memory("cpu")
    try:
        memory.mark_loaded()
    except OSError:  # Linux alone tells it
        return lambda: None
    return lambda: memory.peak()["above"]


def time_step(step: Callable[[], float], size: int, rounds: int, allowance: float) -> Point:
    """Time a step: once to warm up, then in rounds.

    A first step of more than half the allowance (in seconds) counts, and there are fewer rounds.
    """
    peak_above = watch_memory()
    start = time.perf_counter()
    loss = step()
    first = time.perf_counter() - start
    seconds, spent = ([first] if first > allowance / 2 else []), first
    while not seconds or (len(seconds) < rounds and spent + first <= allowance):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
        spent += seconds[-1]
    return Point(size, seconds, peak_above(), {"loss": loss})


def measure(name: str, sizes: Sequence[int], arguments: argparse.Namespace) -> Iterator[Point]:
    """Measure the sizes of a part; numbers of rows each in a process of its own."""
    if name == "rows":
        command = [sys.executable, "-m", "benchmarks.scaling", "--model", arguments.model]
        for size in sizes:
            done = subprocess.run(
                [*command, "--prepare", str(size)], stdout=subprocess.PIPE, check=True, cwd=ROOT
            )
            yield Point(**json.loads(done.stdout.splitlines()[-1]))
        return
    shapes = {
        "tokens": lambda size: (max(1, size // DOCUMENT), min(size, DOCUMENT), size),
        "length": lambda size: (1, size, size),
        "rank": lambda size: (PASS // DOCUMENT, DOCUMENT, PASS),
        "batch": lambda size: (size, DOCUMENT, PASS),
    }
    loaded = None
    for size in sizes:
        if loaded is None or name == "rank":
            loaded = None  # let the one before go first
            loaded = make_model(arguments.model, size if name == "rank" else RANK)
            make_step(*loaded, 1, 32, PASS)()  # what is made once: threads, optimizer states
        step = make_step(*loaded, *shapes[name](size))
        yield time_step(step, size, arguments.rounds, arguments.allowance)


def write_chats(num: int, file: Path) -> None:
    """Write short chat rows, no two of them alike, without holding them."""
    dice = random.Random(SEED)
    kinds = ("apples", "pears", "books", "letters", "stones", "pencils")
    with file.open("w") as out:
        for number in range(num):
            a, b, kind = dice.randrange(100), dice.randrange(100), dice.choice(kinds)
            question = f"Case {number}: Anna has {a} {kind} and buys {b} more. How many are there?"
            answer = f"There are {a + b} {kind}: {a} that she had and {b} that she bought."
            turns = zip(("user", "assistant"), (question, answer), strict=True)
            row = [{"role": role, "content": content} for role, content in turns]
            out.write(json.dumps({"messages": row}) + "\n")


@contextmanager
def watch_anonymous() -> Iterator[dict[str, int]]:
    """Watch the peak of the memory that is not a file's, in bytes above what is held now.

    Pages of a mapped file are resident too, but the system takes them back when it needs room; they are
    no part of what preparing holds.
    """
    found, done = {"peak": 0}, threading.Event()

    def held() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024

    before = held()

    def watch() -> None:
        while not done.wait(0.02):
            found["peak"] = max(found["peak"], held() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def prepare_rows(num: int, model: str) -> Point:
    """Prepare so many rows in this process (and its workers), and once more from the cache."""
    from whet.data.prepare import prepare
    from whet.data.template import set_chat_template
    from whet.model.load import load_tokenizer
    from whet.sections import DataSection, ModelSection

    tokenizer = load_tokenizer(ModelSection(name=model))
    template = set_chat_template(tokenizer, None)
    with tempfile.TemporaryDirectory(prefix="whet-rows-") as scratch:
        file = Path(scratch) / "rows.jsonl"
        os.environ["XDG_CACHE_HOME"] = scratch  # in place of the user's
        section = DataSection(train=str(file))
        write_chats(64, file)
        prepare(section, tokenizer, 2048, template)  # warms up
        write_chats(num, file)
        gc.collect()
        with watch_anonymous() as watched:
            start = time.perf_counter()
            data = prepare(section, tokenizer, 2048, template)
            seconds = time.perf_counter() - start
        start = time.perf_counter()
        assert prepare(section, tokenizer, 2048, template).report.cached
        notes = {
            "tokens": data.report.train.tokens, "file_bytes": file.stat().st_size,
            "again_seconds": time.perf_counter() - start,
        }  # fmt: skip
        return Point(num, [seconds], watched["peak"], notes)


def conclude(name: str, points: Sequence[Point]) -> dict[str, Any]:
    """Return a part's exponent, and a sentence on it."""
    sizes, seconds = [p.size for p in points], [p.median for p in points]
    exponent = fit_exponent(sizes, seconds)
    found: dict[str, Any] = {"exponent": exponent, "linear": exponent <= LINEAR}
    words = "linear or better" if found["linear"] else "WORSE than linear"
    if PARTS[name].quadratic:
        a, b, error = split_square(sizes, seconds)
        share = b * sizes[-1] / (a + b * sizes[-1])
        found.update(per_token=a, per_square=b, largest_error=error, attention_share=share)
        rest = "the rest is linear" if error <= 0.1 else "THE REST IS NOT LINEAR"
        words = (
            f"as a n + b n^2: {a:.3g} s a token and {b:.3g} s a token squared, within {error:.0%} of the "
            f"upper half; attention's square is {share:.0%} of the seconds at {sizes[-1]:,}, {rest}"
        )
    sentence = f"seconds grow with the power {exponent:.2f}: {words}"
    if all(p.above_bytes and p.above_bytes > 0 for p in points):
        found["memory_exponent"] = fit_exponent(sizes, [float(p.above_bytes or 0) for p in points])
        sentence += f". Memory with the power {found['memory_exponent']:.2f}"
    return {**found, "sentence": f"{sentence}."}


def table_of(name: str, points: Sequence[Point]) -> str:
    """Return a part's table."""
    unit = PARTS[name].unit
    rows = [
        [
            f"{p.size:,}",
            f"{p.median:.3f}",
            f"{min(p.seconds):.3f} to {max(p.seconds):.3f}",
            str(len(p.seconds)),
            f"{p.median / p.size * 1e3:.3f}",
            "" if p.above_bytes is None else f"{p.above_bytes / 2**20:,.0f}",
            "" if p.above_bytes is None else f"{p.above_bytes / 2**10 / p.size:,.1f}",
        ]
        for p in points
    ]
    head = [f"{unit}s", "s", "spread", "runs", f"ms / {unit}", "peak MiB above", f"KiB / {unit}"]
    return markdown_table(head, rows)


def plot(found: dict[str, list[Point]], file: Path) -> None:
    """Draw a panel for each part: seconds and memory over the size, the exponent written in."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    figure, axes = plt.subplots(
        1, len(found), figsize=(4.2 * len(found), 3.6), squeeze=False, layout="constrained"
    )
    for axis, (name, points) in zip(axes[0], found.items(), strict=True):
        sizes = [p.size for p in points]
        axis.loglog(sizes, [p.median for p in points], "o-", color="#c2410c", label="seconds")
        exponent = conclude(name, points)["exponent"]
        last = points[-1].median / sizes[-1]
        axis.loglog(sizes, [last * size for size in sizes], ":", color="#475569", label="linear")
        if all(p.above_bytes for p in points):
            other = axis.twinx()
            other.loglog(sizes, [(p.above_bytes or 0) / 2**20 for p in points], "s--",
                         color="#94a3b8", markersize=4)  # fmt: skip
            other.set_ylabel("peak MiB above (squares)", color="#64748b", fontsize=8)
        axis.text(0.05, 0.9, f"seconds ~ n^{exponent:.2f}", transform=axis.transAxes)
        for each in (
            axis,
            *figure.axes[len(axes[0]) :],
        ):  # between decades there is no room for words
            each.xaxis.set_minor_formatter(NullFormatter())
            each.yaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel(PARTS[name].title, fontsize=8)
        axis.set_title(name, loc="left", fontweight="bold")
        axis.legend(fontsize=7, loc="lower right")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def write_results(out: Path, head: dict[str, str], found: dict[str, list[Point]]) -> None:
    """Write OUT.json, OUT.md and OUT.png."""
    out.parent.mkdir(parents=True, exist_ok=True)
    parts = {
        name: {**conclude(name, points), "points": [asdict(p) for p in points]}
        for name, points in found.items()
    }
    Path(f"{out}.json").write_text(json.dumps({"head": head, "parts": parts}, indent=1) + "\n")
    plot(found, Path(f"{out}.png"))
    lines = [
        f"# {out.name}", "",
        f"{head['date']}, {head['machine']}, whet at {head['commit']}. `{head['command']}`", "",
        f"SmolLM2-135M in bfloat16, LoRA (rank {RANK} unless it is varied) on every linear layer, the "
        "engine: whole optimizer steps on documents of random tokens, all of them learned. Seconds are "
        f"medians of {ROUNDS} after a warm-up; a step that is long for its allowance is run less often. "
        "Memory is the peak above what the process held. Exponents are least squares in log-log over "
        f"the upper half of the sizes; up to {LINEAR} is called linear.", "",
        f"![plot]({out.name}.png)", "",
    ]  # fmt: skip
    for name, points in found.items():
        lines += [f"## {name}: {PARTS[name].title}", "", table_of(name, points), ""]
        sentence = parts[name]["sentence"]
        lines += [sentence[0].upper() + sentence[1:], ""]
    Path(f"{out}.md").write_text("\n".join(lines))


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print; 1 when anything but attention is worse than linear."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    add("--most", type=int, help="leave out larger sizes, of every part")
    add("--long", action="store_true", help="also a million rows")
    add("--rounds", type=int, default=ROUNDS, help="timed steps of a size")
    add("--allowance", type=float, default=24, help="seconds that the steps of a size may take")
    add("--model", default="smollm2-135m", help="short name or folder")
    add("--out", type=Path, help="result files without their ending, such as results/DATE-NAME")
    add("--prepare", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.prepare:
        print(json.dumps(asdict(prepare_rows(arguments.prepare, arguments.model))))
        return 0
    head, names = head_of("benchmarks.scaling"), arguments.parts.split(",")
    found: dict[str, list[Point]] = {}
    if wrong := [name for name in names if name not in PARTS]:
        parser.error(f"there is no part '{wrong[0]}'; use {', '.join(PARTS)}")
    for name in names:
        sizes = PARTS[name].sizes + ((1_000_000,) if arguments.long and name == "rows" else ())
        sizes = [size for size in sizes if size <= (arguments.most or size)]
        if len(sizes) < 2:
            parser.error(f"--most {arguments.most} leaves '{name}' fewer than two sizes")
        print(f"{name}: {PARTS[name].title}", flush=True)
        found[name] = points = []
        for point in measure(name, sizes, arguments):
            points.append(point)
            memory = "" if point.above_bytes is None else f", {point.above_bytes / 2**20:,.0f} MiB"
            print(f"  {point.size:>9,}: {point.median:.3f} s{memory}", flush=True)
        print(f"  {conclude(name, points)['sentence']}", flush=True)
        if arguments.out:
            write_results(arguments.out, head, found)
    worse = [name for name, points in found.items() if not conclude(name, points)["linear"]]
    return int(any(not PARTS[name].quadratic for name in worse))


if __name__ == "__main__":
    sys.exit(main())
