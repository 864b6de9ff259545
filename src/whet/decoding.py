"""The loop that all generation runs in: answers join a batch and leave it between two steps.

The batch is decoded by the engine where it can (`whet.engine.decoder`), else by the model's own forward
with a cache of transformers. What is chosen for one answer depends on its own logits, seed and settings;
those logits depend on the rest of the batch only by rounding, since products of more rows may be summed
in another order.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from whet.answer import Answer, Request, score_prompt
from whet.model import CausalLM, Tokenizer

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class TokenDecoder(Protocol):
    """What makes the logits of a batch of sequences."""

    def start(self, prompts: Sequence[list[int]], every: bool = False) -> list[torch.Tensor]:
        """Read prompts, which become the last rows; logits (1 or all its tokens, V) of each."""
        ...

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Add one token to every row; logits (B, V)."""
        ...

    def drop(self, rows: list[int]) -> list[int]:
        """Forget some rows; for each that is left, which one it was before."""
        ...


def make_decoder(model: CausalLM, tokenizer: Tokenizer, engine: bool = True) -> TokenDecoder:
    """Return what decodes a model: the engine where it is proven to, else transformers' code.

    Args:
        model: A causal language model in eval mode.
        tokenizer: Its tokenizer.
        engine: Whether to try the engine, which takes a check and may take a copy of the weights.
    """
    if engine:
        from whet.engine.decoder import Decoder
        from whet.engine.ready import make_ready

        ready = make_ready(model)
        if not isinstance(ready, str):
            return Decoder(ready)
        logger.warning("decoding with transformers' own code: %s", ready)
    return OriginalDecoder(model, tokenizer.pad_token_id or 0)


@dataclass
class _Group:
    """Prompts that were read together, padded on the left, with their cache."""

    mask_BL: torch.Tensor
    cache: Any


@dataclass
class OriginalDecoder:
    """Decodes with the model's own forward and cache, whatever they are.

    Args:
        model: A causal language model in eval mode.
        pad: Token that fills up shorter prompts; masked.
    """

    model: CausalLM
    pad: int
    groups: list[_Group] = field(default_factory=list)

    def start(self, prompts: Sequence[list[int]], every: bool = False) -> list[torch.Tensor]:
        """Read prompts, padded on the left; see TokenDecoder."""
        import torch

        longest, device = max(map(len, prompts)), self.model.device
        ids_BL = torch.tensor(
            [[self.pad] * (longest - len(ids)) + ids for ids in prompts], device=device
        )
        mask_BL = torch.tensor(
            [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=device
        )
        positions_BL = (mask_BL.cumsum(-1) - 1).clamp(min=0)
        output = self._call(ids_BL, mask_BL, positions_BL, None, every)
        self.groups.append(_Group(mask_BL, output.past_key_values))
        if not every:
            return list(output.logits[:, -1:])
        return [row[-len(ids) :] for row, ids in zip(output.logits, prompts, strict=True)]

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Add one token to every row; see TokenDecoder."""
        import torch

        found, start = [], 0
        for group in self.groups:
            num = len(group.mask_BL)
            ids_B = torch.tensor(list(tokens[start : start + num]), device=self.model.device)
            start += num
            group.mask_BL = torch.cat((group.mask_BL, group.mask_BL.new_ones(num, 1)), -1)
            positions_BL = group.mask_BL.sum(-1, keepdim=True) - 1
            output = self._call(ids_B[:, None], group.mask_BL, positions_BL, group.cache, False)
            found.append(output.logits[:, -1])
        return torch.cat(found)

    def drop(self, rows: list[int]) -> list[int]:
        """Forget some rows; see TokenDecoder."""
        import torch

        kept, start, gone = [], 0, set(rows)
        for group in list(self.groups):
            num = len(group.mask_BL)
            left = [row for row in range(num) if start + row not in gone]
            kept += [start + row for row in left]
            start += num
            if not left:
                self.groups.remove(group)
            elif len(left) < num:
                index = torch.tensor(left, device=self.model.device)
                with torch.no_grad():  # a spread model trains on with what it gathered here
                    group.cache.batch_select_indices(index)
                group.mask_BL = group.mask_BL[index]
        return kept

    def _call(self, ids: Any, mask: Any, positions: Any, cache: Any, every: bool) -> Any:
        import torch

        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        takes = inspect.signature(base.forward).parameters
        more = {"position_ids": positions, "logits_to_keep": 0 if every else 1}
        with torch.no_grad():
            return self.model(
                input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True,
                **{name: value for name, value in more.items() if name in takes},
            )  # fmt: skip


class Batch:
    """Answers that are generated together.

    Args:
        decoder: Makes the logits.
        tokenizer: Turns tokens into text.
        ends: Tokens that end a turn.
    """

    def __init__(self, decoder: TokenDecoder, tokenizer: Tokenizer, ends: Sequence[int]) -> None:
        self.decoder, self.tokenizer, self.ends = decoder, tokenizer, frozenset(ends)
        self.answers: list[Answer] = []

    def add(self, requests: Sequence[Request]) -> list[Answer]:
        """Read prompts and take the first token of each answer.

        Args:
            requests: At least one.

        Returns:
            Their answers, of which some may be finished already.
        """
        every = any(request.echo for request in requests)
        logits = self.decoder.start([request.prompt for request in requests], every)
        fresh = [Answer(request, self.tokenizer, self.ends) for request in requests]
        self.answers += fresh
        for answer, logits_TV in zip(fresh, logits, strict=True):
            request = answer.request
            if request.echo and request.logprobs is not None:
                answer.prompt_logprobs = score_prompt(
                    logits_TV, request.prompt, self.tokenizer, request.logprobs
                )
            answer.take(logits_TV[-1])
        self._drop([answer for answer in fresh if answer.finish])
        return fresh

    def step(self) -> list[Answer]:
        """Take one token for every answer that is not finished.

        Returns:
            Those answers.
        """
        at_work = list(self.answers)
        if not at_work:
            return []
        logits_BV = self.decoder.step([answer.tokens[-1] for answer in at_work])
        greedy = logits_BV.argmax(-1).tolist()
        for answer, logits_V, token in zip(at_work, logits_BV, greedy, strict=True):
            answer.take(logits_V, token)
        self._drop([answer for answer in at_work if answer.finish])
        return at_work

    def cancel(self, answer: Answer) -> None:
        """Stop an answer that nobody waits for, and free its place."""
        if answer in self.answers:
            self._drop([answer])

    def _drop(self, gone: Sequence[Answer]) -> None:
        if not gone:
            return
        rows = [self.answers.index(answer) for answer in gone]
        self.answers = [self.answers[row] for row in self.decoder.drop(rows)]
