"""Chat templates and the labels of answers, under the names of the drop-in API.

`get_chat_template` sets one of whet's templates; `train_on_responses_only` finds the parts of a
conversation in rows that are tokenised already. It looks for them in the bytes that the tokens spell,
not in token ids: a tokenizer may merge the end of a part with what follows, or spell a part in another
way behind a line break, and both change the ids but never the bytes.
"""

from __future__ import annotations

import json
import logging
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from whet.data.spans import end_of_turn
from whet.data.template import set_chat_template, unknown_specials
from whet.data.tokenize import IGNORED
from whet.errors import InputError
from whet.model import Tokenizer

logger = logging.getLogger(__name__)

_PLAIN = {"role": "role", "content": "content", "user": "user", "assistant": "assistant"}
_SHOWN = 200  # characters of a row in an error


def get_chat_template(
    tokenizer: Tokenizer,
    chat_template: str | tuple[str, str] = "chatml",
    mapping: Mapping[str, str] | None = None,
    map_eos_token: bool = True,
    system_message: str | None = None,
) -> Tokenizer:
    """Give a tokenizer a chat template, in place.

    Args:
        tokenizer: A model's tokenizer.
        chat_template: A name (chatml, llama-3, mistral, gemma, phi-4, qwen, alpaca, zephyr), a file with
            a Jinja template, a template itself, or a template with the token that ends its turns.
        mapping: What your messages call `role` and `content`, and the roles `user`, `assistant` and
            `system`; ShareGPT's is {"role": "from", "content": "value", "user": "human",
            "assistant": "gpt"}. Messages under the plain names are taken too.
        map_eos_token: Let the template's end of turn be the tokenizer's end of text.
        system_message: Put before every conversation that has no system turn.

    Returns:
        The same tokenizer.

    Raises:
        InputError: There is no such template, or the mapping has a key that is not known.
    """
    template, end = chat_template if isinstance(chat_template, tuple) else (chat_template, None)
    if "{{" in template or "{%" in template:
        tokenizer.chat_template = template
    else:
        logger.info("chat template: %s", set_chat_template(tokenizer, template))
    end = end or end_of_turn(tokenizer)
    if map_eos_token and end and end != tokenizer.eos_token:
        ids = tokenizer.encode(end, add_special_tokens=False)
        if len(ids) == 1 and not unknown_specials(tokenizer, end):
            tokenizer.eos_token = end
            logger.info("the end of text is %s, which ends a turn of the template", end)
    tokenizer.chat_template = _front(mapping, system_message) + str(tokenizer.chat_template)
    return tokenizer


def _front(mapping: Mapping[str, str] | None, system_message: str | None) -> str:
    """Return Jinja that renames the messages' keys and roles, and adds a system turn."""
    front = ""
    names = {**_PLAIN, "system": "system", **(mapping or {})}
    strange = sorted(set(names) - {*_PLAIN, "system"})
    if strange:
        raise InputError(
            "mapping has keys that get_chat_template does not know", ", ".join(strange),
            "use role, content, user, assistant and system",
        )  # fmt: skip
    if any(key != value for key, value in names.items()):
        role, content = json.dumps(names["role"]), json.dumps(names["content"])
        roles = {names[key]: key for key in ("user", "assistant", "system")}
        front += (
            "{%- set renamed = namespace(turns=[]) %}{%- for turn in messages %}"
            f"{{%- if {role} in turn and {content} in turn %}}"
            f"{{%- set name = {json.dumps(roles)}.get(turn[{role}], turn[{role}]) %}}"
            "{%- set renamed.turns = renamed.turns + "
            f"[{{'role': name, 'content': turn[{content}]}}] %}}"
            "{%- else %}{%- set renamed.turns = renamed.turns + [turn] %}{%- endif %}"
            "{%- endfor %}{%- set messages = renamed.turns %}"
        )
    if system_message is not None:
        text = json.dumps(system_message, ensure_ascii=False)
        front += (
            "{%- if not messages or messages[0]['role'] != 'system' %}"
            f"{{%- set messages = [{{'role': 'system', 'content': {text}}}] + messages %}}"
            "{%- endif %}"
        )
    return front


def train_on_responses_only(
    trainer: Any,
    instruction_part: str | None = None,
    response_part: str | None = None,
    force_match: bool = True,
    tokenizer: Tokenizer | None = None,
    return_function: bool = False,
    num_proc: int | None = None,
) -> Any:
    r"""Have only the answers learned: what follows a `response_part`, up to the next `instruction_part`.

    Args:
        trainer: An SFTTrainer, whose datasets are tokenised.
        instruction_part: Text in front of what the user says, such as `<|im_start|>user\n`; None
            learns all from the first answer on.
        response_part: Text in front of an answer, such as `<|im_start|>assistant\n`.
        force_match: False lets a part be found without the white space around it.
        tokenizer: The rows' tokenizer; None takes the trainer's.
        return_function: Return the function that makes labels of a batch of rows, and change nothing.
        num_proc: Processes; None is one.

    Returns:
        The trainer, with other labels in its datasets. Rows without an answer are left out, and counted.

    Raises:
        InputError: No row has the part, or the datasets have no token ids.
    """
    if not response_part:
        raise InputError(
            "train_on_responses_only needs the text in front of an answer",
            fix="give response_part, such as '<|im_start|>assistant\\n'",
        )
    tokenizer = tokenizer or getattr(trainer, "processing_class", None)
    if tokenizer is None:
        raise InputError("train_on_responses_only needs the rows' tokenizer", fix="give tokenizer")
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    parts = [instruction_part or "", response_part]
    if not force_match:
        parts = [part.strip() or part for part in parts]
    relabel = Relabel(Spelling.of(tokenizer), *(part.encode() for part in parts))
    if return_function:
        return relabel
    for name in ("train_dataset", "eval_dataset"):
        rows = getattr(trainer, name, None)
        if isinstance(rows, dict):
            found: Any = {k: _relabelled(v, relabel, k, num_proc) for k, v in rows.items()}
        elif rows is not None:
            found = _relabelled(rows, relabel, name, num_proc)
        else:
            continue
        setattr(trainer, name, found)
    return trainer


