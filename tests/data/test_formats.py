import json
from collections import Counter

import pytest

from whet.data.formats import (
    FORMATS,
    Example,
    check_columns,
    columns_read,
    detect_format,
    to_example,
)
from whet.data.sources import Fault, Row, read_rows
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


A, B = ({"role": "assistant", "content": text} for text in "ab")
Q = {"role": "user", "content": "q"}
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
    assert isinstance(example, Example) and not example.notes
    assert said(example.messages) == said(SAID)
    assert example.key == "[('user', 'hi'), ('assistant', 'yo')]"  # held-out rows hang on it


def test_alpaca_joins_instruction_and_input():
    example = to_example(row(instruction="a", input="b", output="c"), "alpaca", {}, None)
    assert example.messages[0] == {
        "role": "user", "content": "a\n\nb", "instruction": "a", "input": "b",
    }  # fmt: skip
    assert "instruction" not in example.messages[1]


@pytest.mark.parametrize("history", [[["q", "r"]], '[["q", "r"]]'])
def test_alpaca_history_becomes_earlier_turns(history):
    example = read(instruction="a", output="c", history=history, system="s")
    assert said(example.messages) == [
        ("system", "s"), ("user", "q"), ("assistant", "r"), ("user", "a"), ("assistant", "c"),
    ]  # fmt: skip
    for empty in (None, [], "", "[]"):
        assert len(read(instruction="a", output="c", history=empty).messages) == 2


@pytest.mark.parametrize("history", [[["q"]], [["q", None]], "[", 3, [3], {"a": 1}])
def test_a_history_of_something_else_is_a_fault(history):
    fault = read(instruction="a", output="c", history=history)
    assert isinstance(fault, Fault) and "'history'" in fault.reason


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


DETECTED = [
    ("preference", {"prompt": "q", "chosen": "a", "rejected": "b"}),
    ("preference", {"conversations": list(SAID[:1]), "chosen": SAID[1], "rejected": SAID[1]}),
    ("kto", {"messages": list(SAID), "label": True}),
    ("kto", {"prompt": "q", "completion": "a", "label": False}),
    ("kto", {"prompt": "q", "completion": "a", "label": "true"}),
    ("prompt", {"prompt": "q", "completion": "a", "label": "sport"}),
    ("text", {"text": "a film", "label": 1}),
    ("qa", {"question": "q", "answer": "a"}),
    ("qa", {"context": "c", "question": "q", "response": "a"}),
    ("alpaca", {"instruction": "q", "response": "a"}),
    ("alpaca", {"query": "q", "response": "a"}),
    ("alpaca", {"instruction": "q", "input": "", "output": "a", "text": "q a"}),
    ("prompt", {"prompt": "q", "response": "a"}),
    ("prompt", {"prompt": "q", "answer": "a"}),
    ("messages", {"conversations": list(SAID)}),
    ("messages", {"dialog": list(SAID)}),
    ("sharegpt", {"messages": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}),
]


@pytest.mark.parametrize(("name", "values"), DETECTED)
def test_a_row_is_shown_as_what_it_is(name, values):
    assert detect_format(row(**values), {}) == name
    assert isinstance(read(**values), Example)


def test_other_names_of_columns_are_told_once_and_its_own_name_wins():
    values = {"instruction": "q", "context": "c", "response": "a"}
    example = read(**values)
    assert said(example.messages) == [("user", "q\n\nc"), ("assistant", "a")]
    assert example.notes == (
        "column 'response' is read as 'output'", "column 'context' is read as 'input'",
    )  # fmt: skip
    later = to_example(Row(values, "f.jsonl", 2, 2), "alpaca", {}, None)
    assert not later.notes
    assert columns_read({**values, "output": "x"}, "alpaca", {})["output"] == "output"
    mapped = columns_read({"response": "r", "out": "x", "query": "q"}, "alpaca", {"output": "out"})
    assert mapped == {"instruction": "query", "output": "out"}


@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize("style", ["messages", "sharegpt"])
def test_turns_may_stand_under_a_mapped_column_in_both_styles(column, style):
    turns = list(SAID) if style == "messages" else [
        {"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"},
    ]  # fmt: skip
    assert detect_format(row(chat=turns), {column: "chat"}) == style
    assert read(columns={column: "chat"}, chat=turns).messages == SAID


@pytest.mark.parametrize(
    ("values", "question"),
    [
        ({}, "q"),
        ({"context": "c"}, "c\n\nq"),
        ({"A": "x", "B": "y", "C": None}, "q\nA. x\nB. y"),
        ({"context": None, "A": ""}, "q"),
    ],
)
def test_a_question_has_its_context_before_it_and_its_choices_behind(values, question):
    example = read(question="q", answer="B", system="s", **values)
    assert said(example.messages) == [("system", "s"), ("user", question), ("assistant", "B")]


