"""The live model's side of an export's check: what its export has to give again."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from whet.data.formats import Example
from whet.data.prepare import examples_of
from whet.data.template import render, render_prompt
from whet.engine.projection import keep_4bit_weights
from whet.errors import InputError
from whet.export.strings import sample_strings
from whet.generate import end_token_ids
from whet.model import Tokenizer
from whet.model.load import device, load_model
from whet.runs import RunFolder
from whet.trained import load_adapted

if TYPE_CHECKING:
    import numpy as np
    import torch

    from whet.export.tensors import Weights

_FALLBACK_TEXTS = ("The quick brown fox jumps over the lazy dog.", '{"answer": 42, "unit": "m/s"}')
_NUM_ROWS, _NUM_TOKENS, _NUM_ANSWERS = 8, 96, 3
_MIXED = (
    [{"role": "user", "content": "Hello 🙂 مرحبا"}],
    [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"},
     {"role": "user", "content": "日本語"}],
)  # fmt: skip


@dataclass
class Live:
    """What a live model gives, computed once for all its exports.

    Args:
        tokenizer: Its tokenizer.
        model: In float32, without the engine.
        examples: Held-out rows.
        answer_tokens: Longest greedy answer.
    """

    tokenizer: Tokenizer
    model: Any
    examples: Sequence[Example] = ()
    answer_tokens: int = 32
    strings: list[str] = field(init=False)
    string_ids: list[list[int]] = field(init=False)
    conversations: list[Any] = field(init=False)
    renders: list[str] = field(init=False)
    rows: list[list[int]] = field(init=False)
    logits: list[np.ndarray[Any, Any]] = field(init=False)
    answers: list[tuple[str, list[int], list[int]]] = field(init=False)
    ends: list[int] = field(init=False)
    _rounded: dict[str, list[np.ndarray[Any, Any]]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        tokenizer = self.tokenizer
        self.strings = sample_strings(tokenizer)
        self.string_ids = [self._ids(text) for text in self.strings]
        self.conversations = [(e.messages, e.tools) for e in self.examples if e.messages]
        self.conversations += [(turns, ()) for turns in _MIXED if self._renders(turns)]
        self.renders = self._render_all(tokenizer)
        texts = [_text(tokenizer, example) for example in self.examples] or list(_FALLBACK_TEXTS)
        self.rows = [row for text in texts if (row := self._ids(text)[:_NUM_TOKENS])]
        self.ends = end_token_ids(self.model, tokenizer)
        self.logits = self._run()
        self.answers = [
            (prompt, ids, greedy(self.model, ids, self.answer_tokens, self.ends))
            for prompt in self._prompts()
            if (ids := self._ids(prompt))
        ]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _renders(self, turns: Any) -> bool:
        """Tell whether the template takes these turns; some allow a first turn or system prompt only."""
        if not self.tokenizer.chat_template:
            return False
        try:
            render_prompt(self.tokenizer, turns)
        except InputError:
            return False
        return True

    def _prompts(self) -> list[str]:
        found = []
        for example in self.examples:
            if example.messages and example.messages[-1]["role"] == "assistant":
                found.append(render_prompt(self.tokenizer, example.messages[:-1], example.tools))
        return (found or [text[: len(text) // 2] for text in _FALLBACK_TEXTS])[:_NUM_ANSWERS]

    def _render_all(self, tokenizer: Tokenizer) -> list[str]:
        found = []
        for turns, tools in self.conversations:
            prompt = list(turns)
            if prompt[-1]["role"] == "assistant":
                found.append(render(tokenizer, prompt, tools).text)
                prompt = prompt[:-1]
            found.append(render_prompt(tokenizer, prompt, tools))
        return found

    def render_with(self, template: str) -> list[str]:
        """Render the same conversations with another template; one that fails renders nothing.

        Args:
            template: Jinja.
        """
        other = copy.deepcopy(self.tokenizer)
        other.chat_template = template
        try:
            return self._render_all(other)
        except InputError:
            return [""] * len(self.renders)

    def _run(self) -> list[np.ndarray[Any, Any]]:
        return model_logits(self.model, self.rows)

    def rounded(self, dtype: str) -> list[np.ndarray[Any, Any]]:
        """Return the logits of the model when it is cast to a narrower type.

        Args:
            dtype: Torch's name of the type.
        """
        import torch

        if dtype == "float32":
            return self.logits
        if dtype not in self._rounded:
            narrow = copy.deepcopy(self.model).to(getattr(torch, dtype))
            self._rounded[dtype] = model_logits(narrow, self.rows)
        return self._rounded[dtype]


def live_of(run: RunFolder, tokenizer: Tokenizer, dequantised: Weights | None = None) -> Live:
    """Load a run's model as the truth its exports are compared with.

    Args:
        run: A finished run.
        tokenizer: Its tokenizer.
        dequantised: The weights of an export that is merged into the 4-bit copies; the truth has
            them too.
    """
    import torch

    from whet.export.tensors import nf4_rounded

    base = run.config.model.model_copy(update={"load_in_4bit": False})
    if run.adapter_dir.is_dir():
        model: Any = load_adapted(base, torch.float32, run)
    else:
        model = load_model(base, torch.float32, run.model_dir)
    if dequantised is not None and dequantised.rounded:
        assert dequantised.dtype is not None
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
                if plain in dequantised.rounded:
                    parameter.copy_(nf4_rounded(parameter, dequantised.dtype))
    return Live(tokenizer, model.eval(), held_out(run))


def held_out(run: RunFolder) -> list[Example]:
    """Return a run's first held-out rows, or none when they are not where they were."""
    data = run.config.data
    try:
        return list(islice(examples_of(data, data.heldout or data.train), _NUM_ROWS))
    except InputError:  # any text shows whether the weights are right
        return []


