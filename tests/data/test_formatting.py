import pytest

from whet.data.formats import Example, apply_formatting, load_formatting
from whet.data.sources import Fault, Row
from whet.errors import InputError

ROWS = [Row({"q": f"q{n}", "a": f"a{n}"}, "f.jsonl", n, n) for n in (1, 2, 3)]


def batched(examples):
    return {"text": [f"{q} -> {a}<end>" for q, a in zip(examples["q"], examples["a"], strict=True)]}


def batched_list(examples):
    return batched(examples)["text"]


def single(row):
    return f"{row['q']} -> {row['a']}<end>"


def single_that_cannot_take_lists(row):
    return row["q"] + " -> " + row["a"] + "<end>"


def single_dict(row):
    return {"text": single(row)}


@pytest.mark.parametrize(
    "function", [batched, batched_list, single, single_that_cannot_take_lists, single_dict]
)
def test_functions_for_many_rows_and_for_one_give_the_same_texts(function):
    found = list(apply_formatting(function, ROWS))
    assert [example.text for example in found] == [f"q{n} -> a{n}<end>" for n in (1, 2, 3)]
    assert [example.where for example in found] == ["f.jsonl:1", "f.jsonl:2", "f.jsonl:3"]
    assert list(apply_formatting(function, [])) == []


def turns(q, a):
    return [{"role": "user", "content": q}, {"role": "assistant", "content": a}]


def test_messages_are_conversations():
    for function in (
        lambda row: turns(row["q"], row["a"]),
        lambda rows: [turns(q, a) for q, a in zip(rows["q"], rows["a"], strict=True)],
        lambda rows: {"messages": [turns(*pair) for pair in zip(*rows.values(), strict=True)]},
        lambda row: {"messages": turns(row["q"], row["a"])},
    ):
        found = list(apply_formatting(function, ROWS[:2]))
        assert [example.messages for example in found] == [
            tuple(turns("q1", "a1")), tuple(turns("q2", "a2")),
        ]  # fmt: skip


@pytest.mark.parametrize("function", [batched, single])
def test_a_null_is_given_as_empty_text_and_noted(function):
    rows = [*ROWS, Row({"q": "q4", "a": None}, "f.jsonl", 4, 4)]
    found = list(apply_formatting(function, rows))
    assert found[3].text == "q4 -> <end>" and not found[2].notes
    assert found[3].notes == (
        f"column 'a' is null and was given to {function.__name__}() as empty text",
    )


def test_one_row_that_fails_is_one_fault_with_its_place_and_the_exception():
    def picky(examples):
        return {"text": [f"{1 / len(q)}" for q in examples["q"]]}

    def picky_with_one(row):
        return f"{1 / len(row['q'])}"

    rows = [*ROWS, Row({"q": "", "a": ""}, "f.jsonl", 4, 4)]
    for function in (picky, picky_with_one):
        found = list(apply_formatting(function, rows))
        assert [type(item) for item in found] == [Example, Example, Example, Fault]
        assert str(found[3]).startswith(
            f"f.jsonl:4: {function.__name__}() raised ZeroDivisionError"
        )
        assert found[3].excerpt == '{"q":"","a":""}'


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda row: None, "has no 'text'"),
        (lambda row: 3, "must be text, not number"),
        (lambda row: "", "is empty"),
        (lambda row: {"txt": "x"}, "must be text, not object"),
        (lambda row: [], "must be a list of turns"),
        (lambda rows: {"text": [None for _ in rows["q"]]}, "has no 'text'"),
        (lambda rows: rows["nothing"], "raised KeyError: 'nothing'"),
        (lambda row: [{"role": "user", "content": None}], "content must be text, not null"),
    ],
)
def test_a_result_that_is_no_example_is_a_fault(function, words):
    found = list(apply_formatting(function, ROWS))
    assert len(found) == 3
    assert all(isinstance(item, Fault) and words in item.reason for item in found)


def test_a_batch_with_too_few_results_is_not_misaligned():
    def drops(examples):
        return {"text": [q for q in examples["q"] if q != "q2"]}

    found = list(apply_formatting(drops, ROWS))
    assert [type(item) for item in found] == [Example, Fault, Example]
    assert "must return one text for each row, not 0 items" in found[1].reason


def test_a_function_is_loaded_from_a_file_or_a_module(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n"
        "def shape(row):\n    return row['q']\n"
    )
    assert load_formatting(f"{file}:shape")({"q": "x"}) == "x"
    assert load_formatting("json:dumps")(1) == "1"


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("mine.py", "must be file.py:function"),
        (":f", "must be file.py:function"),
        ("{}/mien.py:shape", "does not exist; did you mean '.*mine.py'"),
        ("{}/mine.py:shap", "has no function 'shap'; did you mean 'shape'"),
        ("{}/mine.py:NUMBER", "must be a function; got number"),
        ("{}/broken.py:f", "cannot be imported: SyntaxError"),
        ("{}/leaves.py:f", "cannot be imported: SystemExit: 3"),
        ("no_such_package.x:f", "cannot be imported: ModuleNotFoundError.*install its package"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_one_sentence(tmp_path, named, words):
    (tmp_path / "mine.py").write_text("NUMBER = 3\ndef shape(row):\n    return row['q']\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(InputError, match=words):
        load_formatting(named.format(tmp_path))
