"""Load an export again, with the program that will use it, and compare it with the live model.

The bounds are triangulated: the truth is the run's model in float32 with the adapter beside the
weights; a file of a narrower float type may differ from it by twice what the live model itself differs
when it is cast to that type. Files in few bits are held to a limit on how far they move the
model's predictions; the limits are there to catch a broken file, not to praise a small one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from whet.export.live import Live

if TYPE_CHECKING:
    import numpy as np

# Mean KL divergence (nats a token) from the same model in 16 bit, and growth of the perplexity. By the
# type's bits: well above what SmolLM2-135M moves (docs/export.md), whose small matrices suffer most.
LIMITS = {
    8: (0.03, 0.05),
    6: (0.06, 0.1),
    5: (0.15, 0.2),
    4: (0.4, 0.4),
    3: (1.0, 1.0),
    2: (6.0, 100.0),
}
_FLOATS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


class Program(Protocol):
    """A program that has loaded an export."""

    @property
    def template(self) -> str | None:
        """The chat template it has."""
        ...

    def tokenize_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Return texts' token ids, none added."""
        ...

    def logits(self, rows: Sequence[Sequence[int]]) -> list[np.ndarray[Any, Any]]:
        """Return the logits of every position of each row."""
        ...

    def answer(self, ids: Sequence[int], num_tokens: int) -> list[int]:
        """Return the greedy continuation, without the token that ended it."""
        ...

    def ends_generation(self, token: int) -> bool:
        """Tell whether it stops at a token."""
        ...


@dataclass(frozen=True, slots=True)
class Finding:
    """One comparison.

    Args:
        name: What was compared.
        measured: What came out.
        allowed: What may.
        passed: Whether it does; None for what is only shown.
        cause: Of a failure, in words.
    """

    name: str
    measured: str
    allowed: str
    passed: bool | None
    cause: str = ""


@dataclass
class Gate:
    """Everything compared for one export.

    Args:
        file: What was checked.
        kind: Its type, such as `bf16` or `q4_k_m`.
        findings: The comparisons.
        answers: Greedy answers side by side: prompt, live, exported.
        scores: Numbers: max_error, bound, kl, perplexity, reference_perplexity.
    """

    file: str
    kind: str
    findings: list[Finding] = field(default_factory=list)
    answers: list[dict[str, str]] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether the export is the live model, within what its type loses."""
        return all(finding.passed is not False for finding in self.findings)

    @property
    def causes(self) -> list[str]:
        """What failed, in words."""
        return [f"{f.name}: {f.cause}" for f in self.findings if f.passed is False]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON writes it."""
        return {**asdict(self), "passed": self.passed}


def check(
    live: Live,
    program: Program,
    file: str,
    kind: str,
    reference: list[np.ndarray[Any, Any]] | None = None,
    half_precision_activations: bool = False,
    stops: bool = True,
    templates: bool = True,
) -> tuple[Gate, list[np.ndarray[Any, Any]]]:
    """Compare an export with the live model.

    Args:
        live: The live model's side.
        program: What loaded the export.
        file: Its name, for the table.
        kind: Its type: f32, f16, bf16, a GGUF type, or nf4.
        reference: Logits of the same file in 16 bit, which a file in few bits is compared with; the
            live model's when None.
        half_precision_activations: The program's activation function is exact to float16 only.
        stops: Whether the export says where to stop; an adapter does not.
        templates: Whether it has a chat template; llama2.c has none.

    Returns:
        What was found, and the export's logits.
    """
    gate = Gate(file, kind)
    gate.findings.append(_compare_tokens(live, program))
    if templates:
        gate.findings.append(_compare_renders(live, program))
    if stops:
        gate.findings.append(_compare_ends(live, program))
    logits = program.logits(live.rows)
    if kind in _FLOATS:
        bound_type = "float16" if half_precision_activations and kind == "f32" else _FLOATS[kind]
        gate.findings.append(_compare_logits(live, logits, bound_type, gate.scores))
    gate.findings += _compare_predictions(live, logits, kind, reference or live.logits, gate.scores)
    gate.findings.append(_compare_answers(live, program, gate))
    return gate, logits


def _compare_tokens(live: Live, program: Program) -> Finding:
    found = program.tokenize_all(live.strings)
    wrong = [
        text
        for text, own, ids in zip(live.strings, live.string_ids, found, strict=True)
        if own != ids
    ]
    count = len(live.strings)
    return Finding(
        "tokens", f"{count - len(wrong)} of {count} strings equal", "all", not wrong,
        f"{len(wrong)} strings become other tokens, such as {wrong[0]!r}" if wrong else "",
    )  # fmt: skip


def _compare_renders(live: Live, program: Program) -> Finding:
    if not live.renders:
        return Finding("chat template", "no conversations in the data", "", None)
    if program.template is None:
        return Finding("chat template", "missing", "equal", False, "the file has no chat template")
    again = live.render_with(program.template)
    wrong = sum(one != two for one, two in zip(live.renders, again, strict=True))
    return Finding(
        "chat template", f"{len(again) - wrong} of {len(again)} conversations equal", "all", not wrong,
        "the exported template renders conversations otherwise" if wrong else "",
    )  # fmt: skip


