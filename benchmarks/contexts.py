r"""The longest context that a training step takes in so much memory, in whet and in its peers.

    python -m benchmarks.contexts --model llama-3.1-8b --nf4 --memory 8,12,16,24 \
        --peers whet,hf,unsloth --json FILE

A step is one row of random tokens, all of them learned, through a rank-16 adapter on every linear layer:
forward, backward, AdamW. Every (peer, memory) has a process of its own, whose memory is bounded: on CUDA
that of torch's allocator, less what the CUDA context takes; on the CPU its data segment, which serves to
try this program out. The length doubles until memory or time runs out, then is bisected to 5%. The
peers step through their own trainers with gradient checkpointing. whet keeps saved tensors while they
fit, then recomputes, then offloads to host memory, as its planner does; `whet-lean` never keeps them.
What FILE has already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import ROOT, environment
from benchmarks.peers.registry import PEERS

# Module of benchmarks.peers, and the settings with which it needs the least memory.
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "whet": ("whet", {"policies": ["keep", "recompute", "offload"]}),
    "whet-lean": ("whet", {"policies": ["recompute", "offload"]}),
    "hf": ("hf", {"checkpointing": True}),
    # Without peft's float32 copies of embeddings, head and norms, which its QLoRA recipe makes.
    "hf-lean": ("hf", {"checkpointing": True, "prepare": False}),
    "trl": ("trl", {"checkpointing": True}),
    "unsloth": ("unsloth", {"checkpointing": "unsloth"}),
}
START, LEAST = 512, 32
FINE = 1.05
MOST_RESTARTS = 8


@dataclass
class Found:
    """What a peer could do in so much memory.

    Args:
        peer: Of CONTENDERS.
        memory_gib: The bound.
        fits: Most tokens that fitted; 0 when none did.
        fails: Fewest tokens that did not; None when time or `--most` ended the search.
        reason: Why those did not, or why the search ended.
        tries: Of each length that fitted: tokens, seconds, peak and pinned bytes, policy.
    """

    peer: str
    memory_gib: float
    fits: int = 0
    fails: int | None = None
    reason: str = ""
    tries: list[dict[str, Any]] = field(default_factory=list)

    @property
    def best(self) -> dict[str, Any]:
        """The longest step."""
        return max(self.tries, key=lambda each: each["tokens"], default={})


def next_length(fits: int, fails: int | None, most: int) -> int | None:
    """Return the length to try next, None when the search is over.

    Args:
        fits: Most tokens that fitted.
        fails: Fewest that did not, None for none yet.
        most: Never more than this.
    """
    if fails is None:
        return None if fits >= most else min(most, 2 * fits or START)
    if not fits:
        return fails // 2 if fails // 2 >= LEAST else None
    middle = (fits + fails) // 2
    if middle >= 20 * 64:
        middle = middle // 64 * 64
    return middle if fails > FINE * fits and fits < middle < fails else None


def measure(peer: str, memory: float, folder: Path, arguments: argparse.Namespace) -> Found:
    """Search in processes of its own: one, and another after each that breaks."""
    found = Found(peer, memory)
    module = CONTENDERS[peer][0]
    here = arguments.here or PEERS[module].requirements is None
    python = environment(None if here else PEERS[module].requirements, arguments.environments)
    ends = time.monotonic() + arguments.limit
    for _ in range(MOST_RESTARTS):
        length = next_length(found.fits, found.fails, arguments.most)
        left = ends - time.monotonic()
        if length is None or left <= 0:
            break
        task = {
            "peer": peer, "model": str(folder.resolve()), "nf4": arguments.nf4, "memory": memory,
            "most": arguments.most, "limit": left, "fits": found.fits, "fails": found.fails,
        }  # fmt: skip
        if _run(task, python, found, left + 30):
            break
    return found


def _run(task: dict[str, Any], python: Path, found: Found, limit: float) -> bool:
    """Run one process; return whether the search is over."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    variables = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    variables.update(TOKENIZERS_PARALLELISM="false", WANDB_DISABLED="true")
    command = [str(python), "-m", "benchmarks.contexts_worker", json.dumps(task)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=variables, cwd=ROOT
        )
        timer = threading.Timer(limit, process.kill)
        timer.start()
        assert process.stdout is not None
        trying, over = None, False
        for line in process.stdout:
            event = json.loads(line)
            kind = event.pop("event")
            if kind == "trying":
                trying = event["tokens"]
            elif kind == "fits":
                found.fits, trying = event["tokens"], None
                found.tries.append(event)
            elif kind == "fails":
                found.fails, found.reason, trying = event["tokens"], event["reason"], None
            else:
                found.reason, over = event.get("reason") or found.reason, True
        code, in_time = process.wait(), timer.is_alive()
        timer.cancel()
        if not over and not in_time:
            found.reason, over = "time is up", True
        elif not over and trying is not None:
            found.fails, found.reason = trying, f"the process ended with code {code}"
        elif not over and code:
            log.seek(0)
            words = [text for text in log.read().splitlines() if text.strip()][-1:]
            found.reason, over = f"did not start: {' '.join(words)[:200]}", not found.tries
    return over


