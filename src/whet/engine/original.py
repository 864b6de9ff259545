"""The original as the measure: a layer's own modules, with random small parameters, in high precision."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn

from whet.engine.spec import AttentionSpec, LayerSpec

# The truth is computed in float64 up to this many parameters, and in float32 for 16-bit models beyond.
FLOAT64_PARAMETERS = 500_000_000


def original_half(
    layer: nn.Module,
    spec: LayerSpec,
    part: str,
    x: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """Compute a half of one document with the layer's own modules, as the layer's forward does.

    Args:
        layer: The layer.
        spec: Its frame.
        part: `attention` or `mlp`.
        x: (1, L, D) hidden states.
        angles: cos and sin of at least L tokens.
    """
    half = spec.attention_half if part == "attention" else spec.mlp_half
    n = layer.get_submodule(half.norm.path)(x)
    body = layer.get_submodule(half.body)
    if part == "attention":
        length = x.shape[1]
        inside = spec.attention
        window = inside.window if isinstance(inside, AttentionSpec) else None
        place = torch.arange(length, device=x.device)
        behind = place[:, None] - place[None]
        hidden = (behind < 0) | (behind >= (window or length))
        mask = torch.zeros(1, 1, length, length, dtype=x.dtype, device=x.device)
        mask.masked_fill_(hidden, torch.finfo(x.dtype).min)
        cut = angles and tuple(a[:, :length].to(x.dtype) for a in angles)
        z = body(
            hidden_states=n, attention_mask=mask, position_embeddings=cut, position_ids=place[None]
        )
    else:
        z = body(n)
    z = z[0] if isinstance(z, tuple) else z
    if half.post_norm is not None:
        z = layer.get_submodule(half.post_norm.path)(z)
    return x + half.multiplier * z


def randomize_(layer: nn.Module, generator: torch.Generator) -> None:
    """Make the small parameters random: adapters, norms and biases, whose starts hide faults."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            if "lora_B" in name:
                parameter.copy_(noise * 0.05)
            elif "lora_A" in name:
                parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
            elif parameter.ndim == 1:
                parameter.add_(noise * 0.1)


def attend_plainly_(layer: nn.Module, spec: LayerSpec) -> None:
    """Let the copy's own attention take a mask and any dtype."""
    capped = isinstance(spec.attention, AttentionSpec) and spec.attention.softcap is not None
    for module in layer.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            eager = capped or config._attn_implementation == "eager"
            config._attn_implementation = "eager" if eager else "sdpa"


def precision_of(layer: nn.Module) -> torch.dtype:
    """Return the dtype of a module's weights."""
    return next(p.dtype for p in layer.parameters() if p.is_floating_point())


def in_high_precision(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy in float64 (float32 when big), its 4-bit weights dequantised.

    Args:
        module: A layer or a whole model.
        dtype: What 4-bit weights are multiplied in, to which both programs round them.
    """
    dense = copy.deepcopy(module)
    for child in dense.modules():
        config: Any = getattr(child, "config", None)
        if getattr(config, "_experts_implementation", None) is not None:
            config._experts_implementation = "eager"  # the grouped products take no float64
    for name, child in list(dense.named_modules()):
        # peft's adapter around such a layer has the same class name.
        if type(child).__name__ == "Linear4bit" and not hasattr(child, "base_layer"):
            parent, _, last = name.rpartition(".")
            setattr(dense.get_submodule(parent), last, _dense(child, dtype))
    size = sum(p.numel() for p in dense.parameters())
    exact = size <= FLOAT64_PARAMETERS or dtype == torch.float32
    high = torch.float64 if exact else torch.float32
    return dense.to(high)


def _dense(module: Any, dtype: torch.dtype) -> nn.Linear:
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(module.weight.data, module.weight.quant_state).to(dtype)
    made = nn.Linear(
        weight.shape[1], weight.shape[0], module.bias is not None, device=weight.device
    )
    made.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        bias = module.bias.detach().clone()
        made.bias = nn.Parameter(bias, requires_grad=module.bias.requires_grad)
    return made