def _relabelled(rows: Any, relabel: Relabel, name: str, num_proc: int | None) -> Any:
    """Return a dataset with labels on answers only."""
    columns = rows.column_names or list(next(iter(rows)))
    if "input_ids" not in columns:
        raise InputError(
            f"{name} has no token ids (input_ids), so that answers cannot be found in it",
            ", ".join(columns), "call train_on_responses_only on an SFTTrainer",
        )  # fmt: skip
    first = next(iter(rows))
    if not hasattr(rows, "select"):  # a stream: its rows are seen when they are trained on
        return rows.map(relabel, batched=True)
    made = rows.map(relabel, batched=True, num_proc=num_proc, desc="Labelling answers")
    learned = made.filter(_is_learned, batched=True, num_proc=num_proc, desc="Counting answers")
    if not len(learned):
        raise InputError(
            f"{name}: no row has an answer behind {relabel.response.decode()!r}",
            repr(relabel.spelling.text(first["input_ids"])[:_SHOWN]),
            "give response_part as the rows have it",
        )  # fmt: skip
    if lost := len(made) - len(learned):
        logger.warning(
            "%s: %d of %d rows have no answer behind %r and are left out",
            name, lost, len(made), relabel.response.decode(),
        )  # fmt: skip
    return learned


def _is_learned(batch: Mapping[str, list[Any]]) -> list[bool]:
    return [any(label != IGNORED for label in labels) for labels in batch["labels"]]


@dataclass
class Spelling:
    """The bytes each token of a tokenizer stands for, in the middle of a text.

    Args:
        tokenizer: A fast tokenizer.
        is_byte_level: Whether a token's characters stand for bytes (GPT-2's alphabet); else blanks are
            written as U+2581 and bytes as <0x0A>, as sentencepiece does.
        known: Those asked for before.
    """

    tokenizer: Tokenizer
    is_byte_level: bool
    known: dict[int, bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Spelling:
        """Find out how a tokenizer writes its tokens."""
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        return cls(tokenizer, "ByteLevel" in repr(decoder))

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes of one token."""
        if token_id not in self.known:
            self.known[token_id] = self._spell(token_id)
        return self.known[token_id]

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of some tokens."""
        return b"".join(map(self.bytes_of, ids)).decode("utf-8", "replace")

    def _spell(self, token_id: int) -> bytes:
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            return b""
        if token_id in self.tokenizer.added_tokens_decoder:
            return token.encode()
        if self.is_byte_level:
            try:
                return bytes(_BYTE_OF[character] for character in token)
            except KeyError:  # a token that is plain text, as some vocabularies mix in
                return token.encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each character of GPT-2's alphabet: itself where it can be seen."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {
        **{chr(byte): byte for byte in seen},
        **{chr(256 + number): byte for number, byte in enumerate(unseen)},
    }


_BYTE_OF = _byte_alphabet()


@dataclass(frozen=True)
class Relabel:
    """Makes labels of a batch of tokenised rows, as `Dataset.map(batched=True)` calls it.

    Args:
        spelling: The tokens' bytes.
        instruction: Bytes in front of what the user says; empty for none.
        response: Bytes in front of an answer.
    """

    spelling: Spelling
    instruction: bytes
    response: bytes

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[list[int]]]:
        """Return the labels of rows; a token that was not learned before stays so."""
        rows = batch["input_ids"]
        old = batch.get("labels", rows)
        lengths = batch.get("seq_lengths") or [[len(ids)] for ids in rows]
        return {"labels": [self._row(*row) for row in zip(rows, old, lengths, strict=True)]}

    def _row(self, ids: Sequence[int], old: Sequence[int], lengths: Sequence[int]) -> list[int]:
        labels, start = [IGNORED] * len(ids), 0
        for length in lengths:  # the documents of a packed row
            for first, last in self.answers(ids[start : start + length]):
                labels[start + first : start + last] = old[start + first : start + last]
            start += length
        return labels

    def answers(self, ids: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Yield where answers begin and end, in tokens.

        A token that holds the end of a part and the beginning of an answer is learned; one that holds
        the end of an answer and the beginning of the next part is not.
        """
        ends, text = [0], bytearray()
        for token_id in ids:
            text += self.spelling.bytes_of(token_id)
            ends.append(len(text))
        place = 0
        while (found := text.find(self.response, place)) >= 0:
            begin = found + len(self.response)
            stop = text.find(self.instruction, begin) if self.instruction else -1
            place = stop = len(text) if stop < 0 else stop
            # From the first token that ends behind the part to the last one that ends before the next.
            yield bisect_right(ends, begin) - 1, bisect_right(ends, stop) - 1
