"""The calls of Unsloth's notebooks around a trainer."""

import pytest
from datasets import Dataset, DatasetDict

import whet
from whet import InputError, standardize_data_formats, standardize_sharegpt

CHATS = [
    [
        {"from": "system", "value": "be kind"}, {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "yo"},
    ],
    [{"from": "human", "value": "2+2"}, {"from": "gpt", "value": "4"}],
]  # fmt: skip
PLAIN = [
    [
        {"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
    ],
    [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}],
]  # fmt: skip


@pytest.mark.parametrize("function", [standardize_sharegpt, standardize_data_formats])
def test_sharegpt_becomes_roles_and_contents(function):
    rows = Dataset.from_dict({"conversations": CHATS, "score": [1, 2]})
    found = function(rows)
    assert found["conversations"][:] == PLAIN and found["score"][:] == [1, 2]
    assert function(found)["conversations"][:] == PLAIN, "once more changes nothing"
    assert rows["conversations"][0][0] == {"from": "system", "value": "be kind"}


def test_streams_splits_and_other_names_of_the_column():
    rows = Dataset.from_dict({"messages": CHATS})
    assert [row["messages"] for row in standardize_sharegpt(rows.to_iterable_dataset())] == PLAIN
    both = standardize_sharegpt(DatasetDict(train=rows, test=rows))
    assert both["test"]["messages"][:] == both["train"]["messages"][:] == PLAIN


def test_the_result_goes_through_a_chat_template(tiny_model):
    from transformers import AutoTokenizer

    tokenizer = whet.get_chat_template(AutoTokenizer.from_pretrained(tiny_model), "chatml")
    rows = standardize_sharegpt(Dataset.from_dict({"conversations": CHATS}))
    texts = [
        tokenizer.apply_chat_template(turns, tokenize=False) for turns in rows["conversations"]
    ]
    assert "<|im_start|>user\n2+2<|im_end|>" in texts[1] and "be kind" in texts[0]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"text": ["a"]}, "finds no conversations"),
        ({"conversations": [[{"from": "human", "value": "a"}], []]}, "row 1: .* must be a list"),
        ({"conversations": [[{"from": "alien", "value": "a"}]]}, "alien"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_told_with_its_row(columns, words):
    with pytest.raises(InputError, match=words):
        standardize_sharegpt(Dataset.from_dict(columns))


def test_what_has_nothing_to_do_says_so_once():
    with pytest.warns(UserWarning, match="nothing to do here"):
        whet.PatchDPOTrainer()
    with pytest.warns(UserWarning, match="aliases_for_user"):
        standardize_sharegpt(
            Dataset.from_dict({"conversations": CHATS}), aliases_for_user=["human"]
        )
