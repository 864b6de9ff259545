"""What the tests of several processes run in each of them: one run after another, in one group.

    torchrun --nproc-per-node 2 tests/train/several.py JOBS.json

JOBS.json lists runs: a config, whether it goes on from a checkpoint, and what befalls which process.
Beside it rank 0 writes NAME.json for each: losses, norms of the gradients, and what the run said.
"""

import json
import os
import shutil
import sys
from pathlib import Path

cut = {}


def main(file: Path) -> None:
    from whet.config_file import load_config
    from whet.train import callbacks, recipe
    from whet.train.listen import LogListener

    recipe.plot_loss = lambda run: None
    spread = recipe.spread

    def spread_and_note(model, *args):
        note_pieces(spread(model, *args))
        return model

    recipe.spread = spread_and_note
    callbacks.forget_peak_memory = lambda: 0

    class Notes(LogListener):
        def __init__(self):
            super().__init__()
            self.heard = []

        def note(self, text):
            self.heard.append(text)

    for job in json.loads(file.read_text()):
        notes = Notes()
        befall(job)
        if job.get("forget") and os.environ["RANK"] == "0":
            shutil.rmtree(job["forget"])
        cut.clear()
        run = recipe.fit(load_config(job["config"]), job.get("resume", False), notes)
        if run.writes:
            rows = run.metrics()
            result = {
                "losses": [row["loss"] for row in rows if "loss" in row],
                "norms": [row["grad_norm"] for row in rows if "loss" in row],
                "events": [row for row in rows if "event" in row],
                "notes": notes.heard,
                "report": run.report,
                "cut": cut,
            }
            file.with_name(f"{job['name']}.json").write_text(json.dumps(result))


def note_pieces(model):
    """Note how many bytes of the model this process holds, and how many there are."""
    from torch.distributed.tensor import DTensor

    for kind in ("float", "quantised"):
        layers = [p for n, p in model.named_parameters() if ".layers." in n]
        parts = [p for p in layers if (p.shape[-1] == 1) == (kind == "quantised")]
        local = [p.to_local() if isinstance(p, DTensor) else p for p in parts]
        cut[kind] = [sum(p.nbytes for p in local), sum(p.nbytes for p in parts)]


def befall(job):
    """Have memory run out once in one process, in a given pass."""
    from whet.train.trainer import WhetTrainer

    WhetTrainer.compute_loss = original
    if "out_of_memory" not in job:
        return
    rank, pass_number = job["out_of_memory"]
    left = [int(os.environ["RANK"]) == rank]

    def compute_loss(self, *args, **kwargs):
        if left[0] and self.at == (pass_number, "forward") and self.state.global_step == 2:
            left[0] = False
            raise MemoryError("out of memory, for the test")
        return original(self, *args, **kwargs)

    WhetTrainer.compute_loss = compute_loss


if __name__ == "__main__":
    from whet.train.trainer import WhetTrainer

    original = WhetTrainer.compute_loss
    main(Path(sys.argv[1]))
