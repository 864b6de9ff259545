"""Checks of driver, torch's CUDA and the cards: pure functions of the machine's facts."""

from __future__ import annotations

import os

from whet.doctor.advice import report
from whet.doctor.finding import Finding
from whet.doctor.machine import Machine
from whet.doctor.parse import parse_version

# The first driver for Linux that runs a major version of CUDA; newer minor versions run on it too
# (NVIDIA's "CUDA minor version compatibility").
_FIRST_DRIVERS = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
GIB = 2**30


def check_gpu(machine: Machine) -> list[Finding]:
    """Return the lines on driver, torch's CUDA, the cards and who holds them."""
    if not machine.has_gpu and machine.smi is None:
        if "NVIDIA_VISIBLE_DEVICES" in machine.variables and machine.container:
            wanted = machine.variables["NVIDIA_VISIBLE_DEVICES"]
            if wanted not in ("", "void", "none"):
                text = f"NVIDIA_VISIBLE_DEVICES={wanted}, but there is no GPU in this container"
                return [report("GPU", "container without GPU", text)]
        return [Finding("GPU", "ok", "none; whet trains on the CPU")]
    driver = check_driver(machine)
    if driver.status == "fault":
        return [driver, *_torch_build(machine)]
    cuda = _torch_build(machine) or check_cuda(machine)
    return [driver, *cuda, *check_cards(machine), *check_holders(machine)]


def check_driver(machine: Machine) -> Finding:
    """Return the driver's line."""
    smi = machine.smi
    trouble = smi.trouble if smi else None
    if smi and trouble is None and smi.driver:
        highest = f", runs CUDA up to {_dotted(smi.cuda)}" if smi.cuda else ""
        kind = ", the open module" if machine.kernel_driver and machine.kernel_driver[1] else ""
        where = " (of Windows)" if machine.wsl else ""
        return Finding("driver", "ok", f"NVIDIA {smi.driver}{where}{kind}{highest}")
    if trouble == "mismatch":
        loaded = machine.kernel_driver[0] if machine.kernel_driver else "another version"
        text = f"the loaded module is {loaded}, and the driver's libraries are of another version"
        return report("driver", "driver mismatch", text)
    if machine.wsl and trouble:
        return report("driver", "WSL", f"nvidia-smi says: {trouble}")
    if trouble == "no devices":
        return report("driver", "no GPU seen", "the driver runs, but finds no GPU")
    if trouble == "lost":
        return report("driver", "GPU lost", "a GPU no longer answers")
    if trouble == "permissions":
        return report("driver", "GPU forbidden", "this user may not ask the driver")
    if trouble in ("unknown", "blocked") and machine.container:
        return report("driver", "GPU lost in the container", "the driver does not answer in here")
    return _not_loaded(machine)


def _not_loaded(machine: Machine) -> Finding:
    """Find out why the driver's module does not run."""
    version, signed = machine.module
    if machine.kernel_driver:
        if machine.container:
            text = "the host's driver is loaded, but its programs and libraries are not in here"
            return report("driver", "container without GPU", text)
        text = (
            f"the module {machine.kernel_driver[0]} is loaded, but nvidia-smi fails or is missing"
        )
        return report("driver", "driver mismatch", text)
    if version and machine.secure_boot and not signed:
        text = f"Secure Boot is on, and the driver's module ({version}) is not signed"
        return report("driver", "secure boot", text)
    if version or (machine.smi and not machine.nouveau):
        text = "the driver is installed, but its module is not loaded"
        if machine.secure_boot:
            return report("driver", "secure boot", f"Secure Boot is on, and {text}")
        return report("driver", "driver not loaded", text)
    text = "an NVIDIA GPU is here, but no driver"
    return report("driver", "no driver", f"{text} (nouveau runs it)" if machine.nouveau else text)


def _torch_build(machine: Machine) -> list[Finding]:
    """Return the fault of a torch that was not built for this card."""
    torch = machine.torch
    if torch.hip or any(mark in torch.version for mark in ("+rocm", "+xpu")):
        text = f"torch {torch.version} is for other hardware than this NVIDIA GPU"
        return [report("torch's CUDA", "wrong wheels", text)]
    if torch.cuda is None:
        text = f"torch {torch.version} is a CPU build, beside an NVIDIA GPU"
        return [report("torch's CUDA", "CPU torch", text)]
    return []


def check_cuda(machine: Machine) -> list[Finding]:
    """Return the lines on torch's CUDA against driver and cards."""
    torch, smi = machine.torch, machine.smi
    assert torch.cuda is not None
    needs, runs = parse_version(torch.cuda), smi.cuda if smi else None
    if runs and needs[0] > runs[0]:
        first = _FIRST_DRIVERS.get(needs[0])
        text = (
            f"torch was built with CUDA {torch.cuda}, and the driver runs {_dotted(runs)} at most"
        )
        update = f"update the driver to {first} or newer and reboot; or " if first else ""
        fix = (
            f"{update}pip install --force-reinstall torch from PyTorch's wheels for CUDA "
            f"{runs[0]} (see pytorch.org)"
        )
        return [report("torch's CUDA", "driver too old", text, fix=fix)]
    if machine.variables.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        text = "CUDA_VISIBLE_DEVICES hides every GPU"
        return [Finding("torch's CUDA", "warn", text, "unset CUDA_VISIBLE_DEVICES")]
    if not torch.available:
        return [_does_not_start(machine)]
    strange = [card for card in torch.cards if not has_kernels(torch.archs, card.capability)]
    if strange:
        card = strange[0]
        text = (
            f"{card.name} has compute capability {_dotted(card.capability)}; this torch has code "
            f"for {' '.join(torch.archs)}"
        )
        return [report("torch's CUDA", "no kernel image", text)]
    cudnn = f", cuDNN {_cudnn(torch.cudnn)}" if torch.cudnn else ""
    return [Finding("torch's CUDA", "ok", f"CUDA {torch.cuda}{cudnn}")]


