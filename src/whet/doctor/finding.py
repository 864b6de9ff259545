"""One line of the doctor's report, and the versions that a run's numbers depend on."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass
from typing import Literal

PACKAGES = (
    "whet", "torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "tokenizers",
    "safetensors", "gguf",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's report.

    Args:
        name: What was looked at.
        status: ok, warn (it works, but not well) or fault (it will not work).
        text: What was found.
        fix: The command or change that helps, when something does.
        why: What it means for training, where the text alone does not say.
    """

    name: str
    status: Literal["ok", "warn", "fault"]
    text: str
    fix: str | None = None
    why: str | None = None


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages a run's numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        found[package] = version_of(package) or "missing"
    return found


def version_of(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
