"""llama.cpp cuts texts into the tokens that the tokenizer gives."""

import pytest
from tests.export.tokenizers_made import byte_level, pieces

from whet.errors import InputError
from whet.export.gguf_tokenizer import _tokenize_with, prove, read_vocabulary
from whet.export.strings import NUM_STRINGS, sample_strings

pytest.importorskip("cyllama")


def differing(tokenizer, vocabulary):
    strings = sample_strings(tokenizer)
    found = _tokenize_with(vocabulary, strings)
    return [
        (text, tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"]),
         tokenizer.convert_ids_to_tokens(ids))
        for text, ids in zip(strings, found, strict=True)
        if ids != tokenizer(text, add_special_tokens=False)["input_ids"]
    ]  # fmt: skip


@pytest.mark.parametrize("rule", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_byte_level_tokens_are_equal_under_the_rule_that_is_looked_up(rule):
    tokenizer = byte_level(rule)
    vocabulary = read_vocabulary(tokenizer, len(tokenizer) + 5)
    assert vocabulary.rule == rule
    assert differing(tokenizer, vocabulary) == []


def test_an_unknown_pattern_gets_the_rule_that_cuts_alike():
    tokenizer = byte_level("unknown")
    vocabulary = read_vocabulary(tokenizer, len(tokenizer))
    assert differing(tokenizer, vocabulary)
    strings = sample_strings(tokenizer)
    assert differing(tokenizer, prove(vocabulary, tokenizer, strings)) == []


@pytest.mark.parametrize("first_blank", [True, False])
def test_sentencepiece_tokens_are_equal(first_blank):
    tokenizer = pieces(first_blank)
    vocabulary = read_vocabulary(tokenizer, len(tokenizer) + 3)
    assert vocabulary.model == "llama" and vocabulary.add_space == first_blank
    assert differing(tokenizer, vocabulary) == []


def test_there_are_two_hundred_strings_of_many_scripts():
    strings = sample_strings(byte_level("gpt-2"))
    assert len(set(strings)) == len(strings) == NUM_STRINGS
    assert any("مرحبا" in text for text in strings) and any(
        "<|im_end|>" in text for text in strings
    )


def test_a_tokenizer_larger_than_the_embedding_is_refused():
    tokenizer = byte_level("gpt-2")
    with pytest.raises(InputError, match="more tokens than the model has embeddings"):
        read_vocabulary(tokenizer, len(tokenizer) - 1)


def test_another_kind_of_tokenizer_is_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(InputError, match="WordLevel"):
        read_vocabulary(PreTrainedTokenizerFast(tokenizer_object=words), 10)
