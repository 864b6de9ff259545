"""Conversations on the terminal."""

import io
import json
import sys

import pytest

from whet import chat
from whet.config_file import load_config
from whet.data.template import render_prompt
from whet.errors import InputError
from whet.generate import Sampling, generate
from whet.prompts import read_prompts
from whet.train.recipe import LogListener, fit
from whet.trained import load_trained

SAMPLING = Sampling(max_new_tokens=8)


@pytest.fixture(scope="module", params=["lora", "full"])
def tuned(request, tiny_model, rows_file, tmp_path_factory):
    config = load_config({
        "run": {"name": "talk", "dir": str(tmp_path_factory.mktemp("runs"))},
        "model": {"name": str(tiny_model), "dtype": "float32"},
        "data": {"train": str(rows_file), "heldout_fraction": 0.2, "system": "be brief"},
        "train": {"batch_size": 4, "max_steps": 6, "learning_rate": 2e-2, "warmup_steps": 0,
                  "parameters": request.param},
        "eval": {"samples": 0},
    })  # fmt: skip
    return load_trained(str(fit(config, listener=LogListener()).path))


@pytest.fixture
def talk(monkeypatch, capsys):
    def run(loaded, *lines, system=None, compare=False):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        chat.talk(loaded, SAMPLING, system, compare)
        return capsys.readouterr()

    return run


def answer(loaded, turns):
    prompt = render_prompt(loaded.tokenizer, turns)
    return generate(loaded.model, loaded.tokenizer, [prompt], SAMPLING)[0].text


def test_base_and_tuned_answer_side_by_side_each_with_its_own_history(tuned, talk, tmp_path):
    told = talk(tuned, "say red", "and blue", f"/save {tmp_path / 'rows.jsonl'}", compare=True)
    (row,) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    turns = [{"role": "system", "content": "be brief"}]
    base_turns = list(turns)
    for question in ("say red", "and blue"):
        for history, model in ((base_turns, "base"), (turns, "tuned")):
            history.append({"role": "user", "content": question})
            if model == "base":
                with tuned.base() as live:
                    prompt = render_prompt(tuned.tokenizer, history)
                    text = generate(live, tuned.tokenizer, [prompt], SAMPLING)[0].text
            else:
                text = answer(tuned, history)
            assert f"[{model}]\n{chat.Lines(False).push(text)}" in told.out
            history.append({"role": "assistant", "content": text.strip()})
    assert row["messages"] == turns and base_turns != turns


def test_a_saved_conversation_is_a_row_to_train_on(tuned, talk, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"messages": []}')  # without a newline at its end
    told = talk(tuned, "say red", f"/save {file}", "/reset", "say blue", f"/save {file}", "/save")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [len(row["messages"]) for row in rows] == [0, 3, 3]
    assert [row["messages"][1]["content"] for row in rows[1:]] == ["say red", "say blue"]
    assert "/save needs a file's name" in told.err
    assert "not saved" in talk(tuned, f"/save {tmp_path}/no/such/folder.jsonl").err


def test_system_prompts_can_be_changed_and_left_out(tuned, talk, tmp_path):
    file = tmp_path / "rows.jsonl"
    save = f"/save {file}"
    talk(tuned, "a", save, "/system be long", "a", save, "/reset", save, "/system", "a", save)
    rows = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    assert rows[0][0] == {"role": "system", "content": "be brief"}
    assert rows[1][0] == {"role": "system", "content": "be long"}
    assert rows[2] == [{"role": "system", "content": "be long"}]
    assert rows[3][0]["role"] == "user"


def test_unknown_commands_are_told_and_paths_are_asked(tuned, talk):
    told = talk(tuned, "/rest", "/etc/passwd is what?", "/exit", "say red")
    assert "did you mean /reset?" in told.err
    assert told.err.count("there is no command") == 1 and told.out.count("\n") >= 1


def test_a_conversation_that_outgrows_the_model_goes_on_after_a_reset(tuned, talk):
    told = talk(tuned, "red " * 300, "say red")
    assert "/reset starts anew" in told.err and "256 tokens" in told.err
    assert told.err.count("anew") == 1 and told.out.count("\n") >= 2  # the second was answered


def test_a_plain_model_has_nothing_to_compare_with(tiny_model, talk):
    with pytest.raises(InputError, match="--compare needs a run"):
        talk(load_trained(str(tiny_model)), "a", compare=True)


def test_columns_hold_both_answers(monkeypatch):
    from rich.console import Console

    from whet import terminal

    out = Console(file=io.StringIO(), force_terminal=True, width=60, color_system=None)
    monkeypatch.setattr(terminal, "console", lambda: out)
    with terminal.answer_columns(["base", "tuned"]) as show:
        show({"base": "one", "tuned": ""})
        show({"base": "one two", "tuned": "مرحبا."})
    written = out.file.getvalue()
    assert "base" in written and "tuned" in written
    assert any("one two" in line and "\u2068مرحبا.\u2069" in line for line in written.splitlines())


def test_prompts_come_from_text_and_json_lines(tmp_path):
    text, rows = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text("one\n\n  two\n")
    assert read_prompts(text) == ["one", "  two"]
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    lines = ['"one"', '{"prompt": "two"}', json.dumps({"messages": turns}), ""]
    rows.write_text("\n".join(lines))
    assert read_prompts(rows) == ["one", "two", turns[:1]]
    rows.write_text('{"text": 1}\n[]\nnot json\n"fine"')
    with pytest.raises(InputError) as caught:
        read_prompts(rows)
    assert all(f"line {number}" in str(caught.value) for number in (1, 2, 3))
    with pytest.raises(InputError, match="cannot be read"):
        read_prompts(tmp_path / "no.txt")
