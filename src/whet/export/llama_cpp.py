"""Run a GGUF file with llama.cpp, through the package cyllama, to see what its users will get.

llama.cpp runs in a process of its own (llama_worker.py), because it aborts on a file it does not like.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whet.errors import InputError, WhetError

if TYPE_CHECKING:
    import numpy as np


def is_installed() -> bool:
    """Tell whether cyllama is there."""
    return find_spec("cyllama") is not None


def require() -> None:
    """Check that llama.cpp is there.

    Raises:
        InputError: The package cyllama is not installed.
    """
    if not is_installed():
        raise InputError(
            "this needs llama.cpp, from the package cyllama",
            fix="pip install 'whet[gguf]' (f32, f16, bf16 and q8_0 are written without it, --no-check)",
        )


class LlamaProcess:
    """llama.cpp in a process of its own.

    Raises:
        InputError: The package cyllama is not installed.
    """

    def __init__(self) -> None:
        require()
        self._log = tempfile.TemporaryFile()
        package = str(Path(__file__).resolve().parents[2])
        paths = [package, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "whet.export.llama_worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            # Threads that wait sleep, so that a busy machine gets on with what they wait for.
            env={"OMP_WAIT_POLICY": "passive", **os.environ, "GGML_NO_BACKTRACE": "1",
                 "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )  # fmt: skip

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        process = self._process
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()
        process.wait()
        self._log.close()

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of `llama_worker.Worker`.

        Raises:
            WhetError: llama.cpp reports an error, or has ended.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            pickle.dump((method, arguments), stdin, protocol=pickle.HIGHEST_PROTOCOL)
            stdin.flush()
            state, value = pickle.load(stdout)  # noqa: S301  (our own child wrote it)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            raise WhetError(f"llama.cpp ended at '{method}': {self._last_words()}") from error
        if state == "error":
            raise WhetError(f"llama.cpp: {value}; {self._last_words()}")
        return value

    def _last_words(self) -> str:
        """Return what llama.cpp logged last that tells of a fault."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        signs = (
            "error",
            "fail",
            "abort",
            "assert",
            "invalid",
            "missing",
            "unknown",
            "wrong",
            "unsupported",
        )
        told = [line.strip() for line in lines if any(sign in line.lower() for sign in signs)]
        return " | ".join(told[-2:]) or "it gave no reason"


class GGUFModel(LlamaProcess):
    """A GGUF file in llama.cpp.

    Args:
        path: The file.

    Raises:
        InputError: The package cyllama is not installed.
        WhetError: llama.cpp does not load the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            self.num_tokens: int = self.ask("load", str(path))
        except WhetError as error:
            self.close()
            raise WhetError(f"llama.cpp does not load '{path}': {error.what}") from error

    @property
    def template(self) -> str | None:
        """The chat template in the file."""
        return self.metadata("tokenizer.chat_template")

    def metadata(self, key: str) -> str | None:
        """Return one value of the file's metadata as text, or None."""
        return self.ask("metadata", key)

    def tokenize(self, text: str) -> list[int]:
        """Return a text's token ids, special tokens read as such, none added."""
        return self.tokenize_all([text])[0]

    def tokenize_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of several texts."""
        return self.ask("tokenize", list(texts))

    def adds_bos(self) -> bool:
        """Tell whether llama.cpp puts a beginning-of-text token before a prompt."""
        return self.ask("adds_bos")

    def ends_generation(self, token: int) -> bool:
        """Tell whether llama.cpp stops at a token."""
        return self.ask("ends_generation", token)

    def logits(self, rows: Sequence[Sequence[int]]) -> list[np.ndarray[Any, Any]]:
        """Return the logits of every position, (tokens, vocabulary) a row.

        Args:
            rows: Token ids.
        """
        return [self.ask("logits", list(row)) for row in rows]

    def answer(self, ids: Sequence[int], num_tokens: int) -> list[int]:
        """Return the greedy continuation of a prompt, up to a token that ends it.

        Args:
            ids: The prompt.
            num_tokens: How many tokens at most.
        """
        return self.ask("answer", list(ids), num_tokens)
