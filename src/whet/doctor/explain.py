"""An error of torch, CUDA, NCCL or Triton as one sentence, with the doctor's advice."""

from __future__ import annotations

import re
from collections.abc import Iterator

from whet.doctor.advice import report
from whet.doctor.finding import Finding

# What such errors say, the advice's key, and the sentence; the first that is found counts, so that the
# closer ones stand first. Words are those of torch 2.7 to 2.13, CUDA 11 to 13, NCCL 2 and Triton 3.
_SIGNS: tuple[tuple[str, str, str], ...] = (
    (r"Distributed package doesn't have NCCL|no NCCL in this build|without NCCL support",
     "no NCCL", "your torch has no NCCL"),
    (r"Duplicate GPU detected", "duplicate GPU", "two processes use one GPU"),
    (r"Watchdog caught collective operation timeout|Timed out waiting \d+ms for (send|recv) operation",
     "NCCL timeout", "a collective operation timed out"),
    (r"Cuda failure \d* ?'?out of memory|CUDA out of memory|CUDA error: out of memory"
     r"|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED|HIP out of memory",
     "out of GPU memory", "the GPU's memory is full"),
    (r"Bus error.*shared memory|out of shared memory. Please try to raise|/dev/shm"
     r"|unable to (open|write to|mmap|resize|allocate) (file <torch_|shared memory)",
     "small shm", "shared memory (/dev/shm) is too small or full"),
    (r"can't allocate memory|not enough memory: you tried to allocate|bad_alloc|Cannot allocate memory",
     "out of memory", "the machine's memory is full"),
    (r"no kernel image is available|not compatible with the current PyTorch installation"
     r"|sm_\d+a? is not (a )?(defined|supported)|named symbol not found",
     "no kernel image", "this torch has no code for this GPU"),
    (r"driver on your system is too old|driver version is insufficient|unsupported toolchain"
     r"|forward compatibility was attempted",
     "driver too old", "the GPU's driver is too old for this torch"),
    (r"Torch not compiled with CUDA enabled|not compiled with CUDA support",
     "CPU torch", "this torch is a CPU build"),
    (r"Found no NVIDIA driver", "no driver", "no NVIDIA driver was found"),
    (r"invalid device ordinal|No CUDA GPUs are available|device >= 0 && device < num_gpus",
     "no such GPU", "the GPU that was asked for is not there"),
    (r"busy or unavailable|exclusive-thread context",
     "GPU busy", "the GPU is busy"),
    (r"Expected all tensors to be on the same device|Pointer argument .* cannot be accessed from Triton"
     r"|Input type \(torch\.cuda\.\w+\) and weight type \(torch\.\w+\)",
     "device mismatch", "tensors of one operation are on different devices"),
    (r"device-side assert", "device assert", "a kernel met an index out of range"),
    (r"illegal memory access|misaligned address",
     "illegal access", "a kernel touched memory that is not its own"),
    (r"unspecified launch failure|GPU is lost|fallen off the bus|uncorrectable ECC",
     "GPU lost", "the GPU has failed"),
    (r"CUDA unknown error|system not yet initialized|CUDA error: initialization error",
     "CUDA does not start", "CUDA does not start"),
    (r"EADDRINUSE|server socket has failed to listen", "port in use", "the rendezvous port is in use"),
    (r"NCCL error|NCCL WARN|nccl(System|Remote|Internal|UnhandledCuda)Error",
     "NCCL error", "NCCL failed"),
    (r"DistNetworkError|client socket has timed out|TCPStore|waiting for clients"
     r"|RendezvousConnectionError|RendezvousTimeoutError|gloo.*Connection (closed|reset) by peer"
     r"|connectFullMesh failed",
     "rendezvous", "the processes did not meet or lost each other"),
    (r"Unable to find address for|unable to find interface|Bootstrap : no socket interface found"
     r"|No network interface",
     "interface", "the network interface is not there"),
    (r"Failed to find C compiler|Python\.h: No such file", "no compiler", "Triton finds no C compiler"),
)  # fmt: skip
_PATTERNS = tuple((re.compile(sign, re.DOTALL), key, text) for sign, key, text in _SIGNS)


def explain(error: BaseException) -> Finding | None:
    """Return what an error means, or None when nothing here knows it.

    Its causes are asked too, the closest first: libraries wrap errors in their own.

    Args:
        error: What was raised.
    """
    for one in _with_causes(error):
        told = f"{type(one).__name__}: {one}"
        for pattern, key, text in _PATTERNS:
            if pattern.search(told):
                return report("error", key, f"{text} ({_first_line(one)})")
        if isinstance(one, MemoryError):
            return report("error", "out of memory", "the machine's memory is full")
    return None


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    here: BaseException | None = error
    while here is not None and id(here) not in seen:
        seen.add(id(here))
        yield here
        here = here.__cause__ or (None if here.__suppress_context__ else here.__context__)


def _first_line(error: BaseException, most: int = 160) -> str:
    """Return the words to search for: the first line that is not empty, cut."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return line if len(line) <= most else line[: most - 3] + "..."