def _compare_ends(live: Live, program: Program) -> Finding:
    missed = [token for token in live.ends if not program.ends_generation(token)]
    words = ", ".join(repr(live.tokenizer.decode([token])) for token in missed)
    return Finding(
        "end of turn", f"stops at {len(live.ends) - len(missed)} of {len(live.ends)} tokens", "all",
        not missed, f"generation goes on after {words}" if missed else "",
    )  # fmt: skip


def _compare_logits(
    live: Live, logits: list[np.ndarray[Any, Any]], dtype: str, scores: dict[str, float]
) -> Finding:
    import numpy as np

    def worst(ones: Sequence[Any], twos: Sequence[Any]) -> float:
        # A NaN must not be lost in a maximum.
        return float(np.max([np.abs(a - b).max() for a, b in zip(ones, twos, strict=True)]))

    if any(a.shape != b.shape for a, b in zip(live.logits, logits, strict=True)):
        return Finding(
            "logits", "another vocabulary", "equal", False, "the number of logits differs"
        )
    # Float32 sums in another order: 1e-5 of the logits' own size (SmolLM2-135M: 1.3e-6 of it).
    size = float(np.max([np.abs(row).max() for row in live.logits]))
    bound = 2 * worst(live.rounded(dtype), live.logits) + 1e-5 * size
    error = worst(logits, live.logits)
    scores["max_error"], scores["bound"] = error, bound
    return Finding(
        "logits", f"differ by {error:.2e}", f"{bound:.2e}", error <= bound,
        "the weights are not those that were trained" if not error <= bound else "",
    )  # fmt: skip


def _compare_predictions(
    live: Live,
    logits: list[np.ndarray[Any, Any]],
    kind: str,
    reference: list[np.ndarray[Any, Any]],
    scores: dict[str, float],
) -> list[Finding]:
    """Compare perplexities and the mean KL divergence."""
    divergence = mean_divergence(reference, logits)
    before, after = perplexity(reference, live.rows), perplexity(logits, live.rows)
    scores.update(kl=divergence, perplexity=after, reference_perplexity=before)
    if kind in _FLOATS:
        shown = f"{after:.4g} (live {before:.4g})"
        return [
            Finding("perplexity", shown, "", None),
            Finding("KL", f"{divergence:.2e}", "", None),
        ]
    most_kl, growth = LIMITS[num_bits(kind)]
    allowed = before * (1 + growth)
    return [
        Finding(
            "perplexity", f"{after:.4g} (16 bit: {before:.4g})", f"{allowed:.4g}", after <= allowed,
            "" if after <= allowed else f"{kind} should cost at most {growth:.0%} of perplexity",
        ),
        Finding(
            "KL", f"{divergence:.2e} nats", f"{most_kl:g}", divergence <= most_kl,
            "" if divergence <= most_kl else f"{kind} should not move the predictions so far",
        ),
    ]  # fmt: skip


def num_bits(kind: str) -> int:
    """Return how many bits a quantised type has: 4 for q4_k_m and nf4."""
    bits = int(next(letter for letter in kind if letter.isdigit() and letter != "0"))
    return {1: 2}.get(bits, bits)


def _compare_answers(live: Live, program: Program, gate: Gate) -> Finding:
    equal = 0
    for prompt, ids, own in live.answers:
        found = program.answer(ids, live.answer_tokens)
        equal += found == own
        texts = [live.tokenizer.decode(tokens) for tokens in (own, found)]
        gate.answers.append({"prompt": prompt, "live": texts[0], "exported": texts[1]})
    return Finding("greedy answers", f"{equal} of {len(live.answers)} equal", "", None)


def _log_softmax(row: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    import numpy as np

    row = row.astype(np.float64)
    row = row - row.max(-1, keepdims=True)
    return row - np.log(np.exp(row).sum(-1, keepdims=True))


def mean_divergence(
    ones: Sequence[np.ndarray[Any, Any]], twos: Sequence[np.ndarray[Any, Any]]
) -> float:
    """Return the mean KL divergence of the second predictions from the first, in nats a token."""
    import numpy as np

    total = count = 0.0
    for one, two in zip(ones, twos, strict=True):
        for a, b in zip(np.array_split(one, len(one)), np.array_split(two, len(two)), strict=True):
            log_a, log_b = _log_softmax(a), _log_softmax(b[:, : a.shape[1]])
            total += float((np.exp(log_a) * (log_a - log_b)).sum())
            count += 1
    return total / count


def perplexity(logits: Sequence[np.ndarray[Any, Any]], rows: Sequence[Sequence[int]]) -> float:
    """Return exp of the mean loss of each row's next tokens."""
    import numpy as np

    total = count = 0.0
    for values, ids in zip(logits, rows, strict=True):
        for place in range(len(ids) - 1):
            total -= float(_log_softmax(values[place : place + 1])[0, ids[place + 1]])
            count += 1
    return math.exp(min(total / max(count, 1), 700.0)) if not np.isnan(total) else math.nan
