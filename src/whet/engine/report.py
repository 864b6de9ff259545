"""What became of each part of a model when the engine went in: fused, or kept as it was and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class PartReport:
    """What became of one part.

    Args:
        layer: Number of the layer, or None for parts that are there once.
        part: attention, mlp, norm, head or unpadding.
        fused: Whether the engine computes it.
        reason: Why not.
    """

    layer: int | None
    part: str
    fused: bool
    reason: str = ""

    @property
    def failed(self) -> bool:
        """Whether the engine could compute the part, but with other numbers than the original."""
        return not self.fused and "differs from" in self.reason


@dataclass(frozen=True, slots=True)
class SwapReport:
    """What the engine took over in one model."""

    parts: list[PartReport] = field(default_factory=list)

    @property
    def layers_total(self) -> int:
        """Decoder layers."""
        return len({part.layer for part in self.parts if part.layer is not None})

    @property
    def layers_fused(self) -> int:
        """Decoder layers of which both halves are fused."""
        kept = {part.layer for part in self.parts if not part.fused}
        return len({p.layer for p in self.parts if p.layer is not None and p.layer not in kept})

    @property
    def kept(self) -> dict[str, list[int]]:
        """Reasons for which parts keep their own code, with the layers (none for single parts)."""
        reasons: dict[str, list[int]] = {}
        for part in self.parts:
            if not part.fused:
                where = reasons.setdefault(f"{part.part}: {part.reason}", [])
                if part.layer is not None:
                    where.append(part.layer)
        return reasons

    def lines(self) -> list[str]:
        """Say it in words: one line for what is fused, and one for each reason."""
        single = [p.part for p in self.parts if p.layer is None and p.fused]
        also = f", and {', '.join(single)}" if single else ""
        lines = [f"engine: {self.layers_fused} of {self.layers_total} layers fused{also}"]
        for reason, where in self.kept.items():
            lines.append(f"not fused, {reason}" + (f" ({ranges(where)})" if where else ""))
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return what report.json holds."""
        return {
            "layers_total": self.layers_total,
            "layers_fused": self.layers_fused,
            "kept": self.kept,
            "parts": [asdict(part) for part in self.parts],
        }


def ranges(numbers: list[int]) -> str:
    """Write [0, 1, 2, 5] as 'layers 0-2, 5'.

    Args:
        numbers: Numbers of layers, in any order.
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = [f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs]
    return ("layers " if len(numbers) > 1 else "layer ") + ", ".join(words)
