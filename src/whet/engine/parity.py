"""The proof: what the engine computes against what the original modules compute.

A part is judged by the triangulated bound: with truth = the original in float64 (float32 when it is
big), it passes when max|ours - truth| <= 2 max|original - truth| + 1e-5 rms(truth), for the output and
for every gradient. Small parameters are made random first: an adapter with B = 0 or a norm with
weight 1 would hide faults. Documents of a pack are computed one by one by the original.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from whet.engine import layer as layers
from whet.engine.layer import LayerRecord
from whet.engine.memory import Policy
from whet.engine.projection import Unsupported
from whet.engine.spec import AttentionSpec, LayerSpec, MlpSpec
from whet.engine.unpad import from_lengths

# Tokens of the test input, and how they are cut into documents.
LENGTHS = (13, 1, 7, 19)
# A layer's truth is computed in float64 up to this many parameters.
FLOAT64_PARAMETERS = 60_000_000


@dataclass(frozen=True, slots=True)
class SeenLayer:
    """What a layer was handed, and gave back, in one run of the original model."""

    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None
    returns_tuple: bool


@dataclass(frozen=True, slots=True)
class Seen:
    """One run of the original model on a row of `sum(LENGTHS)` known tokens."""

    input_ids: torch.Tensor
    hidden: torch.Tensor
    logits: torch.Tensor
    layers: list[SeenLayer]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One tensor, ours against the truth.

    Args:
        name: What it is.
        error: max|ours - truth|.
        original_error: max|original - truth|.
        bound: What the error may be.
    """

    name: str
    error: float
    original_error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the bound holds; NaN never passes."""
        return self.error <= self.bound


def judge(name: str, ours: torch.Tensor, original: torch.Tensor, truth: torch.Tensor) -> Comparison:
    """Compare by the triangulated bound.

    Args:
        name: What is compared.
        ours: The engine's result.
        original: The original module's, in the same dtype.
        truth: The original module's in high precision.
    """
    truth = truth.double()
    error = _largest(ours.double() - truth)
    original_error = _largest(original.double() - truth)
    rms = float(truth.square().mean().sqrt()) if truth.numel() else 0.0
    return Comparison(name, error, original_error, 2 * original_error + 1e-5 * rms)


def _largest(difference: torch.Tensor) -> float:
    if not difference.numel():
        return 0.0
    largest = float(difference.abs().max())
    return math.inf if math.isnan(largest) else largest


def observe(base: Any, blocks: list[nn.Module]) -> Seen | None:
    """Run the original model on a few tokens and note what its layers are handed.

    Returns:
        None when it does not run on plain token ids.
    """
    seen: dict[int, SeenLayer] = {}
    hidden: list[torch.Tensor] = []

    def note(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            given = kwargs.get("position_embeddings")
            seen[number] = SeenLayer(given, isinstance(output, tuple))

        return hook

    device = base.get_input_embeddings().weight.device
    vocab = base.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (1, sum(LENGTHS)), generator=generator).to(device)
    handles = [
        block.register_forward_hook(note(number), with_kwargs=True)
        for number, block in enumerate(blocks)
    ]
    head = base.get_output_embeddings()
    handles.append(head.register_forward_pre_hook(lambda _, args: hidden.append(args[0])))
    training = base.training
    base.eval()
    try:
        with torch.no_grad():
            logits = base(input_ids=ids, use_cache=False).logits
    except (TypeError, ValueError, KeyError, NotImplementedError):
        return None
    finally:
        for handle in handles:
            handle.remove()
        base.train(training)
    if len(seen) != len(blocks) or not hidden:
        return None
    return Seen(ids, hidden[-1], logits, [seen[i] for i in range(len(blocks))])


def check_layers(
    blocks: list[nn.Module], specs: dict[int, LayerSpec | str], seen: Seen, every: bool
) -> dict[int, LayerSpec | str]:
    """Check each layer that was understood, and return what is left of each spec.

    Args:
        blocks: The decoder layers.
        specs: What was read of each, or why not.
        seen: A run of the original model.
        every: Check every layer, not one of each structure.

    Returns:
        The specs, in which a half that failed has become its reason.
    """
    known: dict[Any, LayerSpec | str] = {}
    checked: dict[int, LayerSpec | str] = {}
    for number, block in enumerate(blocks):
        spec = specs[number]
        key = (number if every else None, spec, _shapes(block))
        if key not in known:
            known[key] = spec if isinstance(spec, str) else _check_layer(block, spec, seen, number)
        checked[number] = known[key]
    return checked


def _shapes(block: nn.Module) -> tuple[Any, ...]:
    return tuple((n, p.shape, p.dtype, p.requires_grad) for n, p in block.named_parameters())


def _check_layer(block: nn.Module, spec: LayerSpec, seen: Seen, number: int) -> LayerSpec:
    angles = seen.layers[number].position_embeddings
    if isinstance(spec.attention, AttentionSpec):
        reason = ""
        for rope in _layouts(angles):
            trial = replace(spec, attention=replace(spec.attention, rope=rope))
            reason = _reason(compare_half(block, trial, "attention", angles, seen.hidden.dtype))
            if not reason:
                spec = trial
                break
        if reason:
            spec = replace(spec, attention=reason)
    if isinstance(spec.mlp, MlpSpec):
        reason = _reason(compare_half(block, spec, "mlp", angles, seen.hidden.dtype))
        if reason:
            spec = replace(spec, mlp=reason)
    return spec


def _layouts(angles: Any) -> tuple[Any, ...]:
    """Return the rotation layouts that may be meant, the likeliest first."""
    if not isinstance(angles, tuple):
        return ("half",)
    cos = angles[0]
    if cos.shape[-1] > 2 and torch.equal(cos[..., 0::2], cos[..., 1::2]):
        return ("interleaved_repeated", "half")
    return ("half", "interleaved")


def _reason(compared: list[Comparison] | str) -> str:
    if isinstance(compared, str):
        return compared
    for one in compared:
        if not one.passed:
            return (
                f"differs from the original: {one.name} is off by {one.error:.2g}, "
                f"allowed {one.bound:.2g}"
            )
    return ""


def compare_half(
    block: nn.Module,
    spec: LayerSpec,
    part: str,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    dtype: torch.dtype,
    policy: Policy | None = None,
    seed: int = 0,
) -> list[Comparison] | str:
    """Compare one half of a layer with its original, output and all gradients.

    Args:
        block: The live layer; a copy of it is used.
        spec: What the engine takes it for.
        part: `attention` or `mlp`.
        angles: cos and sin of a row of tokens, as the decoder hands them to the layer.
        dtype: Type of the hidden states.
        policy: Where saved tensors stay.
        seed: Of the input and of the random parameters.

    Returns:
        The comparisons, or the reason why the engine cannot compute the half.
    """
    half = spec.attention_half if part == "attention" else spec.mlp_half
    device = next(block.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    trial = copy.deepcopy(block).eval()
    randomize_(trial, generator)
    _attend_plainly(trial, spec)
    truth_layer = in_high_precision(trial, dtype)
    packed = from_lengths(list(LENGTHS), device)
    width = len(trial.get_submodule(half.norm.path).weight)  # type: ignore[arg-type]
    x_TD, dy_TD = (
        torch.randn(packed.num_tokens, width, generator=generator).to(device, dtype)
        for _ in range(2)
    )
    names = [
        name
        for name, parameter in trial.named_parameters()
        if parameter.requires_grad and _belongs(name, half)
    ]

    def gradients(layer: nn.Module, forward: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        kind = torch.promote_types(dtype, _high(layer)) if layer is truth_layer else dtype
        x = x_TD.to(kind).requires_grad_()
        y = forward(layer, x)
        leaves = [x, *(layer.get_parameter(name) for name in names)]
        return [y.detach(), *torch.autograd.grad(y, leaves, dy_TD.to(y.dtype))]

    record = LayerRecord(spec, policy or Policy(), strict=True)

    def ours(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if part == "mlp":
            return layers.packed_mlp(layer, record, x)
        packed_angles = angles and tuple(a[:, packed.positions_T] for a in angles)
        kwargs = {"position_embeddings": packed_angles}
        return layers.packed_attention(layer, record, x, packed, kwargs)

    def original(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        parts = [
            original_half(layer, spec, part, document[None], angles)[0]
            for document in x.split(packed.lengths)
        ]
        return torch.cat(parts)

    try:
        with torch.enable_grad():
            results = gradients(trial, ours), gradients(trial, original)
            truths = gradients(truth_layer, original)
    except Unsupported as reason:
        return str(reason)
    labels = ["output", "gradient of the hidden states", *(f"gradient of {n}" for n in names)]
    return [judge(*group) for group in zip(labels, *results, truths, strict=True)]


def _belongs(name: str, half: Any) -> bool:
    places = [half.norm.path, half.body, *([half.post_norm.path] if half.post_norm else [])]
    return any(name.startswith(f"{place}.") for place in places)


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


def _attend_plainly(layer: nn.Module, spec: LayerSpec) -> None:
    """Let the copy's own attention take a mask and any dtype."""
    capped = isinstance(spec.attention, AttentionSpec) and spec.attention.softcap is not None
    for module in layer.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            eager = capped or config._attn_implementation == "eager"
            config._attn_implementation = "eager" if eager else "sdpa"


