"""Put the engine into one model instance, and take it out again.

Only `forward` of that instance's decoder layers, last norm, decoder and top is set, as attributes of
the instances; classes, weights, names and `state_dict` stay what they were. The report says for every
layer and part whether it is fused, or keeps its own code and why.
"""

from __future__ import annotations

import contextlib
import functools
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from whet.engine import model as models
from whet.engine.head import Head, read_head
from whet.engine.layer import LayerRecord, attention_interface
from whet.engine.memory import Policy
from whet.engine.model import EngineState, NormRecord
from whet.engine.outside import stand_aside
from whet.engine.projection import Unsupported, keep_4bit_weights
from whet.engine.report import PartReport, SwapReport
from whet.engine.spec import LayerSpec, read_layer, read_norm
from whet.errors import WhetError

if TYPE_CHECKING:
    from whet.engine.parity import Seen

Check = Literal["quick", "full", "off"]
LAST_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm")


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How the engine goes in.

    Args:
        check: Compare with the original when it goes in: each distinct layer and the whole model on a
            few tokens (quick), every layer (full), or nothing (off).
        strict: Raise when anything keeps its own code.
        debug: Report the first value that is not finite, with the layer it came from.
        head_rows: Rows of a chunk of logits; None takes the device's default.
        policies: Where saved tensors stay, one for each layer, or one for all.
        block_tokens: Tokens a layer works on at a time; None takes the device's default.
    """

    check: Check = "quick"
    strict: bool = False
    debug: bool = False
    head_rows: int | None = None
    policies: Policy | tuple[Policy, ...] = Policy()
    block_tokens: int | None = None


def attach(
    model: Any, settings: EngineSettings | None = None, seen: Seen | str | None = None
) -> SwapReport:
    """Put the engine into a model.

    Args:
        model: A causal language model of transformers, or a peft model around one.
        settings: How; None takes the defaults.
        seen: What its layers are handed and give back, or the reason why nobody knows; None runs the
            model once to see.

    Returns:
        The report, which `report_of` gives again later.

    Raises:
        WhetError: Something keeps its own code and `strict` is set.
    """
    from whet.engine import parity

    settings = settings or EngineSettings()
    base = base_of(model)
    detach(base)
    keep_4bit_weights(base)
    register_attention()
    decoder = models.decoder_of(base)
    blocks = decoder_layers(decoder)
    if seen is None and blocks:
        seen = parity.observe(base, blocks)
    unseen = seen if isinstance(seen, str) else "the model does not run on plain token ids"
    seen = None if isinstance(seen, str) else seen
    layers: dict[int, LayerSpec | str] = {}
    for number, block in enumerate(blocks):
        layers[number] = _read(block) if seen else unseen
    head = _read_head(base, seen, settings) if seen else unseen
    state = EngineState(head, debug=settings.debug, top=weakref.ref(base))
    with contextlib.ExitStack() as undo:
        undo.callback(detach, base)
        for number, block in enumerate(blocks):
            spec = layers[number]
            if not isinstance(spec, str):
                _put_layer(block, spec, number, settings, seen)
        if seen and settings.check != "off":
            layers.update(parity.check_layers(blocks, layers, seen, settings.check == "full"))
            for number, block in enumerate(blocks):
                _update_layer(block, layers[number])
        norm = _attach_norm(decoder, state)
        state.owns_attention = all(
            not isinstance(spec, str) and not isinstance(spec.attention, str)
            for spec in layers.values()
        )
        _put(decoder, models.decoder_forward, state)
        _put(base, models.causal_forward, state)
        packing = _packing_reason(base, blocks, state)
        if not packing and seen and settings.check != "off":
            packing = parity.check_whole(base, seen)
        if packing:
            state.packs = False
            for block in blocks:
                _take(block)
        report = _report(layers, norm, head, packing)
        if settings.strict and report.kept:
            raise WhetError(
                "engine.strict is set, and not everything is fused: "
                + "; ".join(report.lines()[1:])
            )
        for block in blocks:
            if "_whet" in vars(block):
                vars(block)["_whet"].strict = settings.strict
        undo.pop_all()
    vars(base)["_whet_report"] = report
    return report


def detach(model: Any) -> None:
    """Take the engine out: every forward is the original again.

    Args:
        model: A model that `attach` was given; one without the engine is left as it is.
    """
    for module in base_of(model).modules():
        _take(module)
    vars(base_of(model)).pop("_whet_report", None)


def is_attached(model: Any) -> bool:
    """Tell whether the engine is in a model."""
    return "_whet_report" in vars(base_of(model))


def fuses_head(model: Any) -> bool:
    """Tell whether the engine answers a call with labels."""
    state = vars(base_of(model)).get("_whet")
    return state is not None and not state.paused and isinstance(state.head, Head)


def takes_packed(model: Any) -> bool:
    """Tell whether packed documents may be handed to a model: the engine keeps them apart."""
    state = vars(base_of(model)).get("_whet")
    return state is not None and not state.paused and state.packs


def set_policies(model: Any, policies: Sequence[Policy]) -> None:
    """Say where the saved tensors of each layer stay from now on.

    Args:
        model: A model with the engine in it.
        policies: One for each decoder layer; those of layers that keep their own code are not used.
    """
    blocks = decoder_layers(models.decoder_of(base_of(model)))
    for block, policy in zip(blocks, policies, strict=True):
        if "_whet" in vars(block):
            vars(block)["_whet"].policy = policy


def current_policies(model: Any) -> tuple[Policy, ...]:
    """Return where the saved tensors of each layer stay; layers of their own code keep theirs."""
    blocks = decoder_layers(models.decoder_of(base_of(model)))
    records = [vars(block).get("_whet") for block in blocks]
    return tuple(r.policy if isinstance(r, LayerRecord) else Policy() for r in records)


def report_of(model: Any) -> SwapReport | None:
    """Return the report of the engine in a model, None when it is not in."""
    return vars(base_of(model)).get("_whet_report")


@contextlib.contextmanager
def paused(model: Any) -> Iterator[None]:
    """Let the original forwards run inside the body."""
    state = vars(base_of(model)).get("_whet")
    before = getattr(state, "paused", False)
    set_paused(model, True)
    try:
        yield
    finally:
        set_paused(model, before)


def met(model: Any) -> dict[str, Any]:
    """Return what the engine met since it was put in: batches without labels, halves that fell back."""
    base = base_of(model)
    if not is_attached(base):
        return {}
    records = [vars(m).get("_whet") for m in base.modules()]
    fallbacks: Counter[str] = Counter()
    for record in records:
        if isinstance(record, LayerRecord):
            fallbacks.update(record.fallbacks)
    state: EngineState = vars(base)["_whet"]
    return {
        "unlabelled_batches": state.unlabelled_batches,
        "fallbacks": sorted(fallbacks),
        "notes": state.notes,
    }


def set_paused(model: Any, on: bool) -> None:
    """Let the original forwards run from now on (`on`), or the engine again."""
    state = vars(base_of(model)).get("_whet")
    if state is not None:
        state.paused = on


def stay_on_top(model: Any) -> None:
    """Go above a forward that somebody has put on the model since, such as trl's fused head.

    Args:
        model: A model with the engine in it.
    """
    base = base_of(model)
    own = vars(base)
    if "_whet" not in own or hasattr(own["forward"].__func__, "stands_in"):
        return
    own["_whet_below"] = own["forward"]
    stand_in = _stand_in(models.causal_forward, type(base).forward)
    own["forward"] = types.MethodType(stand_in, base)


def base_of(model: Any) -> Any:
    """Return the transformers model inside a peft or parallel wrapper."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_layers(decoder: nn.Module) -> list[nn.Module]:
    """Return the decoder's layers: its largest list of modules; none when it has no list."""
    lists = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if len(lists) <= 1:
        return list(lists[0]) if lists else []
    return list(max(lists, key=lambda m: sum(p.numel() for p in m.parameters())))


