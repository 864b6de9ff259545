"""A model output with a loss, whose logits are made when somebody looks at them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast


@dataclass
class LossOutput(CausalLMOutputWithPast):
    """CausalLMOutputWithPast in which `logits` is made at the first look.

    A training loop that only wants the loss never pays for logits of all tokens; one that wants them
    finds them where they always are.
    """

    def set_maker(self, make: Callable[[], torch.Tensor]) -> None:
        """Say how logits are made, should somebody ask.

        Under autocast it is kept on the loss: accelerate then builds the output anew from its tensors,
        and would lose it. Elsewhere the hidden states should not live as long as the loss does.
        """
        mixed = torch.is_autocast_enabled(self.loss.device.type)  # type: ignore[union-attr]
        vars(self.loss if mixed else self)["_make_logits"] = make

    def __getitem__(self, key: Any) -> Any:
        """Give a field by name or place; whoever looks behind the loss gets the logits."""
        if key == "logits":
            return self.logits
        found = super().__getitem__(key) if isinstance(key, str) or key == 0 else None
        if found is not None or isinstance(key, str):
            return found
        fields = {"loss": self.loss, "logits": self.logits, **dict(self.items())}
        return tuple(value for value in fields.values() if value is not None)[key]

    def get(self, key: str, default: Any = None) -> Any:
        """Give a field by name, or the default where there is none."""
        found = self.logits if key == "logits" else None
        return super().get(key, default) if found is None else found


def _get_logits(self: LossOutput) -> torch.Tensor | None:
    state = vars(self)
    make: Callable[[], torch.Tensor] | None = state.get("_make_logits") or getattr(
        state.get("loss"), "_make_logits", None
    )
    if state.get("_logits") is None and make is not None:
        state["_logits"] = make()
    return state.get("_logits")


def _set_logits(self: LossOutput, value: torch.Tensor | None) -> None:
    vars(self)["_logits"] = value


# The base class is a dataclass with a field of this name; a property of the subclass goes before it.
LossOutput.logits = property(_get_logits, _set_logits)  # type: ignore[assignment]
