"""A tokenizer as llama.cpp reads it: tokens, kinds, merges or scores, special tokens and template.

Two kinds are known: byte-level BPE (GPT-2, Llama 3, Qwen, ...), where llama.cpp also needs the name of
the rule that cuts text into words, and SentencePiece's BPE (Llama 2, Mistral, Gemma), where it needs
scores. The rule's name is looked up by the tokenizer's own patterns; `prove` then asks llama.cpp.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from whet.data.template import stop_token_ids
from whet.errors import InputError
from whet.model import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_WIDTH = 32  # of the model that holds a tokenizer to be tried
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The rules' names by the pattern that stands in tokenizer.json. Llama 3 and GPT-4's tokenizer cut
# alike; the first takes a word that is a token as it is, the second always merges.
_RULES = {
    (_CL100K, True): "llama-bpe",
    (_CL100K, False): "dbrx",
    (_CL100K.replace("{1,3}", ""), False): "qwen2",
}
# Other rules of llama.cpp, for the tokenizers of the families that whet writes.
RULES = (
    "llama-bpe", "qwen2", "smollm", "gpt-2", "deepseek-v3", "deepseek-llm", "gpt-4o", "tekken", "dbrx",
    "deepseek-coder", "starcoder", "refact", "command-r", "qwen35", "default",
)  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of its tokenizer.

    Args:
        model: `gpt2` (byte-level BPE) or `llama` (SentencePiece).
        tokens: Texts by id, as llama.cpp spells them.
        kinds: Token types by id.
        rule: Name of the rule that cuts text into words; for SentencePiece `default`.
        merges: Of byte-level BPE.
        scores: Of SentencePiece.
        special: Ids by name: bos, eos, eot, unknown, padding.
        add_bos: Whether a text begins with bos.
        add_space: Whether SentencePiece puts a blank before a text.
        template: The chat template.
    """

    model: str
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    rule: str = "default"
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    special: dict[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_space: bool = False
    template: str | None = None

    def with_rule(self, rule: str) -> Vocabulary:
        """Return it with another rule."""
        return replace(self, rule=rule)

    def write(self, writer: Any) -> None:
        """Add it to a GGUF file.

        Args:
            writer: A gguf.GGUFWriter.
        """
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.rule)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.kinds))
        if self.scores:
            writer.add_token_scores(list(self.scores))
        if self.merges:
            writer.add_token_merges(list(self.merges))
        for name, token in self.special.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(False)
        if self.model == "llama":
            writer.add_add_space_prefix(self.add_space)
        if self.template:
            writer.add_chat_template(self.template)


