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
from whet.engine.original import (
    attend_plainly_,
    in_high_precision,
    original_half,
    precision_of,
    randomize_,
)
from whet.engine.projection import Unsupported
from whet.engine.spec import AttentionSpec, LayerSpec, MlpSpec
from whet.engine.unpad import from_lengths
from whet.errors import WhetError

# Tokens of the test input, and how they are cut into documents.
LENGTHS = (13, 1, 7, 19)


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
    largest = float(difference.detach().abs().max())
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
    if head is None:  # a model that scores whole texts: its layers can be fused all the same
        handles.append(base.base_model.register_forward_hook(
            lambda _, args, output: hidden.append(output.last_hidden_state)
        ))  # fmt: skip
    else:
        handles.append(head.register_forward_pre_hook(lambda _, args: hidden.append(args[0])))
    modes = [(module, module.training) for module in base.modules()]
    base.eval()
    try:
        with torch.no_grad():
            logits = base(input_ids=ids, use_cache=False).logits
    except (TypeError, ValueError, KeyError, NotImplementedError):
        return None
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
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
        key = (number if every else None, layer_key(block, spec))
        if key not in known:
            known[key] = spec if isinstance(spec, str) else _check_layer(block, spec, seen, number)
        checked[number] = known[key]
    return checked


def layer_key(block: nn.Module, spec: LayerSpec | str) -> Any:
    """Return what two layers share when one check stands for both."""
    shapes = tuple((n, p.shape, p.dtype, p.requires_grad) for n, p in block.named_parameters())
    return spec, shapes


def _check_layer(block: nn.Module, spec: LayerSpec, seen: Seen, number: int) -> LayerSpec:
    angles = seen.layers[number].position_embeddings
    if isinstance(spec.attention, AttentionSpec):
        reason = ""
        for rope in _layouts(angles):
            trial = replace(spec, attention=replace(spec.attention, rope=rope))
            reason = _reason(compare_thrice(block, trial, "attention", angles, seen.hidden.dtype))
            if not reason:
                spec = trial
                break
        if reason:
            spec = replace(spec, attention=reason)
    if isinstance(spec.mlp, MlpSpec):
        reason = _reason(compare_thrice(block, spec, "mlp", angles, seen.hidden.dtype))
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


def compare_thrice(
    block: nn.Module,
    spec: LayerSpec,
    part: str,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    dtype: torch.dtype,
) -> list[Comparison] | str:
    """Compare a half on up to three draws of input and parameters, and return the first that passes.

    The largest of many rounding errors is itself a draw: in sixteen bits a right program misses the
    bound now and then, a wrong one misses it each time.

    Args:
        block: As for `compare_half`.
        spec: As for `compare_half`.
        part: As for `compare_half`.
        angles: As for `compare_half`.
        dtype: As for `compare_half`.
    """
    compared: list[Comparison] | str = ""
    for seed in range(3):
        compared = compare_half(block, spec, part, angles, dtype, seed=seed)
        if isinstance(compared, str) or all(one.passed for one in compared):
            break
    return compared


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
    attend_plainly_(trial, spec)
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
        kind = precision_of(layer) if layer is truth_layer else dtype
        x = x_TD.to(kind).requires_grad_()
        y = forward(layer, x)
        leaves = [x, *(layer.get_parameter(name) for name in names)]
        # What takes no part has no gradient: an adapter that is merged or switched off.
        grads = torch.autograd.grad(y, leaves, dy_TD.to(y.dtype), materialize_grads=True)
        return [y.detach(), *grads]

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


# The whole model on a few tokens: two programs that agree part by part may differ by what rounding
# adds up to; a window, a position or a document boundary in the wrong place is far outside.
WHOLE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 5e-2}


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
    modes = [(module, module.training) for module in base.modules()]
    base.eval()
    try:
        with torch.no_grad():
            call = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
            theirs = models.call_original(decoder, **call).last_hidden_state
            ours = decoder(**call).last_hidden_state
    except (Unsupported, WhetError) as reason:
        return str(reason)
    finally:
        for module, mode in modes:
            module.training = mode
    real = mask.bool()
    apart = (ours[real].float() - theirs[real].float()).norm() / theirs[real].float().norm()
    tolerance = WHOLE_TOLERANCE.get(ours.dtype, 1e-2)
    if not float(apart) <= tolerance:
        return f"the packed batch differs from the padded one by {float(apart):.1%}"
    return ""