def _does_not_start(machine: Machine) -> Finding:
    """Say why CUDA does not start, where torch's words tell."""
    from whet.doctor.explain import explain

    error = machine.torch.error
    if machine.libraries and "libcuda.so.1" not in machine.libraries and machine.container:
        text = "the driver's library libcuda.so.1 is not in this container"
        return report("torch's CUDA", "container without GPU", text)
    known = explain(RuntimeError(error)) if error else None
    if known:
        return Finding("torch's CUDA", "fault", known.text, known.fix, known.why)
    text = f"CUDA {machine.torch.cuda} does not start: {error or 'torch does not say why'}"
    return report("torch's CUDA", "CUDA does not start", text)


def has_kernels(archs: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Tell whether code compiled for some architectures runs on a card.

    Binaries (sm_) run on the same major version from their minor version on; PTX (compute_) on
    everything newer; those with a letter (sm_90a) on that architecture alone.

    Args:
        archs: As torch.cuda.get_arch_list returns them; nothing is known when it is empty.
        capability: The card's.
    """
    for arch in archs:
        kind, _, number = arch.partition("_")
        digits = number.rstrip("af")
        if not digits.isdigit():
            continue
        has = int(digits[:-1]), int(digits[-1])
        if number != digits:
            fits = has == capability
        elif kind == "compute":
            fits = has <= capability
        else:
            fits = has[0] == capability[0] and has[1] <= capability[1]
        if fits:
            return True
    return not archs


def check_cards(machine: Machine) -> list[Finding]:
    """Return a line for each GPU, and for each part of one where MIG is on."""
    if machine.torch.cards:
        lines = [
            f"{card.name}, compute capability {_dotted(card.capability)}, "
            f"{card.free_bytes / GIB:.1f} of {card.total_bytes / GIB:.1f} GiB free"
            for card in machine.torch.cards
        ]
    else:
        lines = []
        for card in machine.cards:
            text = card.name
            if card.capability:
                text += f", compute capability {_dotted(card.capability)}"
            if card.total_bytes is not None and card.used_bytes is not None:
                free = card.total_bytes - card.used_bytes
                text += f", {free / GIB:.1f} of {card.total_bytes / GIB:.1f} GiB free"
            lines.append(text)
    names = ["GPU"] if len(lines) == 1 else [f"GPU {number}" for number in range(len(lines))]
    found = [Finding(name, "ok", text) for name, text in zip(names, lines, strict=True)]
    for part in machine.smi.migs if machine.smi else ():
        free = (part.total_bytes - part.used_bytes) / GIB
        text = f"part {part.index} of GPU {part.gpu}: {free:.1f} of {part.total_bytes / GIB:.1f} GiB free"
        found.append(Finding("MIG", "ok", text))
    split = [card.index for card in machine.cards if card.mig]
    if split and machine.smi and not machine.smi.migs:
        found.append(
            Finding("MIG", "fault", f"MIG is on for GPU {split[0]}, but no part has been made",
                    f"sudo nvidia-smi mig -i {split[0]} -cgi 0 -C; or turn it off: sudo nvidia-smi -i "
                    f"{split[0]} -mig 0", "a card in this mode is used by its parts only")
        )  # fmt: skip
    return found


def check_holders(machine: Machine) -> list[Finding]:
    """Return a line on other processes that hold GPU memory."""
    if machine.smi is None:
        return []
    others = [
        f"{process.name} (process {process.pid}"
        + (f", {process.used_bytes / GIB:.1f} GiB)" if process.used_bytes is not None else ")")
        for process in machine.smi.processes
        if process.pid != os.getpid()
        and ("C" in process.kind.split("+") or (process.used_bytes or 0) > GIB)
    ]
    fix = "end what is not needed; whet plans with the memory that is free"
    if others:
        return [Finding("GPU's users", "warn", f"held by {', '.join(others)}", fix)]
    # In a container, and on WSL, processes outside are counted but not listed.
    hidden = [card for card in machine.cards if (card.used_bytes or 0) > GIB]
    if hidden and not machine.smi.processes:
        used = ", ".join(f"{(card.used_bytes or 0) / GIB:.1f} GiB" for card in hidden)
        text = f"{used} held by processes that are not seen from here"
        return [Finding("GPU's users", "warn", text, fix)]
    return []


def check_nccl(machine: Machine, needed: bool) -> Finding:
    """Return the line on NCCL.

    Args:
        machine: The facts.
        needed: Whether several GPUs are to work together.
    """
    torch = machine.torch
    if torch.nccl:
        return Finding("NCCL", "ok", f"{torch.nccl}, in torch")
    if needed:
        return report("NCCL", "no NCCL", f"your torch ({torch.version}) has no NCCL")
    return Finding("NCCL", "ok", "none in this torch; it is for several GPUs")


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _cudnn(number: int) -> str:
    """Write cuDNN's number: 90100 is 9.1.0, and before version 9 8902 was 8.9.2."""
    thousand = 10_000 if number >= 90_000 else 1_000
    return f"{number // thousand}.{number % thousand // 100}.{number % 100}"
