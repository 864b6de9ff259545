"""How each model family is laid out in a GGUF file: llama.cpp's names, orders and settings.

`lay_out` says for one model which metadata and which tensors its file has, and how each tensor is made
from the checkpoint's, one at a time. Names come from the `gguf` package; what stands here are the
facts of llama.cpp's loaders that differ between families. A model that llama.cpp would compute
otherwise than transformers does is refused with the reason.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from whet.errors import InputError
from whet.export.gguf_settings import ARCHITECTURES, Settings, describe, kv_heads

if TYPE_CHECKING:
    import torch

    from whet.export.tensors import Weights

Make = Callable[..., "torch.Tensor"]

_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(\w+)\.weight$")
_LAYER = re.compile(r"\.(?:layers|h)\.(\d+)\.")
_IGNORED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of the file.

    Args:
        name: llama.cpp's name.
        sources: The checkpoint's tensors it is made of.
        shape: Its shape, outermost dimension first.
        make: Makes it from those tensors.
        exact: Whether it stays in float32 in every file (vectors, routers, rope factors).
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    make: Make
    exact: bool = False


@dataclass
class Layout:
    """A file's metadata and tensors.

    Args:
        arch: llama.cpp's name of the architecture.
        settings: Its metadata.
        outputs: Its tensors, in the file's order.
    """

    arch: str
    settings: Settings
    outputs: list[Output] = field(default_factory=list)


def lay_out(weights: Weights) -> Layout:
    """Lay out a model's GGUF file.

    Args:
        weights: The model's weights; nothing is read yet.

    Raises:
        InputError: llama.cpp does not know the family, or computes it otherwise.
    """
    import gguf

    config = weights.config
    arch = ARCHITECTURES.get(config.model_type)
    if arch is None:
        raise InputError(
            f"whet does not write GGUF files of the family '{config.model_type}'",
            fix=f"use --to merged; GGUF is there for {', '.join(sorted(ARCHITECTURES))}",
        )
    layout = Layout(arch, describe(config))
    num_layers = config.num_hidden_layers
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, num_layers)
    experts: dict[str, list[str]] = {}
    for name in weights.infos:
        layer = _LAYER.search(name)
        if name.endswith(_IGNORED) or (layer and int(layer[1]) >= num_layers):
            continue  # tables that are computed, and DeepSeek's extra prediction layers
        if expert := _EXPERT.match(name):
            experts.setdefault(f"{expert[1]}.{expert[3]}", []).append(name)
        else:
            _place(layout, weights, names, name)
    for base, members in experts.items():
        members.sort(key=lambda name: int(_EXPERT.match(name)[2]))  # type: ignore[index]
        shape = (len(members), *weights.infos[members[0]].shape)
        place = _named(names, base)
        layout.outputs.append(Output(f"{place}.weight", tuple(members), shape, _stack))
    for name, factors in layout.settings.factors.items():
        layout.outputs.append(Output(name, (), (len(factors),), _constant(factors), exact=True))
    layout.outputs.sort(key=_order)
    return layout


def _order(output: Output) -> tuple[int, int]:
    block = re.match(r"blk\.(\d+)\.", output.name)
    return (1, int(block[1])) if block else (0, 0)


def _named(names: Any, base: str) -> str:
    for candidate in (base, f"model.{base}", f"transformer.{base}", base.removeprefix("model.")):
        if (found := names.get_name(candidate)) is not None:
            return found
    raise InputError(
        f"llama.cpp has no tensor for '{base}'",
        fix="use --to merged; or report it, with the model's name",
    )


def _place(layout: Layout, weights: Weights, names: Any, name: str) -> None:
    """Add what one tensor of the checkpoint becomes."""
    config, shape = weights.config, weights.infos[name].shape
    if name.endswith(".e_score_correction_bias"):
        base, suffix = name.removesuffix("_bias"), "bias"
    else:
        base, _, suffix = name.rpartition(".")
    if layout.arch == "deepseek2" and base.endswith(".kv_b_proj"):
        _split_latent(layout, config, names, name)
        return
    target = f"{_named(names, base)}.{suffix}"
    make, exact = _as_is, len(shape) == 1 or "_inp" in target or target.startswith("position")
    if layout.arch == "llama" and re.search(r"\.[qk]_proj$", base):
        heads = config.num_attention_heads if base.endswith(".q_proj") else kv_heads(config)
        make = _interleave(heads)
    elif layout.arch == "gpt2" and re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", name):
        make, shape = _transpose, shape[::-1]
    elif layout.arch.startswith("gemma"):
        make = _gemma(config, base)
    elif target.endswith("ffn_gate_inp_shexp.weight"):
        make, shape, exact = _flatten, shape[-1:], True
    layout.outputs.append(Output(target, (name,), tuple(shape), make, exact))


# --- tensors -------------------------------------------------------------------------------------


def _as_is(value: torch.Tensor) -> torch.Tensor:
    return value


def _constant(factors: list[float]) -> Make:
    def make() -> torch.Tensor:
        import torch

        return torch.tensor(factors, dtype=torch.float32)

    return make


def _transpose(value: torch.Tensor) -> torch.Tensor:
    return value.T


def _flatten(value: torch.Tensor) -> torch.Tensor:
    return value.reshape(-1)


def _stack(*values: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.stack(values)


def _interleave(num_heads: int) -> Make:
    """Reorder each head's rows from rotated halves to rotated neighbours, llama.cpp's way for Llama."""

    def make(value: torch.Tensor) -> torch.Tensor:
        halves = value.reshape(num_heads, 2, value.shape[0] // num_heads // 2, *value.shape[1:])
        return halves.swapaxes(1, 2).reshape(value.shape)

    return make


def _gemma(config: Any, base: str) -> Make:
    """Gemma's norms multiply by 1 + w, llama.cpp's by w; and llama.cpp fixes the attention's scale."""
    factor = 1.0
    scalar = getattr(config, "query_pre_attn_scalar", None) or config.head_dim
    scaled = ".q_norm" if config.model_type == "gemma3_text" else ".q_proj"
    if base.endswith(scaled):
        factor = math.sqrt(_llama_cpp_scalar(config) / scalar)
    if base.endswith("norm"):
        return lambda value: (value.float() + 1) * factor
    return _as_is if factor == 1 else lambda value: value.float() * factor


def _llama_cpp_scalar(config: Any) -> float:
    """Return what llama.cpp divides by: the head's width, but for two 27B models, known by depth."""
    if (config.model_type, config.num_hidden_layers) in (("gemma2", 46), ("gemma3_text", 62)):
        return config.hidden_size / config.num_attention_heads
    return config.head_dim


def _split_latent(layout: Layout, config: Any, names: Any, name: str) -> None:
    """DeepSeek's kv_b_proj as two tensors by head: keys (transposed) and values."""
    heads, nope, width = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    rank = config.kv_lora_rank

    def keys(value: torch.Tensor) -> torch.Tensor:
        return value.reshape(heads, nope + width, rank)[:, :nope].transpose(1, 2)

    def values(value: torch.Tensor) -> torch.Tensor:
        return value.reshape(heads, nope + width, rank)[:, nope:]

    for part, make, shape in (("k", keys, (rank, nope)), ("v", values, (width, rank))):
        place = _named(names, name.replace("kv_b_proj.weight", f"{part}_b_proj"))
        layout.outputs.append(Output(f"{place}.weight", (name,), (heads, *shape), make))
