"""What a decoder layer computes, read from the live module: structure and values, not class names.

A layer is understood as two halves, h = x + m post(body(norm(x))), the first with attention, the second
with an MLP. Norms and activations are recognised by what they answer to a test input. What is not
recognised raises Unsupported with the reason, and that half (or the whole layer) keeps its own code.
Whatever is read here is still checked against the original before it is used (parity.py).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from whet.engine.projection import Unsupported, read_projection
from whet.kernels.glu import Activation, glu_forward
from whet.kernels.norm import norm_forward

RopeLayout = Literal["half", "interleaved", "interleaved_repeated"]


@dataclass(frozen=True, slots=True)
class NormSpec:
    """A norm of the hidden states, or of each head.

    Args:
        path: Where it is in the layer.
        eps: Added to the variance.
        centered: LayerNorm, or RMSNorm.
        unit_offset: The scale is 1 + weight.
    """

    path: str
    eps: float
    centered: bool
    unit_offset: bool


@dataclass(frozen=True, slots=True)
class HalfSpec:
    """The frame of a half: h = x + multiplier * post(body(norm(x))).

    Args:
        norm: The norm in front.
        body: Path of the attention or the MLP.
        post_norm: The norm behind (Gemma 2 and 3), or None.
        multiplier: Factor of what is added to the residual (Granite), else 1.
        dropout: The largest dropout probability inside; training with one, its own code runs.
    """

    norm: NormSpec
    body: str
    post_norm: NormSpec | None
    multiplier: float
    dropout: float


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """The inside of an attention.

    Args:
        qkv: Paths of the projections: q, k and v, or one for all.
        out: Path of the output projection.
        num_heads: H.
        num_kv_heads: G.
        head_width: K.
        q_norm: Norm of each query head, or None.
        k_norm: Norm of each key head, or None.
        scale: Factor of the scores.
        window: Sliding window in tokens, or None.
        softcap: Soft cap of the scores, or None.
        rope: How pairs of rotated entries lie.
    """

    qkv: tuple[str, ...]
    out: str
    num_heads: int
    num_kv_heads: int
    head_width: int
    q_norm: NormSpec | None
    k_norm: NormSpec | None
    scale: float
    window: int | None
    softcap: float | None
    rope: RopeLayout = "half"


@dataclass(frozen=True, slots=True)
class MlpSpec:
    """The inside of an MLP.

    Args:
        up: Paths of the projections: gate and up, or one for both, or one plain.
        down: Path of the projection back.
        gated: act(gate) * up, or act(up) alone.
        activation: Which.
    """

    up: tuple[str, ...]
    down: str
    gated: bool
    activation: Activation


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """A decoder layer.

    Args:
        attention_half: Frame of the attention half.
        mlp_half: Frame of the MLP half.
        attention: Its inside, or the reason why its own code runs.
        mlp: Its inside, or the reason why its own code runs.
    """

    attention_half: HalfSpec
    mlp_half: HalfSpec
    attention: AttentionSpec | str
    mlp: MlpSpec | str


# Names a role goes by; the first that exists is taken, and whatever is left over is not understood.
ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
FIRST_NORMS = ("input_layernorm", "ln_1", "attention_norm")
SECOND_NORMS = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2", "ffn_norm")
QKV_NAMES = (("q_proj", "k_proj", "v_proj"), ("qkv_proj",), ("c_attn",))
OUT_NAMES = ("o_proj", "out_proj", "c_proj", "dense")
UP_NAMES = (("gate_proj", "up_proj"), ("gate_up_proj",), ("c_fc",), ("fc1",), ("up_proj",))
DOWN_NAMES = ("down_proj", "c_proj", "fc2")
ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "hidden_act")


def read_layer(layer: nn.Module) -> LayerSpec:
    """Read a decoder layer.

    Args:
        layer: A live decoder layer, with or without adapters.

    Raises:
        Unsupported: Its two halves could not be told apart, or it does something between them.
    """
    children = dict(layer.named_children())
    attention, mlp = _first(children, ATTENTION_NAMES), _first(children, MLP_NAMES)
    first, second = _first(children, FIRST_NORMS), _first(children, SECOND_NORMS)
    used = {attention, mlp, first, second}
    post_first = post_second = None
    if second == "pre_feedforward_layernorm":
        post_first = _first(children, ("post_attention_layernorm",))
        post_second = _first(children, ("post_feedforward_layernorm",))
        used |= {post_first, post_second}
    dropouts = {name: c for name, c in children.items() if isinstance(c, nn.Dropout)}
    unknown = [n for n in children if n not in used and n not in dropouts]
    if unknown:
        raise Unsupported(f"what `{unknown[0]}` does in the layer is not known")
    if any(True for _ in layer.parameters(recurse=False)):
        raise Unsupported("the layer has parameters of its own")
    multiplier = float(getattr(layer, "residual_multiplier", 1.0))
    outside = max([d.p for d in dropouts.values()], default=0.0)
    frame = partial(_read_half, layer, children, multiplier, outside)
    return LayerSpec(
        frame(first, attention, post_first),
        frame(second, mlp, post_second),
        _or_reason(read_attention, children[attention], attention),
        _or_reason(read_mlp, children[mlp], mlp),
    )


def _first(children: dict[str, nn.Module], names: tuple[str, ...]) -> str:
    found = next((name for name in names if name in children), None)
    if found is None:
        raise Unsupported(f"the layer has no `{names[0]}` under any name the engine knows")
    return found


def _or_reason(read: Any, module: nn.Module, path: str) -> Any:
    try:
        return read(module, path)
    except Unsupported as reason:
        return str(reason)


def _read_half(
    layer: nn.Module,
    children: dict[str, nn.Module],
    multiplier: float,
    dropout: float,
    norm: str,
    body: str,
    post: str | None,
) -> HalfSpec:
    # An adapter's own dropout is read with its projection, call by call.
    inside = [
        m.p
        for name, m in children[body].named_modules()
        if isinstance(m, nn.Dropout) and "lora_dropout" not in name
    ]
    for name in ("attention_dropout", "attn_dropout", "dropout"):
        value = getattr(children[body], name, 0.0)
        inside.append(value if isinstance(value, float) else 0.0)
    return HalfSpec(
        read_norm(children[norm], norm),
        body,
        read_norm(children[post], post) if post else None,
        multiplier,
        max([dropout, *inside]),
    )


def read_norm(module: nn.Module, path: str) -> NormSpec:
    """Recognise a norm by what it answers.

    Args:
        module: A module with a one-dimensional weight.
        path: Where it is.

    Raises:
        Unsupported: It answers like none that the engine knows.
    """
    weight = getattr(module, "weight", None)
    eps = next(
        (getattr(module, n) for n in ("variance_epsilon", "eps") if hasattr(module, n)), None
    )
    known = isinstance(weight, torch.Tensor) and weight.ndim == 1 and isinstance(eps, float)
    if not known or module._forward_hooks or module._forward_pre_hooks:
        raise Unsupported(f"`{path}` is not a norm the engine knows")
    assert weight is not None and eps is not None
    if isinstance(weight, FakeTensor):
        return read_norm(_with_values(module), path)
    bias = getattr(module, "bias", None)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, len(weight), generator=generator).add_(0.5).to(weight.device, weight.dtype)
    with torch.no_grad():
        answer = module(x).float()
        for centered, unit_offset in ((False, False), (False, True), (True, False)):
            ours = norm_forward(
                x, weight, bias, eps=eps, centered=centered, unit_offset=unit_offset
            )[0]
            # Rounding apart; the candidates themselves are far from each other.
            if torch.allclose(ours.float(), answer, rtol=3e-2, atol=3e-2 * answer.abs().max()):
                return NormSpec(path, eps, centered, unit_offset)
    raise Unsupported(f"`{path}` normalises in a way the engine does not know")


def _with_values(norm: nn.Module) -> nn.Module:
    """Return a norm of which only shapes are known (a plan's) with random values."""
    made, generator = copy.copy(norm), torch.Generator().manual_seed(0)
    made._parameters = {
        name: None
        if parameter is None
        else nn.Parameter(
            torch.rand(parameter.shape, generator=generator).add_(0.5).to(parameter.dtype)
        )
        for name, parameter in norm._parameters.items()
    }
    return made


def read_attention(module: nn.Module, path: str) -> AttentionSpec:
    """Read the inside of an attention.

    Args:
        module: The attention.
        path: Where it is in the layer.

    Raises:
        Unsupported: It has parts that an AttentionSpec does not say.
    """
    children = dict(module.named_children())
    qkv = next((names for names in QKV_NAMES if all(n in children for n in names)), None)
    if qkv is None:
        raise Unsupported("attention without q, k and v projections (latent attention?)")
    out = _first(children, OUT_NAMES)
    known = {*qkv, out, "q_norm", "k_norm", "rotary_emb"}
    for name, child in children.items():
        if name not in known and not isinstance(child, nn.Dropout):
            raise Unsupported(f"what `{name}` does in the attention is not known")
    if any(True for _ in module.parameters(recurse=False)):
        raise Unsupported("attention with parameters of its own (sinks?)")
    config = getattr(module, "config", None)
    projections = [read_structure(children[name]) for name in qkv]
    width = getattr(module, "head_dim", None)
    if not isinstance(width, int):
        raise Unsupported("attention that does not tell its head width")
    if len(qkv) == 3:
        heads, groups, values = (p // width for p in projections)
        if groups != values:
            raise Unsupported("values whose heads are not those of the keys")
    else:
        heads = getattr(config, "num_attention_heads", 0)
        groups = getattr(config, "num_key_value_heads", None) or heads
        if projections[0] != (heads + 2 * groups) * width:
            raise Unsupported("a fused qkv projection of another layout")
    if read_structure(children[out], inputs=True) != heads * width:
        raise Unsupported("values of another width than the keys")
    head_norms = [
        read_norm(children[name], f"{path}.{name}") if name in children else None
        for name in ("q_norm", "k_norm")
    ]
    for norm in head_norms:
        if norm and (norm.centered or len(children[norm.path.split(".")[-1]].weight) != width):  # type: ignore[arg-type]
            raise Unsupported("a q/k norm that is not an RMSNorm of each head")
    window = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
    softcap = getattr(module, "attn_logit_softcapping", None)
    return AttentionSpec(
        tuple(f"{path}.{name}" for name in qkv),
        f"{path}.{out}",
        heads, groups, width,
        head_norms[0], head_norms[1],
        float(getattr(module, "scaling", width**-0.5)),
        window if isinstance(window, int) and window > 0 else None,
        float(softcap) if softcap else None,
    )  # fmt: skip


def read_mlp(module: nn.Module, path: str) -> MlpSpec:
    """Read the inside of an MLP.

    Args:
        module: The MLP.
        path: Where it is in the layer.

    Raises:
        Unsupported: It is none, for instance because it has experts.
    """
    children = dict(module.named_children())
    if "experts" in children:
        raise Unsupported("experts, which transformers' own grouped code computes")
    up = next((names for names in UP_NAMES if all(n in children for n in names)), None)
    if up is None:
        raise Unsupported("an MLP without projections the engine knows")
    down = _first(children, DOWN_NAMES)
    act = next((getattr(module, n) for n in ACTIVATION_NAMES if hasattr(module, n)), None)
    known = {*up, down, *ACTIVATION_NAMES}
    for name, child in children.items():
        if name not in known and not isinstance(child, nn.Dropout):
            raise Unsupported(f"what `{name}` does in the MLP is not known")
    if any(True for _ in module.parameters(recurse=False)):
        raise Unsupported("an MLP with parameters of its own")
    outputs = sum(read_structure(children[name]) for name in up)
    ratio = outputs / read_structure(children[down], inputs=True)
    if ratio not in (1, 2):
        raise Unsupported("an MLP whose projections do not fit each other")
    return MlpSpec(
        tuple(f"{path}.{name}" for name in up), f"{path}.{down}", ratio == 2, read_activation(act)
    )


def read_structure(module: nn.Module, inputs: bool = False) -> int:
    """Return the output width (or input width) of a linear layer, whatever adapters are on it.

    Args:
        module: A linear layer, as `read_projection` takes it.
        inputs: The input width instead.
    """
    base = module.get_submodule("base_layer") if hasattr(module, "base_layer") else module
    projection = read_projection(base)
    return projection.num_inputs if inputs else projection.num_outputs


def read_activation(function: Any) -> Activation:
    """Recognise an activation by what it answers.

    Raises:
        Unsupported: It answers like none that the engine knows.
    """
    if not callable(function):
        raise Unsupported("an MLP that does not tell its activation")
    x = torch.linspace(-6, 6, 101)[None]
    answer: torch.Tensor = function(x)  # type: ignore[assignment]
    for name in ("silu", "gelu_tanh", "gelu_erf", "relu", "relu2"):
        if torch.allclose(glu_forward(x, None, name), answer, rtol=1e-5, atol=1e-6):
            return name
    raise Unsupported("an activation the engine does not know")
