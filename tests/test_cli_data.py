"""`whet data` as a person uses it, and what its page and its terminal output show."""

import io
import json
import sys

import pytest
from rich.console import Console

from whet.cli import main
from whet.data.prepare import prepare
from whet.data.tokenize import Tokens
from whet.data_view import SHOWN_TOKENS, choose_rows, print_report, show_row, to_html
from whet.sections import DataSection


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def rows_of(num):
    return [{"instruction": f"say {n}", "output": f"<b>{n}</b>"} for n in range(num)]


@pytest.fixture
def told(capsys, monkeypatch, tiny_model):
    def run(*arguments):
        words = ["whet", "data", *map(str, arguments), "--model", str(tiny_model)]
        monkeypatch.setattr(sys, "argv", words)
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        found = capsys.readouterr()
        assert "Traceback" not in found.err
        return code, found.out, found.err

    return run


def test_a_file_alone_is_reported(told, tmp_path):
    code, out, _ = told(write(tmp_path / "a.jsonl", rows_of(30)))
    assert code == 0 and "a.jsonl: alpaca" in out and "rows read" in out
    assert "Nothing here keeps a run from starting" in out
    assert "a.jsonl:1: " in out and "<b>0</b><|im_end|>" in out


def test_a_config_and_json_data_are_told_apart(told, tmp_path):
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows_of(4)))
    assert "rows.json: alpaca" in told(data)[1]
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"data": {"train": "rows.json", "heldout_fraction": 0.25}}))
    code, out, _ = told(config)
    assert code == 0 and "held out" in out
    lone = tmp_path / "lone.json"
    lone.write_text(json.dumps(rows_of(1)[0]))
    code, _, err = told(lone)
    assert code == 2 and "lone.json" in err


def test_a_fault_is_told_after_the_report_and_exits_2(told, tmp_path):
    file = write(tmp_path / "a.jsonl", [{"instruction": "red " * 200, "output": "four"}] * 3)
    code, out, err = told(file, "--set", "model.max_length=64")
    assert code == 2 and "rows read" in out and "all their answers lie beyond it" in err
    assert "Nothing here keeps" not in out
    code, out, err = told(file, "--set", "model.max_length=64", "--json")
    (fault,) = json.loads(out)["faults"]
    assert code == 2 and fault["name"] == "nothing_learned" and not fault["allowed"]


def test_rows_that_are_skipped_are_counted_and_listed(told, tmp_path):
    rows = [*rows_of(9), {"instruction": "x", "output": 5}]
    file = write(tmp_path / "a.jsonl", rows)
    code, _, err = told(file)
    assert code == 2 and "a.jsonl:10: 'output' must be text, not number" in err
    code, out, _ = told(file, "--set", "data.on_bad_row=skip", "--json")
    report = json.loads(out)
    assert code == 0 and report["train"]["rows_refused"] == 1
    assert report["train"]["refused"] == [
        "a.jsonl:10: 'output' must be text, not number; fill it in, put quotes round it, or remove "
        "the row"
    ]


def test_json_has_the_rows_with_what_is_learned(told, tmp_path):
    _, out, _ = told(write(tmp_path / "a.jsonl", rows_of(30)), "--json", "--rows", "2")
    rows = json.loads(out)["rows"]
    assert len(rows) in (2, 3)
    learned = [p["text"] for p in rows[0]["pieces"] if p["learned"]]
    assert learned == ["<b>0</b><|im_end|>"]


def test_the_page_is_whole_and_escaped(told, tmp_path):
    page = tmp_path / "page.html"
    code, _, _ = told(write(tmp_path / "a.jsonl", rows_of(30)), "--html", page)
    text = page.read_text()
    assert code == 0 and "<mark>&lt;b&gt;0&lt;/b&gt;&lt;|im_end|&gt;</mark>" in text
    assert "<b>0</b>" not in text and "http" not in text and "<script" not in text
    assert text.count("<div class=row") >= 3
    code, _, err = told(tmp_path / "a.jsonl", "--html", tmp_path / "none" / "page.html")
    assert code == 2 and "cannot be written" in err


def test_terminal_lines_are_never_cut_and_learned_text_stands_out(tmp_path, tokenizer):
    rows = [{"instruction": "red " * 60, "output": "four into a number " * 20}]
    file = write(tmp_path / "a.jsonl", rows)
    prepared = prepare(DataSection(train=str(file), cache=False), tokenizer, 1000)
    out = Console(file=io.StringIO(), width=60, soft_wrap=True, force_terminal=True)
    shown = [show_row(prepared.train[0], tokenizer)]
    assert None not in shown[0].pieces
    print_report(out, prepared.report, shown, [])
    text = out.file.getvalue()
    assert ("red " * 60).strip() in text and ("four into a number " * 20).strip() in text
    assert "\x1b[1;32mfour into" in text  # bold and green


def test_a_long_row_is_shown_from_both_ends(tokenizer):
    ids = tokenizer("turn red into a colour and four into a number " * 60)["input_ids"]
    tokens = Tokens(ids, [-100] * (len(ids) - 2) + ids[-2:], "x:1")
    shown = show_row(tokens, tokenizer)
    assert shown.pieces.count(None) == 1 and "middle is left out" in shown.title
    half = SHOWN_TOKENS // 2
    texts = [p[0] for p in shown.pieces if p]
    assert texts[0] == tokenizer.decode(ids[:half])
    assert shown.pieces[-1] == (tokenizer.decode(ids[-2:]), True)


def test_the_rows_shown_are_the_first_the_last_and_the_longest(tmp_path, tokenizer):
    rows = rows_of(9)
    rows[3]["output"] = "four " * 30
    section = DataSection(train=str(write(tmp_path / "a.jsonl", rows)), cache=False)
    prepared = prepare(section, tokenizer, 200)
    places = [row.title.partition(": ")[0] for row in choose_rows(prepared, tokenizer)]
    assert places == ["a.jsonl:1", "a.jsonl:4", "a.jsonl:9"]
    assert choose_rows(prepared, tokenizer, 0) == []


def test_characters_of_several_tokens_are_whole_in_the_rows_shown(tokenizer, tmp_path):
    rows = [{"instruction": "السلام عليكم", "output": "وعليكم 🌿"}]
    file = write(tmp_path / "a.jsonl", rows)
    prepared = prepare(DataSection(train=str(file), cache=False), tokenizer, 400)
    (shown,) = choose_rows(prepared, tokenizer, 1)
    assert ("وعليكم 🌿<|im_end|>", True) in shown.pieces
    page = to_html(prepared.report, [shown], [])
    assert "وعليكم 🌿" in page and "dir=auto" in page and "\ufffd" not in page
