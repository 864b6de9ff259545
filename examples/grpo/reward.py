"""Rewards of the GRPO examples: is the answer in its tags, and is it right?

A reward function is called with lists, each by its name: prompts, completions, the columns of the data
(such as answer), and more. It returns a number for each completion. A completion is a text, or where the
prompts are conversations, a list with the assistant's message.
"""

import re
from typing import Any

TAGGED = re.compile(r"<answer>\s*(-?\d+)\s*</answer>")


def text_of(completion: Any) -> str:
    """Return what was answered."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def format_reward(completions: list[Any], **_: Any) -> list[float]:
    """Give 0.5 for an answer that is one number in its tags and nothing else."""
    return [0.5 if TAGGED.fullmatch(text_of(c).strip()) else 0.0 for c in completions]


def arithmetic_reward(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """Give 1 for the right number in its tags."""
    found = [TAGGED.search(text_of(c)) for c in completions]
    return [float(f is not None and f[1] == right) for f, right in zip(found, answer, strict=True)]


def short_sum_reward(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """Give 1 where the last number that is said is right, and up to 0.5 for saying little else."""
    rewards = []
    for completion, right in zip(completions, answer, strict=True):
        text = text_of(completion).strip()
        numbers = re.findall(r"\d+", text)
        correct = float(bool(numbers) and numbers[-1] == right)
        others = max(0, len(text.split()) - 1)
        rewards.append(correct + (0.5 / (1 + others) if numbers else 0.0))
    return rewards