def read_vocabulary(tokenizer: Tokenizer, num_rows: int) -> Vocabulary:
    """Read a tokenizer.

    Args:
        tokenizer: A fast tokenizer with its chat template.
        num_rows: Rows of the embedding; ids beyond the tokenizer's are filled up.

    Raises:
        InputError: It is of a kind that llama.cpp cannot be told of, or has more tokens than rows.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    if model.get("type") != "BPE":
        raise InputError(
            "llama.cpp gets byte-level BPE and SentencePiece BPE tokenizers from whet",
            model.get("type"), "use --to merged",
        )  # fmt: skip
    if len(tokenizer) > num_rows:
        raise InputError(
            f"the tokenizer has more tokens than the model has embeddings ({num_rows})",
            len(tokenizer), "resize the model's embeddings",
        )  # fmt: skip
    pieces = bool(model.get("byte_fallback"))
    tokens = [f"[PAD{number}]" for number in range(num_rows)]
    kinds = [UNUSED] * num_rows
    for text, token in model["vocab"].items():
        tokens[token] = text
        kinds[token] = BYTE if pieces and _is_byte(text) else NORMAL
    for added in described.get("added_tokens", ()):
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    common = {
        "tokens": tuple(tokens),
        "special": _special(tokenizer),
        "add_bos": _adds_bos(tokenizer),
        "template": tokenizer.chat_template,
    }
    if not pieces:
        return Vocabulary("gpt2", kinds=tuple(kinds), rule=guess_rule(described),
                          merges=tuple(merges), **common)  # fmt: skip
    if (unknown := model.get("unk_token")) in model["vocab"]:
        kinds[model["vocab"][unknown]] = UNKNOWN
    return Vocabulary(
        "llama", kinds=tuple(kinds), scores=piece_scores(model["vocab"], model["merges"], num_rows),
        add_space=_adds_space(described), **common,
    )  # fmt: skip


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def piece_scores(vocab: dict[str, int], merges: list[Any], num_rows: int) -> tuple[float, ...]:
    """Return SentencePiece's scores: pieces made first have the highest, 0, -1, -2, ...

    Args:
        vocab: Ids by piece.
        merges: Pairs of pieces, in the order they are joined in.
        num_rows: How many scores; special tokens and bytes have 0.
    """
    scores = [0.0] * num_rows
    joined = [m.replace(" ", "", 1) if isinstance(m, str) else "".join(m) for m in merges]
    ranked = [text for text in dict.fromkeys(joined) if text in vocab]
    made = set(ranked)
    special = {"<unk>", "<s>", "</s>"}
    ranked += [
        text for text in sorted(vocab, key=lambda text: vocab[text])
        if text not in made and text not in special and not _is_byte(text)
    ]  # fmt: skip
    for rank, text in enumerate(ranked):
        scores[vocab[text]] = -float(rank)
    return tuple(scores)


def _special(tokenizer: Tokenizer) -> dict[str, int]:
    found = {
        name: token for name, token in (
            ("bos", tokenizer.bos_token_id), ("eos", tokenizer.eos_token_id),
            ("unknown", tokenizer.unk_token_id), ("padding", tokenizer.pad_token_id),
        ) if token is not None
    }  # fmt: skip
    turns = [token for token in stop_token_ids(tokenizer) if token != found.get("eos")]
    if turns:
        found["eot"] = turns[0]
    return found


def _adds_bos(tokenizer: Tokenizer) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def _adds_space(described: dict[str, Any]) -> bool:
    """Tell whether a text gets a blank before it: from the normaliser or the word cutter."""
    steps = [described.get("normalizer"), described.get("pre_tokenizer")]
    while steps:
        step = steps.pop() or {}
        steps += step.get("normalizers", []) + step.get("pretokenizers", [])
        if step.get("type") == "Prepend":
            return True
        if step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never":
            return True
    return False


def guess_rule(described: dict[str, Any]) -> str:
    """Return llama.cpp's name of the rule that cuts text into words.

    Args:
        described: A tokenizer.json.

    Returns:
        The name by the tokenizer's own pattern; a guess where the pattern is none of those known.
    """
    cutter = described.get("pre_tokenizer") or {}
    steps = cutter.get("pretokenizers", [cutter])
    patterns = [s["pattern"].get("Regex", "") for s in steps if s.get("type") == "Split"]
    whole = bool(described["model"].get("ignore_merges"))
    if len(patterns) == 1:
        own = patterns[0]
        if (own, whole) in _RULES:
            return _RULES[own, whole]
        if (own, not whole) in _RULES:
            return _RULES[own, not whole]
        return (
            "gpt-4o"
            if r"\p{Lu}" in own and "{1,3}" in own
            else "tekken"
            if r"\p{Lu}" in own
            else "gpt-2"
        )
    if len(patterns) > 1:
        return "deepseek-v3"
    if any(s.get("type") == "Digits" and s.get("individual_digits") for s in steps):
        return "smollm"
    return "gpt-2"


def prove(vocabulary: Vocabulary, tokenizer: Tokenizer, strings: list[str]) -> Vocabulary:
    """Find the rule under which llama.cpp cuts texts as the tokenizer does.

    Args:
        vocabulary: What is to be written; its own rule is tried first.
        tokenizer: The tokenizer.
        strings: Texts to compare.

    Returns:
        It, with the first rule that gives equal tokens for all strings, or else for the most.
    """
    truth = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in strings]
    rules = [vocabulary.rule]
    if vocabulary.model == "gpt2":
        rules += [rule for rule in RULES if rule != vocabulary.rule]
    best, most = vocabulary, -1
    for rule in rules:
        tried = vocabulary.with_rule(rule)
        equal = sum(
            one == two for one, two in zip(truth, _tokenize_with(tried, strings), strict=True)
        )
        if equal > most:
            best, most = tried, equal
        if equal == len(strings):
            break
    return best


def _tokenize_with(vocabulary: Vocabulary, strings: list[str]) -> list[list[int]]:
    """Tokenise with llama.cpp, from a file that holds little but the tokenizer."""
    import numpy as np
    from gguf import GGUFWriter

    from whet.export.llama_cpp import GGUFModel

    with TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        writer = GGUFWriter(str(path), "llama")
        for key in ("context_length", "embedding_length", "feed_forward_length"):
            writer.add_uint32(f"llama.{key}", _WIDTH)
        writer.add_uint32("llama.block_count", 1)
        writer.add_uint32("llama.attention.head_count", 1)
        writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        vocabulary.write(writer)
        writer.add_tensor(
            "token_embd.weight", np.zeros((len(vocabulary.tokens), _WIDTH), np.float32)
        )
        for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
            writer.add_tensor(f"{name}.weight", np.zeros(_WIDTH, np.float32))
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            writer.add_tensor(f"blk.0.{name}.weight", np.zeros((_WIDTH, _WIDTH), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with GGUFModel(path) as model:
            return model.tokenize_all(strings)
