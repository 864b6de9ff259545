"""Compare the tensors in GGUF files with the weights they were made from, one tensor at a time.

Predictions of a small or hardly trained model may not show a fault in one tensor; the tensor does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whet.export.check import Finding, num_bits
from whet.export.gguf_layout import lay_out

if TYPE_CHECKING:
    import numpy as np

    from whet.export.tensors import Weights

# Relative error (root of mean squares) that a type's rounding may make in one tensor, by its bits. Of
# normally distributed weights 4-bit blocks lose 7 to 10%, each bit less twice that (docs/export.md).
_FLOATS = {"f32": 0.0, "f16": 2.0**-10, "bf16": 2.0**-8}
_BITS = {8: 0.02, 6: 0.05, 5: 0.1, 4: 0.2, 3: 0.4, 2: 0.9}
_NUM_ROWS = 256


def compare_tensors(weights: Weights, files: Sequence[Path], kinds: Sequence[str]) -> list[Finding]:
    """Compare rows of every tensor in some files with the model's weights.

    Args:
        weights: The model.
        files: GGUF files made of it.
        kinds: Their types.

    Returns:
        One finding a file: the tensor that is furthest off.
    """
    import gguf

    tensors = [{t.name: t for t in gguf.GGUFReader(str(file)).tensors} for file in files]
    worst = [("", 0.0)] * len(files)
    layout = lay_out(weights)
    for output in layout.outputs:
        value = output.make(*(weights.read(name) for name in output.sources)).float().numpy()
        rows = value.reshape(-1, value.shape[-1])
        chosen = slice(None, None, max(1, len(rows) // _NUM_ROWS))
        for number, found in enumerate(tensors):
            error = _relative(found.get(output.name), rows[chosen], chosen, len(rows))
            if error > worst[number][1]:
                worst[number] = (output.name, error)
    return [
        _finding(kind, len(layout.outputs), *far) for kind, far in zip(kinds, worst, strict=True)
    ]


def _relative(tensor: Any, truth: np.ndarray[Any, Any], chosen: slice, num_rows: int) -> float:
    """Return the relative error of some rows of a file's tensor; infinite when it is another one."""
    import numpy as np
    from gguf.quants import dequantize

    if tensor is None:
        return np.inf
    data = np.asarray(tensor.data)
    data = data.reshape(-1, data.shape[-1])
    if len(data) != num_rows:
        return np.inf
    rows = dequantize(np.ascontiguousarray(data[chosen]), tensor.tensor_type)
    if rows.shape != truth.shape:
        return np.inf
    size = float(np.sqrt(np.square(truth, dtype=np.float64).mean()))
    error = float(np.sqrt(np.square(rows - truth, dtype=np.float64).mean()))
    error = np.inf if np.isnan(error) else error
    return error / size if size else error


def _finding(kind: str, count: int, name: str, error: float) -> Finding:
    allowed = _FLOATS[kind] if kind in _FLOATS else _BITS[num_bits(kind)]
    passed = error <= allowed
    where = f" ({name})" if name else ""
    return Finding(
        "tensors", f"{count}, off by {error:.2%} at most{where}", f"{allowed:.2%}", passed,
        "" if passed else f"tensor {name} is not what was trained",
    )  # fmt: skip
