"""transformers + peft with Liger's Triton kernels; a GPU is needed."""

from __future__ import annotations

from benchmarks.peers import hf
from benchmarks.peers.job import Job
from benchmarks.peers.worker import Watch


def run(job: Job, watch: Watch) -> None:
    """Train through transformers' Trainer with its `use_liger_kernel`."""
    hf.run(job, watch, use_liger_kernel=True)
