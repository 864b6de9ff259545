"""Passes of a model that differs from the one in shapes: deeper, or cut by tensor parallel."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from whet.plan.memory import PassModel
from whet.plan.pieces import Piece, Pieces
from whet.plan.speed import Work
from whet.plan.trace import PassTrace


class DeepPasses(PassModel):
    """Passes of a model with more layers like the last one, or with fewer.

    Args:
        like: Passes of the model that is there.
        num_layers: Of the other.
    """

    def __init__(self, like: PassModel, num_layers: int) -> None:
        vars(self).update(vars(like))
        self.like, self.num_layers = like, num_layers

    def trace(self, num_tokens: int, longest: int, lean: bool) -> PassTrace:
        """Trace a pass of the model that is there, and repeat its last layer."""
        found = self.like.trace(num_tokens, longest, lean)
        more = (found.layers[-1],) * (self.num_layers - len(found.layers))
        return replace(found, layers=(*found.layers[: self.num_layers], *more))

    def head_bytes(self, num_tokens: int) -> int:
        """Return what the loss needs, which does not depend on the depth."""
        return self.like.head_bytes(num_tokens)


class TensorPasses(PassModel):
    """Passes of which several processes compute each matrix together, with transformers' own layers.

    A guess: what the layers' own code saves is the inputs and outputs of every matrix. Between the
    matrices of a half everything is cut; what goes into and comes out of it is whole in each process, and
    so are the logits, which transformers gathers.

    Args:
        like: Passes of the whole model.
        pieces: Its parameters.
        tensor: Processes that compute together.
    """

    def __init__(self, like: PassModel, pieces: Pieces, tensor: int) -> None:
        vars(self).update(vars(like))
        self.pieces, self.tensor = pieces, tensor
        self.num_layers = pieces.num_layers

    def trace(self, num_tokens: int, longest: int, lean: bool) -> PassTrace:
        """Guess what a pass saves in one process."""
        one = num_tokens * self.pieces.size
        width = self.pieces.width
        layers: list[dict[str, int]] = []
        for layer, count in self.pieces.layers:
            sides = sum(self._sides(piece) for piece in layer if len(piece.shape) == 2)
            saved = {"hidden": one * width, "gate_up": one * (sides + 4 * width)}
            layers += [{**dict.fromkeys(("qkv", "attention", "other"), 0), **saved}] * count
        largest = max(layer["gate_up"] for layer in layers)
        return PassTrace(tuple(layers), 2 * one * width, 0, largest)

    def _sides(self, piece: Piece) -> int:
        """Return the numbers of a token that go into a matrix and come out of it."""
        return sum(piece.within(self.tensor).shape)

    def head_bytes(self, num_tokens: int) -> int:
        """Return what the loss needs: whole logits of labelled rows, also in float32 with a gradient."""
        rows = max(1, round(num_tokens * self.label_share))
        return rows * self.pieces.vocabulary * (self.pieces.size + 8)


def deeper_work(work: Work, num_layers: int) -> Work:
    """Return the operations of a model with more layers like the last one, or with fewer."""
    found = copy.copy(work)
    values: dict[str, Any] = vars(found)
    values.pop("per_token", None)
    values.pop("_again", None)
    more = [work.blocks[-1]] * (num_layers - len(work.blocks))
    found.blocks = [*work.blocks[:num_layers], *more]
    return found
