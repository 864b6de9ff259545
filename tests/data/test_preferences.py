import pytest

from whet.data.formats import check_columns, detect_format, to_example
from whet.data.sources import Fault, Row
from whet.errors import InputError


def row(**values):
    return Row(values, "f.jsonl", 1, 1)


def read(columns=None, system=None, name=None, **values):
    """Read one row as a file of such rows would be read."""
    name = name or detect_format(row(**values), columns or {})
    check_columns(row(**values), name, columns or {})
    return to_example(row(**values), name, columns or {}, system)


def said(messages):
    return [(m["role"], m["content"]) for m in messages]


CHOSEN = [("user", "q"), ("assistant", "a")]
REJECTED = [("user", "q"), ("assistant", "b")]
A, B = ({"role": "assistant", "content": text} for text in "ab")
Q = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [Q], "chosen": A, "rejected": [B]},
        {"prompt": "q", "chosen": [A], "rejected": "b"},
        {"chosen": [Q, A], "rejected": [Q, B]},
        {"prompt": "q", "chosen": [Q, A], "rejected": [Q, B], "messages": [Q, A]},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": A, "rejected": B},
        {"question": "q", "chosen": "a", "rejected": "b"},
        {"prompt": Q, "chosen": {"from": "gpt", "value": "a"}, "rejected": B},
    ],
)
def test_a_preference_is_a_prompt_and_two_answers_however_written(values):
    example = read(**values)
    assert said(example.messages) == CHOSEN and said(example.rejected) == REJECTED
    assert (example.answer, example.prompt_key) == ("a", repr([("user", "q")]))


def test_a_preference_s_system_prompt_is_in_both_of_its_sides_and_once():
    for values in (
        {"prompt": "q", "chosen": "a", "rejected": "b", "system": "s"},
        {"prompt": [{"role": "system", "content": "s"}, Q], "chosen": [Q, A], "rejected": [Q, B]},
        {
            "prompt": "q",
            "chosen": [{"role": "system", "content": "s"}, Q, A],
            "rejected": [{"role": "system", "content": "s"}, Q, B],
        },
    ):
        example = read(**values)
        assert said(example.messages) == [("system", "s"), *CHOSEN]
        assert said(example.rejected) == [("system", "s"), *REJECTED]
    joined = read(instruction="q", input="i", chosen="a", rejected="b")
    assert joined.messages[0]["content"] == "q\n\ni"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"chosen": "a", "rejected": "b"}, "add a column 'prompt'"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "has no 'rejected'"),
        ({"prompt": "q", "chosen": " ", "rejected": "b"}, "'chosen' is empty"),
        ({"prompt": "q", "chosen": 3, "rejected": "b"}, "'chosen' must be text, not number"),
        ({"prompt": "q", "chosen": [A, Q], "rejected": [B]}, "'chosen' must end with an assistant"),
        ({"prompt": "q", "chosen": [A], "rejected": [Q]}, "'rejected' must end with an assistant"),
        ({"prompt": "x", "chosen": [Q, A], "rejected": [Q, B]}, "another question than the prompt"),
        ({"chosen": [Q, A], "rejected": [{**Q, "content": "r"}, B]}, "begin with the same turn"),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, "must be a list of turns"),
    ],
)
def test_a_pair_that_is_none_is_a_fault(values, words):
    fault = read(**values)
    assert isinstance(fault, Fault) and words in fault.reason and fault.excerpt.startswith("{")


def test_a_pair_of_equal_answers_is_noted():
    for other in ("a", A, [A]):
        assert "the pair teaches nothing" in read(prompt="q", chosen="a", rejected=other).notes[0]


@pytest.mark.parametrize(
    ("label", "desirable"),
    [(True, True), (False, False), (1, True), (0, False), ("true", True), ("False", False)],
)
def test_a_kto_row_is_a_conversation_with_a_judgement(label, desirable):
    for values in ({"messages": [Q, A]}, {"prompt": "q", "completion": "a"}):
        example = read(label=label, **values)
        assert (said(example.messages), example.desirable) == (CHOSEN, desirable)


def test_a_label_that_judges_nothing_is_a_fault_when_kto_is_stated():
    for label in (None, 2, "good", 1.5, []):
        assert (
            "'label' must be true or false"
            in read(name="kto", prompt="q", completion="a", label=label).reason
        )
    with pytest.raises(InputError, match="needs column 'messages', or 'prompt' and 'completion'"):
        read(name="kto", label=True, text="x")
