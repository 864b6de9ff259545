"""Small tokenizers of the kinds that models come with, trained on the spot."""

import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

TEXT = [
    "turn red into a colour and four into a number", "the assistant answers a user's question",
    "don't we'll they're 12345 2024-01-31", "naïve café Straße", "Привет, как дела?", "مرحبا بالعالم",
    "日本語のテキスト", "def f(x):\n    return x ** 2\n", "  two  spaces\t\ttabs\n\nbreaks",
] * 4  # fmt: skip
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def pieces(first_blank: bool) -> PreTrainedTokenizerFast:
    """SentencePiece's BPE as tokenizer.json has it: Llama 2's with a blank first, Gemma's without."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [normalizers.Prepend("▁")] if first_blank else []
    core.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    bytes_ = [f"<0x{n:02X}>" for n in range(256)]
    trainer = BpeTrainer(
        vocab_size=420, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False,
        initial_alphabet=list("▁abcdefghijklmnopqrstuvwxyz0123456789.,'"), limit_alphabet=60,
    )  # fmt: skip
    core.train_from_iterator([text.replace(" ", "▁") for text in TEXT], trainer)
    # Bytes are ordinary tokens, not special ones.
    state = json.loads(core.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
    core = Tokenizer.from_str(json.dumps(state))
    core.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        *([decoders.Strip(" ", 1, 0)] if first_blank else []),
    ])  # fmt: skip
    core.add_special_tokens([AddedToken("<turn>", normalized=False, special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
    )


def byte_level(rule: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE that cuts words as a family does."""
    cutters = {
        "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "smollm": [pre_tokenizers.Digits(individual_digits=True),
                   pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "llama-bpe": [pre_tokenizers.Split(Regex(CL100K), "isolated"),
                      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)],
        "qwen2": [pre_tokenizers.Split(Regex(CL100K.replace("{1,3}", "")), "isolated"),
                  pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)],
        # A pattern that whet has no name for; it cuts as Llama 3's does.
        "unknown": [pre_tokenizers.Split(Regex(CL100K + r"|\s+"), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)],
    }  # fmt: skip
    core = Tokenizer(models.BPE(ignore_merges=rule in ("llama-bpe", "unknown")))
    core.pre_tokenizer = pre_tokenizers.Sequence(cutters[rule])
    core.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=420, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    core.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")