def _high(layer: nn.Module) -> torch.dtype:
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
        if type(child).__name__ == "Linear4bit":
            parent, _, last = name.rpartition(".")
            setattr(dense.get_submodule(parent), last, _dense(child, dtype))
    size = sum(p.numel() for p in dense.parameters())
    high = torch.float64 if size <= FLOAT64_PARAMETERS else torch.float32
    return dense.to(high)


def _dense(module: Any, dtype: torch.dtype) -> nn.Linear:
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(module.weight.data, module.weight.quant_state).to(dtype)
    made = nn.Linear(
        weight.shape[1], weight.shape[0], module.bias is not None, device=weight.device
    )
    made.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        made.bias = nn.Parameter(module.bias.detach().clone(), requires_grad=False)
    return made


# The whole model on a few tokens: two programs that agree part by part may differ by what rounding
# adds up to; a window, a position or a document boundary in the wrong place is far outside.
WHOLE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 8e-2, torch.float16: 2e-2}


def check_whole(base: Any, seen: Seen) -> str:
    """Compare the decoder's output on a padded batch, packed and original.

    Returns:
        Nothing, or in words how far they are apart.
    """
    from whet.engine import model as models

    decoder = models.decoder_of(base)
    ids = torch.cat([seen.input_ids, seen.input_ids.flip(1)])
    mask = torch.ones_like(ids)
    mask[1, ids.shape[1] // 2 :] = 0
    training = base.training
    base.eval()
    try:
        with torch.no_grad():
            call = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
            theirs = models.call_original(decoder, **call).last_hidden_state
            ours = decoder(**call).last_hidden_state
    except Unsupported as reason:
        return str(reason)
    finally:
        base.train(training)
    real = mask.bool()
    apart = (ours[real].float() - theirs[real].float()).norm() / theirs[real].float().norm()
    tolerance = WHOLE_TOLERANCE.get(ours.dtype, 1e-2)
    if not float(apart) <= tolerance:
        return f"a packed batch differs from the padded one by {float(apart):.1%}"
    return ""
