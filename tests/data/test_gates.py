import json

import pytest

from whet.data.gates import check_gates, faults, require_method
from whet.data.prepare import prepare
from whet.errors import InputError
from whet.sections import DataSection

NO_END = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}"
    "{% endfor %}"
)


def row(question, answer):
    return {"instruction": question, "output": answer}


def report(tmp_path, tokenizer, rows, limit=64, heldout=None):
    section = {"train": str(tmp_path / "rows.jsonl"), "cache": False}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    if heldout is not None:
        (tmp_path / "held.jsonl").write_text("".join(json.dumps(r) + "\n" for r in heldout))
        section["heldout"] = str(tmp_path / "held.jsonl")
    return prepare(DataSection(**section), tokenizer, limit).report


def good(num):
    return [row(f"say {n}", f"{n}") for n in range(num)]


def masked(num):
    return [row("red " * 90 + str(n), "four") for n in range(num)]


@pytest.mark.parametrize(
    ("name", "rows", "heldout", "words"),
    [
        ("nothing_learned", masked(4), None, "all their answers lie beyond it; raise"),
        ("masked", good(18) + masked(2), None, "rows.jsonl:19 for one; raise model.max_length"),
        ("truncated", good(7) + [row(f"a {n}", "red " * 90) for n in range(3)], None, "3 of 10"),
        ("overlap", good(9), good(1), "1 of 1 held-out rows are training rows too"),
    ],
)
def test_a_gate_stops_the_run_and_can_be_let_pass(tmp_path, tokenizer, name, rows, heldout, words):
    found = report(tmp_path, tokenizer, rows, heldout=heldout)
    named = [each for each, _ in faults(found)]
    assert name in named
    with pytest.raises(InputError) as caught:
        check_gates(found, set(named) - {name})
    assert words in str(caught.value)
    if name != "nothing_learned":  # there the way out is another
        assert f"data.allow: [{name}]" in str(caught.value)
    check_gates(found, named)


def test_an_end_of_turn_that_is_never_learned_stops_the_run(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", NO_END)
    found = report(tmp_path, tokenizer, good(5))
    with pytest.raises(InputError, match="would not learn to stop"):
        check_gates(found)
    check_gates(found, ["no_end_of_turn"])


def test_gates_are_limits_and_not_switches(tmp_path, tokenizer):
    check_gates(report(tmp_path, tokenizer, good(19) + masked(1)))  # 5% exactly
    check_gates(report(tmp_path, tokenizer, good(8) + [row("a", "red " * 90)] * 2))  # 20% exactly


def test_several_faults_are_told_at_once(tmp_path, tokenizer):
    found = report(tmp_path, tokenizer, good(5) + masked(5), heldout=good(2))
    with pytest.raises(InputError) as caught:
        check_gates(found)
    for words in ("[masked]", "[truncated]", "[overlap]"):
        assert words in str(caught.value)


def test_pairs_are_not_trained_on_as_answers(tmp_path, tokenizer):
    pairs = [{"prompt": f"say {n}", "chosen": str(n), "rejected": "no"} for n in range(3)]
    found = report(tmp_path, tokenizer, pairs)
    assert found.train.formats == ["preference"] and found.train.examples == 6
    with pytest.raises(InputError, match="pairs of answers, which method 'sft'"):
        require_method("sft", found)
    require_method("dpo", found)
