import pytest

from whet.data.formats import Example, detect_format, to_example
from whet.data.sources import Fault, Row
from whet.errors import InputError


def row(**values):
    return Row(values, "f.jsonl", 1, 1)


SAID = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"})


@pytest.mark.parametrize(
    ("name", "columns", "values"),
    [
        ("messages", {}, {"messages": list(SAID)}),
        (
            "sharegpt",
            {},
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
        ),
        ("alpaca", {}, {"instruction": "hi", "input": None, "output": "yo"}),
        ("prompt", {}, {"prompt": "hi", "completion": "yo"}),
        ("alpaca", {"instruction": "q", "output": "a"}, {"q": "hi", "a": "yo", "extra": 3}),
    ],
)
def test_a_format_is_detected_and_read(name, columns, values):
    assert detect_format(row(**values), columns) == name
    example = to_example(row(**values), name, columns, None)
    assert isinstance(example, Example) and example.messages == SAID and not example.notes


def test_alpaca_joins_instruction_and_input():
    example = to_example(row(instruction="a", input="b", output="c"), "alpaca", {}, None)
    assert example.messages[0]["content"] == "a\n\nb"


def test_text_is_text():
    assert detect_format(row(text="x"), {}) == "text"
    assert to_example(row(body="x"), "text", {"text": "body"}, None).text == "x"


def test_token_ids_are_taken_as_they_are():
    found = to_example(row(input_ids=[5, 6, 7], labels=[-100, 6, 7]), "tokens", {}, "a system")
    assert isinstance(found, Example)
    assert (found.input_ids, found.labels) == ((5, 6, 7), (-100, 6, 7))
    whole = to_example(row(input_ids=[5, 6, 7]), "tokens", {}, None)
    assert isinstance(whole, Example) and whole.labels == (5, 6, 7)
    assert detect_format(row(input_ids=[5, 6]), {}) == "tokens"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"input_ids": "5 6"}, "list of integers"),
        ({"input_ids": [5, True]}, "list of integers"),
        ({"input_ids": [5, 6], "labels": [6]}, "2 input_ids and 1 labels"),
        ({"input_ids": [5]}, "needs two tokens"),
        ({"input_ids": [5, 6, 7], "labels": [6, 7, -100]}, "labels are not shifted"),
    ],
)
def test_token_ids_that_cannot_be_right_are_a_fault(values, words):
    found = to_example(row(**values), "tokens", {}, None)
    assert isinstance(found, Fault) and words in str(found)


def test_the_system_prompt_is_added_only_where_there_is_none():
    plain = to_example(row(messages=list(SAID)), "messages", {}, "be brief")
    assert plain.messages[0] == {"role": "system", "content": "be brief"}
    own = [{"role": "system", "content": "own"}, *SAID]
    assert to_example(row(messages=own), "messages", {}, "be brief").messages == tuple(own)
    alpaca = row(instruction="hi", output="yo", system="its own")
    assert to_example(alpaca, "alpaca", {}, "be brief").messages[0]["content"] == "its own"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"instruction": "x", "input": "y"}, "needs column 'output'"),
        ({"instruction": "x", "ouput": "y"}, "did you mean 'ouput'"),
        ({"a": 1, "b": 2}, "no column to learn from; got 'a', 'b'"),
    ],
)
def test_a_missing_column_is_named_with_what_is_there(values, words):
    with pytest.raises(InputError, match=words):
        detect_format(row(**values), {})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"instruction": "x", "output": None}, "has no 'output'"),
        ({"instruction": None, "output": None}, "has no 'instruction', has no 'output'"),
        ({"instruction": "x", "output": 42}, "must be text, not number"),
        ({"instruction": "x", "output": True}, "must be text, not boolean"),
        ({"instruction": "x", "output": ["y"]}, "must be text, not list"),
        ({"instruction": "x", "output": {"y": 1}}, "must be text, not object"),
        ({"instruction": "x", "output": " "}, "'output' is empty"),
        ({"instruction": "x", "output": "y", "input": 3}, "'input' must be text"),
    ],
)
def test_a_value_that_is_no_text_is_a_fault(values, words):
    fault = to_example(row(**values), "alpaca", {}, None)
    assert isinstance(fault, Fault) and words in str(fault) and str(fault).startswith("f.jsonl:1")


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([], "must be a list of turns"),
        ("hi", "must be a list of turns, not text"),
        ([{"role": "user"}], "needs 'role' and 'content'"),
        ([{"role": "wizard", "content": "x"}], "role 'wizard'"),
        ([{"role": "user", "content": None}], "content must be text, not null"),
    ],
)
def test_turns_that_are_no_turns_are_faults(turns, words):
    fault = to_example(row(messages=turns), "messages", {}, None)
    assert isinstance(fault, Fault) and words in str(fault)


def test_odd_conversations_are_noted_and_what_has_no_reply_is_dropped():
    user, assistant = SAID
    last = to_example(row(messages=[user, assistant, user]), "messages", {}, None)
    assert last.messages == SAID and "no reply" in last.notes[0]
    doubled = to_example(row(messages=[user, user, assistant]), "messages", {}, None)
    assert "turns 1 and 2 are both 'user'" in doubled.notes[0]
    alone = to_example(row(messages=[user]), "messages", {}, None)
    assert not alone.messages and "no assistant turn" in alone.notes[0]