def _text(tokenizer: Tokenizer, example: Example) -> str:
    if example.messages:
        return render(tokenizer, example.messages, example.tools).text
    if example.input_ids:
        return str(tokenizer.decode(example.input_ids[:500]))
    return example.text[:2000]


def model_logits(model: Any, rows: Sequence[Sequence[int]]) -> list[np.ndarray[Any, Any]]:
    """Return a transformers model's logits of every position of each row, in float32."""
    import torch

    model.eval()
    with torch.inference_mode():
        return [
            model(torch.tensor([list(row)], device=model.device), use_cache=False)
            .logits[0].float().cpu().numpy()
            for row in rows
        ]  # fmt: skip


def greedy(
    model: Any, ids: Sequence[int], num_tokens: int, ends: Sequence[int] | None = None
) -> list[int]:
    """Return a transformers model's greedy continuation, without the token that ended it.

    Args:
        model: The model.
        ids: The prompt.
        num_tokens: How many tokens at most.
        ends: Tokens that end it; None leaves that to the model's own generation config.
    """
    import torch

    settings: dict[str, Any] = {} if ends is None else {"eos_token_id": list(ends)}
    stop = list(ends or eos_ids(model))
    with torch.inference_mode():
        found = model.generate(
            input_ids=torch.tensor([list(ids)], device=model.device),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=model.device),
            do_sample=False, max_new_tokens=num_tokens, top_k=None, top_p=None, temperature=None,
            pad_token_id=0, **settings,
        )[0, len(ids) :].tolist()  # fmt: skip
    return found[:-1] if found and found[-1] in stop else found


def eos_ids(model: Any) -> list[int]:
    """Return the tokens that a model's generation config stops at."""
    own = getattr(model.generation_config, "eos_token_id", None)
    return [own] if isinstance(own, int) else list(own or [])


class TransformersModel:
    """An exported folder in plain transformers, or with peft where it holds an adapter.

    Args:
        folder: The export.
        base: The base model's section, for an adapter.
        dtype: Type of the weights.
    """

    def __init__(self, folder: Any, dtype: torch.dtype, base: Any = None) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
        if base is not None:
            model: Any = PeftModel.from_pretrained(load_model(base, dtype), str(folder))
        else:
            model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype)
            if not getattr(model, "is_quantized", False):
                model.to(device())
            keep_4bit_weights(model)
        self.model = model.eval()

    @property
    def template(self) -> str | None:
        """The folder's chat template."""
        return self.tokenizer.chat_template

    def tokenize_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Return texts' token ids, none added."""
        return [list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]

    def logits(self, rows: Sequence[Sequence[int]]) -> list[np.ndarray[Any, Any]]:
        """Return the logits of every position of each row."""
        return model_logits(self.model, rows)

    def answer(self, ids: Sequence[int], num_tokens: int) -> list[int]:
        """Return the greedy continuation, stopped where the folder's own settings say."""
        return greedy(self.model, ids, num_tokens)

    def ends_generation(self, token: int) -> bool:
        """Make the model say a token, and tell whether generation stops there."""
        import torch
        from transformers import LogitsProcessor

        class Say(LogitsProcessor):
            """Leaves one token only to choose."""

            def __call__(
                self, input_ids: torch.LongTensor, scores: torch.FloatTensor
            ) -> torch.FloatTensor:
                only: Any = torch.full_like(scores, -torch.inf)
                only[:, token] = 0
                return only

        start = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
        with torch.inference_mode():
            found = self.model.generate(
                input_ids=start, attention_mask=torch.ones_like(start), do_sample=False,
                max_new_tokens=2, pad_token_id=0, logits_processor=[Say()],
            )  # fmt: skip
        return found.shape[1] == 2
