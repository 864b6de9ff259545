"""What others put on a model while the engine is in it, and who is in charge of what then.

Trainers hook the embeddings (NEFTune), and Liger Kernel sets forwards on a model's parts when a Trainer
with `use_liger_kernel` starts. A part has one owner: what lies inside a fused layer stays the engine's,
for such a forward computes what the part's class does; a top or a last norm that is given another
forward is the giver's. A forward that was there before the engine keeps its half (`stand_aside`).
"""

from __future__ import annotations

import inspect
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from whet.engine.projection import Unsupported, has_hooks

if TYPE_CHECKING:
    from whet.engine.model import EngineState
    from whet.engine.spec import LayerSpec

logger = logging.getLogger(__name__)

# Packages whose forwards compute what the class they stand in for computes.
SAME_FUNCTION = ("liger_kernel",)


def check_part(module: nn.Module) -> None:
    """Refuse a part of a fused layer whose call does more than it did when the engine went in.

    Args:
        module: A norm, an attention or an MLP.

    Raises:
        Unsupported: It has hooks, or a forward that was set since, and that may compute anything.
    """
    if has_hooks(module):
        raise Unsupported(f"{type(module).__name__} has hooks")
    if "forward" in vars(module) and _package_of(vars(module)["forward"]) not in SAME_FUNCTION:
        raise Unsupported(f"{type(module).__name__} has a forward of its own")


def stand_aside(block: nn.Module, spec: LayerSpec) -> LayerSpec:
    """Leave a half of a layer to whoever had set a forward inside of it before the engine went in.

    Args:
        block: The live layer.
        spec: What it computes by its structure.

    Returns:
        The spec, with the reason in the place of a half that is somebody else's.
    """
    kept: dict[str, Any] = {}
    for name, half in (("attention", spec.attention_half), ("mlp", spec.mlp_half)):
        paths = (half.norm.path, half.body, *([half.post_norm.path] if half.post_norm else []))
        for module in map(block.get_submodule, paths):
            if "forward" in vars(module):
                who = _package_of(vars(module)["forward"])
                kept[name] = f"{type(module).__name__} has a forward of its own, of {who}"
    return replace(spec, **kept) if kept else spec


def embed_for_hooks(decoder: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Embed a batch while it is still padded, where somebody's hook is on the embeddings.

    NEFTune's noise (arXiv 2310.05914) is scaled by the length of the padded rows; packed tokens would get
    less of it, and other draws.

    Args:
        decoder: What makes the hidden states.
        kwargs: The arguments of its call.

    Returns:
        The arguments, with `inputs_embeds` for `input_ids` where there is a hook.
    """
    input_ids, find = kwargs.get("input_ids"), getattr(decoder, "get_input_embeddings", None)
    embeddings = find() if input_ids is not None and find is not None else None
    if embeddings is None or not has_hooks(embeddings):
        return kwargs
    return {**kwargs, "input_ids": None, "inputs_embeds": embeddings(input_ids)}


def notice_others(decoder: nn.Module, state: EngineState) -> None:
    """Say once that somebody has put a forward over the engine's.

    Args:
        decoder: The decoder with the engine in it.
        state: The engine's; the sentence is kept in its notes.
    """
    top = state.top()
    if "others" in state.notes or top is None or state.paused:
        return
    modules = [m for m in (top, *decoder.children()) if "_whet" in vars(m)]
    found = [m for m in modules if not _is_ours(vars(m)["forward"])]
    if not found:
        return
    who = " and ".join(sorted({_package_of(vars(m)["forward"]) for m in found}))
    names = ", ".join(dict.fromkeys(type(m).__name__ for m in found))
    text = (
        f"{who} has set forwards of its own over whet's engine: {names} compute as it says; the decoder "
        "layers stay the engine's, and what it set inside of them is not called"
    )
    state.notes["others"] = text
    logger.warning(text)


def _is_ours(forward: Any) -> bool:
    """Tell whether a forward is the engine's, perhaps inside a wrapper such as accelerate's."""
    function = getattr(forward, "__func__", forward)
    found = inspect.unwrap(function, stop=lambda f: hasattr(f, "stands_in"))
    return hasattr(found, "stands_in")


def _package_of(forward: Any) -> str:
    function = getattr(forward, "__func__", forward)
    return (getattr(function, "__module__", None) or type(function).__module__).split(".")[0]
