"""Measure a model on held-out rows: token-weighted perplexity and, for answers, exact match.

Perplexity is exp(total loss / number of labelled tokens) over all rows, so that long and short rows
weigh by their tokens. Exact match asks for the very text of the reference, white space at the ends
aside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from whet.data.formats import Example
from whet.data.pairs import with_good_answers
from whet.data.prepare import PreparedData, prepare
from whet.data.template import render_prompt
from whet.data.tokenize import Tokens, collate
from whet.errors import InputError
from whet.generate import Sampling, generate
from whet.model import CausalLM, Tokenizer
from whet.model.load import attach_engine, max_length
from whet.model.loss import summed_loss
from whet.sections import DataSection, EvalSection
from whet.trained import Loaded


@dataclass(frozen=True, slots=True)
class Scores:
    """What was measured of one model.

    Args:
        perplexity: exp of the mean loss over labelled tokens.
        loss: That mean loss, in nats.
        num_tokens: Labelled tokens it is the mean over.
        exact_match: Share of answers equal to the reference, or None when not asked for.
        num_answers: Answers compared.
    """

    perplexity: float
    loss: float
    num_tokens: int
    exact_match: float | None = None
    num_answers: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the scores for report.json."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Sample:
    """A held-out conversation, with what a model answered."""

    where: str
    question: str
    reference: str
    answer: str


def evaluate(
    model: CausalLM,
    tokenizer: Tokenizer,
    data: PreparedData,
    settings: EvalSection,
) -> tuple[Scores, list[Sample]]:
    """Measure one model on the held-out rows.

    Args:
        model: A causal language model; it is left in eval mode.
        tokenizer: Its tokenizer, with a chat template.
        data: The prepared data of the run.
        settings: The config's eval section.

    Returns:
        The scores, and the answers to the first rows (all of them with `exact_match`).
    """
    model.eval()
    most = settings.max_rows
    rows, examples = data.heldout[:most], data.heldout_examples[:most]
    loss, num_tokens = mean_loss(model, rows, settings.batch_size)
    asked = [example for example in examples if example.messages]
    if not settings.exact_match:
        asked = asked[: settings.samples]
    samples = answer(model, tokenizer, asked, settings) if asked else []
    exact = None
    if settings.exact_match and samples:
        exact = sum(s.answer.strip() == s.reference.strip() for s in samples) / len(samples)
    # exp overflows past 709 nats; such a model has no perplexity to speak of.
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return Scores(
        perplexity, loss, num_tokens, exact, len(samples) if exact is not None else 0
    ), samples


def mean_loss(model: CausalLM, rows: Sequence[Tokens], batch_size: int) -> tuple[float, int]:
    """Return the mean loss over all labelled tokens, and how many they are.

    Args:
        model: A causal language model in eval mode.
        rows: Tokenised rows.
        batch_size: Rows in one pass, right-padded.
    """
    import torch

    total, count = 0.0, 0
    ordered = sorted(rows, key=lambda tokens: len(tokens.input_ids))
    for start in range(0, len(ordered), batch_size):
        batch = collate(ordered[start : start + batch_size], pad_token_id=0)
        with torch.no_grad():  # a model that is spread keeps what it gathered, to train with it
            summed, num = summed_loss(model, {k: v.to(model.device) for k, v in batch.items()})
        total += summed.item()
        count += num
    return (total / count if count else math.nan), count


def answer(
    model: CausalLM,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    settings: EvalSection,
) -> list[Sample]:
    """Generate the last answer of each conversation, greedily.

    Args:
        model: A causal language model in eval mode.
        tokenizer: Its tokenizer, with a chat template.
        examples: Conversations that end with the reference answer.
        settings: The config's eval section.
    """
    references = [example.messages[-1]["content"] for example in examples]
    longest = max(len(tokenizer(r, add_special_tokens=False)["input_ids"]) for r in references)
    # Eight more tokens than the longest reference show that a model does not stop where it should.
    sampling = Sampling(max_new_tokens=settings.max_new_tokens or longest + 8)
    prompts = [render_prompt(tokenizer, example.messages[:-1]) for example in examples]
    completions = generate(model, tokenizer, prompts, sampling, settings.batch_size, engine=False)
    return [
        Sample(example.where, example.messages[-2]["content"] if len(example.messages) > 1 else "",
               reference, completion.text)
        for example, reference, completion in zip(examples, references, completions, strict=True)
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Comparison:
    """A base model beside the tuned one, on the same rows. A plain model has no `tuned`.

    Args:
        base: The base model's scores.
        tuned: The tuned model's.
        base_samples: The base model's answers.
        tuned_samples: The tuned model's, to the same rows.
        also: Both on a second set, which tells what training made the model forget.
    """

    base: Scores
    tuned: Scores | None
    base_samples: list[Sample]
    tuned_samples: list[Sample]
    also: Comparison | None = None


def compare(loaded: Loaded, file: str | None = None, also: str | None = None) -> Comparison:
    """Measure a run's base and tuned model, or one plain model.

    Args:
        loaded: The model.
        file: Rows to measure on; None takes the run's held-out rows.
        also: A second set, to measure forgetting: rows of what the base model was good at.

    Raises:
        InputError: There are no rows to measure on.
    """
    config = loaded.config
    section = config.data if file is None else _section_of(config.data, file)
    if section.heldout is None and not section.heldout_fraction:
        raise InputError("there are no held-out rows", fix="name a file with --data")
    sets = [(section, config.eval)]
    if also is not None:
        # It may be laid out in another way than what was learned.
        other = {"format": "auto", "columns": {}, "formatting": None}
        second = _section_of(config.data, also).model_copy(update=other)
        sets.append((second, config.eval.model_copy(update={"samples": 0})))
    prepared = [
        (with_good_answers(_prepared(loaded, section)), settings) for section, settings in sets
    ]

    def measure(model: CausalLM) -> list[tuple[Scores, list[Sample]]]:
        attach_engine(model, config)
        return [evaluate(model, loaded.tokenizer, data, settings) for data, settings in prepared]

    with loaded.base() as model:
        base = measure(model)
    tuned = measure(loaded.model) if loaded.run is not None else [(None, [])] * len(base)
    found = [
        Comparison(before, after, samples, tuned_samples)
        for (before, samples), (after, tuned_samples) in zip(base, tuned, strict=True)
    ]
    return found[0] if also is None else replace(found[0], also=found[1])


def _section_of(section: DataSection, file: str) -> DataSection:
    """Return a data section that measures on a file.

    The file stands in for the training file too, which is not read for an evaluation.
    """
    changes = {"train": file, "heldout": file, "heldout_fraction": 0.0, "max_rows": None}
    return section.model_copy(update=changes)


def _prepared(loaded: Loaded, section: DataSection) -> PreparedData:
    return prepare(section, loaded.tokenizer, max_length(loaded.config.model), "as trained")
