"""Find the first value that is no number, forward or backward (`engine.debug`)."""

from __future__ import annotations

from functools import partial

import torch

from whet.errors import WhetError


def check_finite(where: str, value: torch.Tensor) -> None:
    """Raise where the first value that is no number appears, forward or backward (`engine.debug`).

    Args:
        where: What made the value.
        value: Any tensor; its gradient is checked when it comes.

    Raises:
        WhetError: It is not finite.
    """
    if not torch.isfinite(value).all():
        raise WhetError(
            f"{where} gave a value that is not finite, from finite input",
            fix="look at this batch and at the learning rate; float16 overflows past 65,504",
        )
    if value.requires_grad:
        value.register_hook(partial(_check_gradient, where))


def _check_gradient(where: str, gradient: torch.Tensor) -> None:
    if not torch.isfinite(gradient).all():
        raise WhetError(f"the gradient of what {where} gave is not finite")
