"""Write gpt2-bytes/, for training from scratch: the config of a small GPT-2 and a tokenizer of bytes.

    python examples/models/make_gpt2_bytes.py

The tokenizer is GPT-2's own kind with no merges at all: 256 bytes and the end of text. Any text in any
language goes in, and nothing has to be downloaded or trained first. The files are in the repository; this
script says where they come from.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, PreTrainedTokenizerFast

FOLDER = Path(__file__).resolve().parent / "gpt2-bytes"
END_OF_TEXT = "<|endoftext|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make a byte-level tokenizer without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({piece: number for number, piece in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, model_max_length=256
    )


def small_gpt2(tokenizer: PreTrainedTokenizerFast) -> GPT2Config:
    """Describe a GPT-2 of 0.9 million parameters, which learns on a CPU while you watch."""
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=256,
        n_embd=128,
        n_layer=4,
        n_head=4,
        # Dropout is for many epochs over little text; without it whet's engine fuses every layer.
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def main() -> None:
    """Write the files, as few and as short as they can be."""
    FOLDER.mkdir(exist_ok=True)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(FOLDER)
    text = json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    (FOLDER / "tokenizer.json").write_text(json.dumps(text, ensure_ascii=True) + "\n")
    settings = small_gpt2(tokenizer).to_diff_dict()
    settings["architectures"] = ["GPT2LMHeadModel"]
    settings.pop("transformers_version", None)
    (FOLDER / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