def test_a_number_is_no_answer_and_no_choice():
    assert "'answer' must be text, not number" in read(question="q", answer=3).reason
    assert "'A' must be text, not number" in read(question="q", answer="A", A=4).reason


def test_a_prompt_may_be_a_list_of_turns():
    example = read(prompt=[Q], completion=[A], system="s")
    assert said(example.messages) == [("system", "s"), ("user", "q"), ("assistant", "a")]


def test_null_is_never_a_word_of_an_example():
    turns = [{"role": "assistant", "content": None, "tool_calls": [
        {"function": {"name": "f", "arguments": {"a": None, "b": {"c": None, "d": 1}}}}]}]  # fmt: skip
    rows = [
        {"instruction": "q", "input": None, "output": "a", "system": None, "history": None},
        {"question": "q", "answer": "a", "A": None, "context": None, "system": None},
        {"messages": [Q, *turns], "tools": [{"name": "f", "default": None}]},
        {"prompt": "q", "chosen": "a", "rejected": "b", "input": None, "messages": None},
        {"messages": None, "prompt": "q", "completion": "a", "label": True},
    ]
    for values in rows:
        example = read(**values)
        assert isinstance(example, Example), example
        held = repr((example.messages, example.rejected, example.tools))
        assert "None" not in held and "null" not in held


def test_rows_of_nulls_are_faults_in_every_format():
    for name, (needed, optional) in FORMATS.items():
        values = dict.fromkeys((*needed, *optional))
        assert isinstance(to_example(row(**values), name, {}, None), Fault), name
        for wrong in (3, 2.5, True, {}, [], [None], [[]], {"a": None}, [{"role": None}], "\0"):
            values = dict.fromkeys((*needed, *optional), wrong)
            found = to_example(row(**values), name, {}, None)
            assert isinstance(found, Fault | Example), (name, wrong)
            assert wrong == "\0" or isinstance(found, Fault), (name, wrong)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "expected", "count"),
    [
        ("dpo_en_demo.json", "preference", 299),
        ("kto_en_demo.json", "kto", 300),
        ("identity.json", "alpaca", 91),
        ("alpaca_en_demo.json", "alpaca", 999),
        ("c4_demo.jsonl", "text", 300),
        ("exams_ar_test.jsonl", "qa", 537),
        ("acva_ar_dev.jsonl", "qa", 289),
    ],
)
def test_real_files_are_detected_and_read_whole(shared, name, expected, count):
    rows = list(read_rows(str(shared / "data" / name)))
    assert detect_format(rows[0], {}) == expected
    found = [to_example(item, expected, {}, None) for item in rows]
    assert Counter(map(type, found)) == {Example: count}
    assert not any(example.notes for example in found)
    if expected == "kto":
        assert sum(example.desirable for example in found) == 150
    if expected == "preference":
        assert all(e.messages[:-1] == e.rejected[:-1] != () for e in found)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "place", "words"),
    [
        ("identical_pair.jsonl", 5, "chosen and rejected are the same"),
        ("two_user_turns.jsonl", 3, "turns 1 and 2 are both 'user'"),
        ("ends_with_user.jsonl", 4, "ends with a turn that has no reply"),
        ("null_fields.jsonl", 8, "has no 'instruction', has no 'output'"),
        ("mixed_types.jsonl", 9, "'output' must be text, not boolean"),
    ],
)
def test_awkward_rows_are_told_with_their_place(shared, name, place, words):
    rows = list(read_rows(str(shared / "data" / "bad" / name)))
    found = to_example(rows[place - 1], detect_format(rows[0], {}), {}, None)
    assert found.where == f"{name}:{place}"
    assert words in (found.reason if isinstance(found, Fault) else found.notes[0])


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing_column.csv", "missing_column.csv, line 1: format 'alpaca' needs column 'output'"),
        ("misspelt_column.csv", "did you mean 'ouput'"),
    ],
)
def test_files_without_an_answer_are_refused(shared, name, words):
    first = next(iter(read_rows(str(shared / "data" / "bad" / name))))
    with pytest.raises(InputError, match=words):
        detect_format(first, {})


def test_a_fault_shows_the_beginning_of_its_row():
    fault = read(instruction="x" * 500, output=None)
    assert fault.excerpt == json.dumps({"instruction": "x" * 500}, separators=(",", ":"))[:120]


def test_a_mapped_column_that_a_row_lacks_is_not_replaced_by_another():
    columns = {"output": "gold"}
    found = to_example(row(instruction="q", output="draft"), "alpaca", columns, None)
    assert isinstance(found, Fault) and "has no 'output'" in found.reason