def _put(module: nn.Module, forward: Callable[..., Any], record: Any) -> None:
    """Set a module's forward, remembering what was there.

    Bound methods, so that a deep copy of the module gets forwards bound to the copy.
    """
    own = vars(module)
    own["_whet_original"] = own.get("forward") or types.MethodType(type(module).forward, module)
    own["_whet_had_own"] = "forward" in own
    own["_whet"] = record
    original = getattr(own["_whet_original"], "__func__", type(module).forward)
    own["forward"] = types.MethodType(_stand_in(forward, original), module)


def _stand_in(forward: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """Give the engine's forward the name and signature of the original.

    Trainer chooses a dataset's columns by it, and `generate` the inputs it makes. Somebody may hold on
    to it (trl's head does), so that after `detach` it must be the original.
    """

    @functools.wraps(original)
    def stands_in(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        chosen = forward if "_whet" in vars(self) else original
        return chosen(self, *args, **kwargs)

    stands_in.stands_in = True  # type: ignore[attr-defined]
    return stands_in


def _take(module: nn.Module) -> None:
    own = vars(module)
    if "_whet" not in own:
        return
    original, had_own = own.pop("_whet_original"), own.pop("_whet_had_own")
    below = own.pop("_whet_below", None)
    left = own.pop("forward")
    del own["_whet"]
    if below is None and not hasattr(left.__func__, "stands_in"):
        below = left  # somebody's forward went on top of the engine's and stays
    if below is not None:
        own["forward"] = below
    elif had_own or getattr(original, "__func__", None) is not type(module).forward:
        own["forward"] = original


def _read(block: nn.Module) -> LayerSpec | str:
    try:
        return stand_aside(block, read_layer(block))
    except Unsupported as reason:
        return str(reason)


def _put_layer(
    block: nn.Module, spec: LayerSpec, number: int, settings: EngineSettings, seen: Any
) -> None:
    policy = settings.policies
    record = LayerRecord(
        spec,
        policy if isinstance(policy, Policy) else policy[number],
        f"layer {number}",
        debug=settings.debug,
        returns_tuple=seen.layers[number].returns_tuple,
        block_tokens=settings.block_tokens,
    )
    _put(block, models.layer_forward, record)


def _update_layer(block: nn.Module, spec: LayerSpec | str) -> None:
    if isinstance(spec, str):
        _take(block)
    elif "_whet" in vars(block):
        vars(block)["_whet"].spec = spec


def _attach_norm(decoder: nn.Module, state: EngineState) -> PartReport:
    name = next((n for n in LAST_NORMS if isinstance(getattr(decoder, n, None), nn.Module)), None)
    if name is None:
        return PartReport(None, "norm", False, "the decoder has no last norm the engine knows")
    module = getattr(decoder, name)
    try:
        spec = read_norm(module, name)
    except Unsupported as reason:
        return PartReport(None, "norm", False, str(reason))
    _put(module, models.norm_forward, NormRecord(spec, state))
    return PartReport(None, "norm", True)


def _read_head(base: Any, seen: Any, settings: EngineSettings) -> Head | str:
    """Read how logits and loss are made; what the model answered to known tokens must fit."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    if getattr(base, "loss_function", None) is not ForCausalLMLoss:
        return "a loss of the model's own"
    softcap = getattr(base.config.get_text_config(), "final_logit_softcapping", None)
    head = Head(softcap=float(softcap) if softcap else None, chunk_rows=settings.head_rows)
    try:
        read_head(base.get_output_embeddings())
    except (Unsupported, AttributeError) as reason:
        return str(reason)
    if isinstance(seen.logits, FakeTensor):  # a plan's model has shapes only
        return head
    with torch.no_grad():
        ours = models.shaped_logits(base, head, seen.hidden).float()
    theirs = seen.logits.float()
    if head.softcap is None:
        place = theirs.abs().argmax()
        scale = float(theirs.flatten()[place] / ours.flatten()[place])
        if abs(scale - 1) > 0.02:
            head = replace(head, logit_scale=float(f"{scale:.3g}"))
            ours = ours * head.logit_scale
    if not torch.allclose(ours, theirs, rtol=2e-2, atol=2e-2 * float(theirs.abs().max())):
        return "its logits are not the last hidden state times the output embeddings"
    return head


def _packing_reason(base: Any, blocks: list[nn.Module], state: EngineState) -> str:
    """Say why batches cannot be unpadded, or nothing."""
    if state.owns_attention:
        return ""
    if not getattr(base, "_supports_attention_backend", False):
        return "an attention that is not fused and takes no other backend"
    return ""


def _report(
    layers: dict[int, LayerSpec | str], norm: PartReport, head: Head | str, packing: str
) -> SwapReport:
    parts = []
    for number, spec in layers.items():
        for part in ("attention", "mlp"):
            inside = spec if isinstance(spec, str) else getattr(spec, part)
            reason = inside if isinstance(inside, str) else packing
            parts.append(PartReport(number, part, not reason, reason))
    reason = head if isinstance(head, str) else ""
    single = [norm, PartReport(None, "head", not reason, reason)]
    return SwapReport([*parts, *single, PartReport(None, "unpadding", not packing, packing)])


def register_attention() -> None:
    """Make the engine's attention known to transformers, under the name `whet`."""
    from transformers import AttentionInterface

    AttentionInterface.register("whet", attention_interface)