def table(found: Sequence[Found]) -> str:
    """Lay out the longest contexts: a line for each peer, a column for each memory."""
    memories = sorted({each.memory_gib for each in found})
    cells = [["tokens in", *(f"{memory:g} GiB" for memory in memories)]]
    for peer in dict.fromkeys(each.peer for each in found):
        row = [peer]
        for memory in memories:
            one = next((f for f in found if (f.peer, f.memory_gib) == (peer, memory)), None)
            row.append("-" if one is None else cell(one))
        cells.append(row)
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(
            text.rjust(width) if i else text.ljust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def cell(found: Found) -> str:
    """Return a result in a few characters: `>` where it could have been more."""
    if not found.fits:
        return "none"
    policy = found.best.get("policy", "")
    at_least = ">" if found.fails is None else ""
    return f"{at_least}{found.fits:,}" + (f" ({policy})" if policy else "")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.contexts", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--model", default="llama-3.1-8b", help="a shape of benchmarks.shapes, or a folder")
    add("--nf4", action="store_true", help="NF4 weights with double quantisation")
    add("--memory", default="8,12,16,24", help="bounds in GiB")
    add("--peers", default="whet,hf,unsloth", help=f"of {', '.join(CONTENDERS)}")
    add("--limit", type=float, default=120, help="seconds of one search, loading included")
    add("--most", type=int, default=1 << 20, help="longest length that is tried")
    add(
        "--models", type=Path, default=ROOT / "benchmarks" / ".models", help="where shapes are kept"
    )
    add("--environments", type=Path, default=ROOT / "benchmarks" / ".environments")
    add("--here", action="store_true", help="run all peers in this environment; make none")
    add("--json", type=Path, help="write the results here, after each search")
    arguments = parser.parse_args(words)
    arguments.peers = arguments.peers.split(",")
    arguments.memory = [float(word) for word in arguments.memory.split(",")]
    for name in arguments.peers:
        if name not in CONTENDERS:
            parser.error(f"there is no peer '{name}'; use {', '.join(CONTENDERS)}")
    return arguments


def _read(arguments: argparse.Namespace) -> list[Found]:
    if not (arguments.json and arguments.json.exists()):
        return []
    before = json.loads(arguments.json.read_text())
    if (before["model"], before["nf4"]) != (arguments.model, arguments.nf4):
        raise SystemExit(f"{arguments.json} is about {before['model']}; name another file")
    names = list(Found.__dataclass_fields__)
    return [Found(**{name: each[name] for name in names}) for each in before["found"]]


def _write(arguments: argparse.Namespace, found: Sequence[Found]) -> None:
    import torch

    cuda = torch.cuda.is_available()
    result = {
        "model": arguments.model, "nf4": arguments.nf4, "limit_s": arguments.limit,
        "device": torch.cuda.get_device_name() if cuda else "cpu", "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"), "found": [asdict(each) for each in found],
    }  # fmt: skip
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    temporary = arguments.json.with_name(f".{arguments.json.name}.tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(arguments.json)


def main(words: Sequence[str] | None = None) -> int:
    """Search for each peer and memory, print the table and write the results."""
    arguments = parse(words)
    found = _read(arguments)
    from benchmarks.shapes import SHAPES

    folder = Path(arguments.model)
    if arguments.model in SHAPES:
        # In a process of its own: this one must hold nothing on the device.
        command = [
            sys.executable,
            "-m",
            "benchmarks.shapes",
            arguments.model,
            str(arguments.models),
        ]
        command += ["--nf4"] if arguments.nf4 else []
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        folder = Path(done.stdout.split("\n")[-2])
    for memory in arguments.memory:
        for peer in arguments.peers:
            if any((each.peer, each.memory_gib) == (peer, memory) for each in found):
                continue
            one = measure(peer, memory, folder, arguments)
            found.append(one)
            print(f"{peer} in {memory:g} GiB: {cell(one)} tokens; {one.reason}", flush=True)
            if arguments.json:
                _write(arguments, found)
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
