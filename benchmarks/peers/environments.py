"""A virtual environment for each peer, made from its pinned requirements, kept until those change."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "requirements"
ROOT = Path(__file__).resolve().parents[2]


def environment(name: str | None, folder: Path) -> Path:
    """Return the Python of a peer's environment, making it first when it is not there.

    Args:
        name: Name of the requirements file; None is the environment that runs now.
        folder: Where environments are kept.

    Raises:
        RuntimeError: pip could not install it; its last words are given.
    """
    if name is None:
        return Path(sys.executable)
    files = [REQUIREMENTS / f"{name}.txt", REQUIREMENTS / f"{name}.no-deps.txt"]
    text = "".join(file.read_text() for file in files if file.exists()) + sys.version
    place = folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    python = place / "bin" / "python"
    if (place / "whole").exists():
        return python
    print(f"making an environment for {name} (once)", flush=True)
    _run([sys.executable, "-m", "venv", "--clear", str(place)])
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "-q", "install"]
    lines = files[0].read_text().splitlines()
    # torch first and alone: asked for by its exact version, pip takes a local CPU build before any other.
    _run([*pip, *(line for line in lines if line.startswith("torch=="))])
    _run([*pip, "-r", str(files[0])])
    if files[1].exists():
        _run([*pip, "--no-deps", "-r", str(files[1])])
    (place / "whole").touch()
    return python


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise RuntimeError(f"{' '.join(command[1:5])} ... failed: {' '.join(words)}")
