"""Faults of the data that stop a run before a model is loaded.

Most failed fine-tunes are data faults that nobody saw. Each gate has a name, a limit and a way out; a
person who knows better lets it pass by its name in `data.allow`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from whet.data.report import DataReport
from whet.errors import InputError

MOST_MASKED = 0.05
MOST_TRUNCATED = 0.20
# What the rows of a format hold, where it is not one answer each.
_KINDS = {
    "preference": "pairs of answers",
    "kto": "answers with a judgement",
    "text": "plain text",
    "tokens": "token ids",
}
_LEARNS = {
    "sft": ("one answer each", "plain text", "token ids"),
    "pretrain": ("plain text", "token ids"),
    "grpo": ("one answer each",),
    "kto": ("answers with a judgement",),
    **dict.fromkeys(("dpo", "orpo", "reward"), ("pairs of answers",)),
}
_METHOD_OF = {
    "pairs of answers": "dpo",
    "answers with a judgement": "kto",
    "plain text": "pretrain",
    "token ids": "sft",
    "one answer each": "sft",
}
_WAYS_OUT = {
    "pairs of answers": "set method: dpo, or map the good answer's column, such as data.format: prompt "
    "with data.columns: {completion: chosen}",
    "answers with a judgement": "set method: kto, or give rows with one answer each",
}


def check_gates(report: DataReport, allow: Collection[str] = ()) -> None:
    """Stop when the data has a fault that the config does not allow.

    Args:
        report: The supervision report.
        allow: Names of the faults that may pass.

    Raises:
        InputError: There is one; all are told, each with what to set.
    """
    found = [sentence for name, sentence in faults(report) if name not in allow]
    if len(found) == 1:
        raise InputError(found[0])
    if found:
        raise InputError.listing("the run does not start, because of its data:", found)


def faults(report: DataReport) -> Iterator[tuple[str, str]]:
    """Yield the name of each fault with a sentence: what is wrong, by how much, what to set."""
    train, limit = report.train, f"model.max_length {report.max_length}"
    rows = train.examples + train.rows_masked
    if not train.tokens_learned:
        yield "nothing_learned", _nothing(report)
        return  # the others follow from it
    if train.rows_masked > MOST_MASKED * rows:
        why = f" ({limit} cuts their answers off)" if train.rows_truncated else ""
        yield (
            "masked",
            f"{train.rows_masked} of {rows} training rows have no learned token left{why}, "
            f"{train.masked[0]} for one; raise model.max_length, shorten the prompts, or set "
            "data.allow: [masked]",
        )
    if train.rows_truncated > MOST_TRUNCATED * rows:
        yield (
            "truncated",
            f"{train.rows_truncated} of {rows} training rows are longer than {limit} and would be cut, "
            f"with {train.tokens_lost} learned tokens; raise model.max_length, or set "
            "data.allow: [truncated]",
        )
    if train.rows_conversation and train.rows_without_end >= train.rows_conversation:
        yield (
            "no_end_of_turn",
            "no answer ends with a learned end-of-turn token, so the model would not learn to stop; set "
            "model.chat_template to one whose end-of-turn this tokenizer has, or data.allow: "
            "[no_end_of_turn]",
        )
    if report.overlap:
        held = report.heldout.examples if report.heldout else 0
        yield (
            "overlap",
            f"{report.overlap} of {held} held-out rows are training rows too, so the held-out loss would "
            "say nothing; take them out, use data.heldout_fraction, or set data.allow: [overlap]",
        )


def _nothing(report: DataReport) -> str:
    train = report.train
    if train.rows_truncated:
        return (
            f"no token would be learned: {train.rows_truncated} of {train.rows_read} rows are longer "
            f"than model.max_length {report.max_length}, and all their answers lie beyond it; raise "
            "model.max_length, or shorten the prompts"
        )
    reasons = "; ".join(train.notes[:3] + train.refused[:3])
    return (
        f"no token would be learned from {train.rows_read} rows"
        + (f": {reasons}" if reasons else "")
        + "; give rows with answers"
    )


def require_method(method: str, report: DataReport) -> None:
    """Stop when the rows are not of a kind that the method learns from.

    Args:
        method: The config's method.
        report: The supervision report.

    Raises:
        InputError: A file holds another kind of rows.
    """
    wanted = _LEARNS[method]
    for name in report.train.formats:
        kind = _KINDS.get(name, "one answer each")
        if name.startswith("function ") and method in ("sft", "pretrain", "grpo"):
            continue  # what a function of the user's makes is a text or a conversation
        if kind not in wanted:
            raise InputError(
                f"format '{name}' holds {kind}, which method '{method}' does not learn from",
                fix=_WAYS_OUT[kind]
                if method == "sft"
                else f"give rows with {wanted[0]}, or set method: {_METHOD_OF[kind]}",
            )
