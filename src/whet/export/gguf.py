"""Write GGUF files, tensor by tensor, and have llama.cpp's own quantiser make the small ones of them.

f32, f16, bf16 and q8_0 are written directly; every other type is made by `model_quantize` of the
package cyllama (extra `gguf`) from a 16-bit file. Nothing is compiled or fetched.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whet.errors import InputError, WhetError, did_you_mean
from whet.export.gguf_layout import Layout, Output, lay_out
from whet.export.gguf_tokenizer import Vocabulary
from whet.export.llama_cpp import LlamaProcess, require
from whet.runs import require_free, writing

if TYPE_CHECKING:
    import numpy as np
    import torch

    from whet.export.tensors import Weights

logger = logging.getLogger(__name__)

# What whet writes itself, and what each is in llama.cpp's list of file types.
DIRECT = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}
# What llama.cpp's quantiser makes: its numbers of file types.
QUANTISED = {
    "q4_0": 2, "q4_1": 3, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12, "q3_k_l": 13,
    "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18, "q2_k_s": 21, "iq4_nl": 25,
    "iq3_s": 26, "iq3_m": 27, "iq4_xs": 30, "tq1_0": 36, "tq2_0": 37,
}  # fmt: skip
_ALSO = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "q4_k": "q4_k_m", "q5_k": "q5_k_m",
         "q3_k": "q3_k_m"}  # fmt: skip
_BLOCK = 32


def parse_types(names: Sequence[str]) -> list[str]:
    """Check the names of GGUF types, as they are typed or scripts give them.

    Args:
        names: Such as `f16` or `Q4_K_M`; a name may hold several, with commas.

    Raises:
        InputError: There is no such type.
    """
    found: list[str] = []
    known = [*DIRECT, *QUANTISED]
    for name in (part.strip().lower() for text in names for part in text.split(",")):
        own = _ALSO.get(name, name)
        if own not in known:
            guess = did_you_mean(own, known)
            raise InputError(
                f"there is no GGUF type '{name}'",
                fix=f"did you mean '{guess}'?" if guess else f"use one of {', '.join(known)}",
            )
        if own not in found:
            found.append(own)
    return found


def write_gguf(
    weights: Weights,
    vocabulary: Vocabulary,
    path: Path,
    kind: str,
    name: str,
    more: dict[str, Any] | None = None,
) -> Layout:
    """Write a GGUF file of one of the types in DIRECT; one tensor at a time is in memory.

    Args:
        weights: The model.
        vocabulary: Its tokenizer.
        path: Where to; the file is whole or absent.
        kind: The type of its matrices. Vectors and routers stay float32.
        name: The model's name, in the file's metadata.
        more: More metadata by whole key, such as general.license.

    Returns:
        What was written where.

    Raises:
        InputError: llama.cpp does not know the family, or a weight is too large for float16.
        WhetError: The disk is full.
    """
    import gguf

    layout = lay_out(weights)
    types = [_type_of(output, kind) for output in layout.outputs]
    sizes = [_shape(output, own) for output, own in zip(layout.outputs, types, strict=True)]
    require_free(path, sum(num for _, num in sizes), f"the {kind} GGUF file")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            writer = gguf.GGUFWriter(str(temporary), layout.arch)
            _add_metadata(writer, layout, vocabulary, kind, name, more or {})
            for output, own, (shape, num_bytes) in zip(layout.outputs, types, sizes, strict=True):
                writer.add_tensor_info(output.name, shape, _numpy_type(own), num_bytes, own)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for output, own in zip(layout.outputs, types, strict=True):
                writer.write_tensor_data(_encoded(output, own, weights))
            writer.close()
            _finish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return layout


def quantise(source: Path, path: Path, kind: str) -> None:
    """Have llama.cpp make a GGUF file of one of the types in QUANTISED.

    Args:
        source: A GGUF file in 16 or 32 bit.
        path: Where to; the file is whole or absent.
        kind: The type.

    Raises:
        InputError: The package cyllama is not installed.
        WhetError: llama.cpp refuses the model, or the disk is full.
    """
    require()
    require_free(path, source.stat().st_size // 2, f"the {kind} GGUF file")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with LlamaProcess() as process:
                process.ask("quantise", str(source), str(temporary), QUANTISED[kind])
            _finish(temporary, path)
        except WhetError as error:
            raise WhetError(f"{kind} of '{source.name}' could not be made: {error.what}") from error
        finally:
            temporary.unlink(missing_ok=True)


def _finish(temporary: Path, path: Path) -> None:
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _type_of(output: Output, kind: str) -> Any:
    from gguf import GGMLQuantizationType as Types

    if output.exact:
        return Types.F32
    if kind == "q8_0" and output.shape[-1] % _BLOCK:
        return Types.F16  # rows that are no whole blocks
    return Types[kind.upper()]


def _numpy_type(own: Any) -> Any:
    import numpy as np

    return {"F32": np.float32, "F16": np.float16}.get(own.name, np.uint8)


def _shape(output: Output, own: Any) -> tuple[tuple[int, ...], int]:
    """Return the shape that the writer wants, which for packed types counts bytes, and all bytes."""
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import quant_shape_to_byte_shape

    packed = tuple(quant_shape_to_byte_shape(output.shape, own))
    num_bytes = 1
    for size in packed:
        num_bytes *= size
    if own.name in ("F32", "F16"):
        assert num_bytes % GGML_QUANT_SIZES[own][1] == 0
        return output.shape, num_bytes
    return packed, num_bytes


def _encoded(output: Output, own: Any, weights: Weights) -> np.ndarray[Any, Any]:
    """Make one tensor and encode it."""
    import torch
    from gguf.quants import quantize

    value: torch.Tensor = output.make(*(weights.read(name) for name in output.sources)).float()
    assert tuple(value.shape) == output.shape, (output.name, value.shape, output.shape)
    if own.name == "BF16":
        # torch rounds to nearest even, as llama.cpp does.
        return value.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    if own.name == "F16" and not torch.isfinite(value.to(torch.float16)).all():
        raise InputError(
            f"tensor {output.name} does not fit into float16",
            f"{value.abs().max().item():.3g}", "use --quant bf16 or f32",
        )  # fmt: skip
    return quantize(value.contiguous().numpy(), own)


def _add_metadata(
    writer: Any,
    layout: Layout,
    vocabulary: Vocabulary,
    kind: str,
    name: str,
    more: dict[str, Any],
) -> None:
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(DIRECT[kind])
    writer.add_quantization_version(2)
    values = {f"{layout.arch}.{key}": value for key, value in layout.settings.values.items()}
    for key, value in {**values, **more}.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    vocabulary.write(writer)
