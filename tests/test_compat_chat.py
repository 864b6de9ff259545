"""The drop-in API: chat templates, labels of answers alone, and old training arguments."""

import copy
import warnings

import pytest
import torch

import whet
from whet import InputError, get_chat_template, train_on_responses_only


def test_a_mapping_and_a_system_message_stand_in_front_of_the_template(tokenizer):
    mapping = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}
    found = get_chat_template(copy.deepcopy(tokenizer), "chatml", mapping, True, 'Say "ah"\n{{x}}')
    plain = get_chat_template(copy.deepcopy(tokenizer), "chatml")
    gpt = [{"from": "human", "value": "turn red"}, {"from": "gpt", "value": "red"}]
    turns = [{"role": "user", "content": "turn red"}, {"role": "assistant", "content": "red"}]
    with_system = [{"role": "system", "content": 'Say "ah"\n{{x}}'}, *turns]
    expected = plain.apply_chat_template(with_system, tokenize=False)
    assert found.apply_chat_template(gpt, tokenize=False) == expected
    assert found.apply_chat_template(turns, tokenize=False) == expected
    assert found.apply_chat_template(with_system, tokenize=False) == expected
    assert "{{x}}" in expected


def test_the_end_of_a_turn_becomes_the_end_of_text(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.eos_token = "<|endoftext|>"
    assert get_chat_template(copy.deepcopy(other), "chatml").eos_token == "<|im_end|>"
    kept = get_chat_template(copy.deepcopy(other), "chatml", map_eos_token=False)
    assert kept.eos_token == "<|endoftext|>"
    own = get_chat_template(copy.deepcopy(other), ("{{ messages[0].content }}", "<|im_end|>"))
    assert own.chat_template == "{{ messages[0].content }}" and own.eos_token == "<|im_end|>"
    with pytest.raises(InputError, match="mapping has keys"):
        get_chat_template(other, "chatml", {"rolle": "from"})


def labelled(tokenizer, texts, *parts, **more):
    from datasets import Dataset

    class Trainer:
        processing_class = tokenizer
        eval_dataset = None

    trainer = Trainer()
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    trainer.train_dataset = Dataset.from_dict({"input_ids": ids, "labels": ids, **more})
    train_on_responses_only(trainer, *parts)
    return [
        tokenizer.decode([i for i in row if i != -100]) for row in trainer.train_dataset["labels"]
    ]


def test_only_answers_are_learned_in_every_turn(tokenizer):
    turns = [
        {"role": "user", "content": "turn red"}, {"role": "assistant", "content": "a colour"},
        {"role": "user", "content": "four"}, {"role": "assistant", "content": "a number"},
    ]  # fmt: skip
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    parts = ("<|im_start|>user\n", "<|im_start|>assistant\n")
    assert labelled(tokenizer, [text], *parts) == ["a colour<|im_end|>\na number<|im_end|>\n"]


@pytest.fixture(scope="module")
def merging():
    """A tokenizer that merges line breaks with each other and with what follows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split("###", "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)
    ])  # fmt: skip
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        ["\n\n"] * 99 + ["### Response:\n\nred\n### Response:\nblue", "é日本\n\n"] * 9,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=["<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


def test_parts_are_found_however_the_tokenizer_merges_them(merging):
    parts = ("### Instruction:\n", "### Response:\n")
    ids = merging("### Response:\n\nred", add_special_tokens=False)["input_ids"]
    alone = merging(parts[1], add_special_tokens=False)["input_ids"]
    assert ids[: len(alone)] != alone  # the end of the part is another token there
    texts = [
        "### Instruction:\nsay 日本\n### Response:\nréd日本<eos>",
        "### Instruction:\nx\n### Response:\n\nred<eos>",
    ]
    first, second = labelled(merging, texts, *parts)
    assert first == "réd日本<eos>" and second.endswith("red<eos>")
    assert "x" not in second


def test_packed_documents_begin_anew(tokenizer):
    ids = tokenizer("red<|im_start|>four", add_special_tokens=False)["input_ids"]
    one = len(tokenizer("red", add_special_tokens=False)["input_ids"])
    text = "red<|im_start|>four" + "a user"
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    lengths = [[len(ids), len(whole) - len(ids)]]
    assert whole[: len(ids)] == ids and one
    assert labelled(tokenizer, [text], "", "<|im_start|>", seq_lengths=lengths) == ["four"]


def test_rows_without_an_answer_are_left_out_and_none_at_all_is_an_error(tokenizer, caplog):
    found = labelled(tokenizer, ["red<|im_start|>four", "a user"], "", "<|im_start|>")
    assert found == ["four"] and "1 of 2 rows" in caplog.text
    with pytest.raises(InputError, match="no row has an answer.*a user"):
        labelled(tokenizer, ["a user"], "", "<|im_start|>")
    with pytest.raises(InputError, match="response_part"):
        train_on_responses_only(None, "x")


def test_old_training_arguments_are_translated(tmp_path):
    from transformers import TrainingArguments

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = whet.TrainingArguments(
            str(tmp_path), evaluation_strategy="steps", warmup_ratio=0.1, group_by_length=True,
            per_gpu_train_batch_size=3, adafactor=True, fp16=not torch.cuda.is_available(),
            logging_dir="x", eval_steps=5,
        )  # fmt: skip
    assert type(found) is TrainingArguments
    assert found.eval_strategy == "steps" and found.warmup_steps == 0.1
    assert found.train_sampling_strategy == "group_by_length" and found.optim == "adafactor"
    assert found.per_device_train_batch_size == 3
    said = " ".join(str(w.message) for w in caught)
    assert "logging_dir" in said
    if not torch.cuda.is_available():
        assert not found.fp16 and "fp16 is off" in said and not whet.is_bfloat16_supported()
    with pytest.raises(TypeError, match="did you mean 'learning_rate'"):
        whet.TrainingArguments(str(tmp_path), learning_rat=1)
