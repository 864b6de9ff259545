"""The process that llama.cpp runs in: `python -m whet.export.llama_worker`.

A file that llama.cpp does not like can end its process with an abort; here it ends this one, and the
parent tells why. Requests and answers are pickles over the standard streams: (method, arguments) in,
("ok", value) or ("error", words) out.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import numpy as np

_F32 = 0  # ggml's number of the type, for the cache: it is not to round keys and values here


class Worker:
    """One model in llama.cpp, and what can be asked of it."""

    def __init__(self) -> None:
        import cyllama.llama.llama_cpp as native

        self._native: Any = native
        native.ggml_backend_load_all()
        self._model: Any = None
        self._vocab: Any = None

    def load(self, path: str) -> int:
        """Load a GGUF file; return the size of its vocabulary."""
        native = self._native
        settings = native.LlamaModelParams()
        settings.n_gpu_layers = 0
        # cyllama 0.2.18's context asks its model for n_vocab, which the class lacks.
        number = property(lambda model: model.get_vocab().n_vocab)
        self._model = type("Model", (native.LlamaModel,), {"n_vocab": number})(path, settings)
        self._vocab = self._model.get_vocab()
        return self._vocab.n_vocab

    def quantise(self, source: str, target: str, kind: int) -> None:
        """Have llama.cpp quantise a file."""
        settings = self._native.LlamaModelQuantizeParams()
        settings.ftype, settings.nthread = kind, num_cores()
        self._native.model_quantize(source, target, settings)

    def metadata(self, key: str) -> str | None:
        """Return one value of the file's metadata as text, or None."""
        keys = [self._model.meta_key_by_index(n) for n in range(self._model.meta_count())]
        return self._model.meta_val_str(key) if key in keys else None

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return texts' token ids, special tokens read as such, none added."""
        return [
            list(self._vocab.tokenize(text, add_special=False, parse_special=True))
            for text in texts
        ]

    def ends_generation(self, token: int) -> bool:
        """Tell whether llama.cpp stops at a token."""
        return bool(self._vocab.is_eog(token))

    def adds_bos(self) -> bool:
        """Tell whether llama.cpp puts a beginning-of-text token before a prompt."""
        return bool(self._vocab.get_add_bos())

    def logits(self, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        """Return the logits of every position of one row."""
        import numpy as np

        context = self._context(len(ids))
        context.decode(self._batch(ids, every=True))
        return np.stack([np.array(context.get_logits_ith(n), np.float32) for n in range(len(ids))])

    def answer(self, ids: Sequence[int], num_tokens: int) -> list[int]:
        """Return the greedy continuation of a prompt, up to a token that ends it."""
        import numpy as np

        context = self._context(len(ids) + num_tokens)
        batch, found = self._batch(ids, every=False), []
        while len(found) < num_tokens:
            context.decode(batch)
            token = int(np.argmax(context.get_logits_ith(-1)))
            if self.ends_generation(token):
                break
            batch = self._batch([token], every=False, start=len(ids) + len(found))
            found.append(token)
        return found

    def _context(self, num_tokens: int) -> Any:
        settings = self._native.LlamaContextParams()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = max(32, num_tokens)
        settings.type_k = settings.type_v = _F32
        settings.flash_attn_type = 0
        # Not llama.cpp's four: threads that wait for each other without a core of their own take
        # many times as long.
        settings.n_threads = settings.n_threads_batch = num_cores()
        return self._native.LlamaContext(self._model, settings)

    def _batch(self, ids: Sequence[int], every: bool, start: int = 0) -> Any:
        batch = self._native.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
        for place, token in enumerate(ids):
            batch.add(token, start + place, [0], every or place == len(ids) - 1)
        return batch


def num_cores() -> int:
    """Return how many threads to work with: what the user says, or the cores there are."""
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def serve(source: BinaryIO, target: BinaryIO) -> None:
    """Answer requests until there are no more.

    Args:
        source: Where they come from.
        target: Where answers go to.
    """
    worker = Worker()
    while True:
        try:
            method, arguments = pickle.load(source)  # noqa: S301  (our own parent wrote it)
        except EOFError:
            return
        try:
            answer = ("ok", getattr(worker, method)(*arguments))
        except (ValueError, RuntimeError, OSError, KeyError) as error:
            answer = ("error", str(error))
        pickle.dump(answer, target, protocol=pickle.HIGHEST_PROTOCOL)
        target.flush()


if __name__ == "__main__":
    # What llama.cpp prints goes to the log; the answers have a descriptor of their own.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, answers)
