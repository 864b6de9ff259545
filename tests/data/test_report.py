import json

import pytest

from whet.data.formats import Example
from whet.data.gates import check_gates
from whet.data.prepare import prepare
from whet.data.tokenize import collate, tokenize
from whet.errors import InputError
from whet.sections import DataSection


def conversation(question, answer):
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def save(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_only_the_answer_and_its_end_are_labelled(tokenizer):
    example = Example("x", tuple(conversation("red", "four")["messages"]))
    (tokens,) = tokenize(example, tokenizer, 100)
    learned = [i for i in tokens.labels if i != -100]
    assert tokenizer.decode(learned) == "four<|im_end|>"
    assert tokens.has_end and tokens.num_labels == len(learned)
    (all_of_it,) = tokenize(example, tokenizer, 100, loss_on="all")
    assert all_of_it.labels == all_of_it.input_ids


def test_a_cut_counts_what_was_lost(tokenizer):
    example = Example("x", tuple(conversation("red", "four into a number")["messages"]))
    (whole,) = tokenize(example, tokenizer, 1000)
    limit = len(whole.input_ids) - 4
    (cut,) = tokenize(example, tokenizer, limit)
    assert len(cut.input_ids) == limit and cut.num_truncated == 4
    assert cut.num_labels + cut.num_lost_labels == whole.num_labels
    assert not cut.has_end


def test_a_long_text_is_cut_into_windows_and_nothing_is_lost(tokenizer):
    text = "turn red into a colour " * 30
    windows = list(tokenize(Example("x", text=text), tokenizer, 16))
    assert all(len(w.input_ids) <= 16 for w in windows) and len(windows) > 3
    ids = [i for w in windows for i in w.input_ids]
    assert tokenizer.decode(ids) == text + "<|im_end|>"
    assert all(w.labels == w.input_ids for w in windows)


def test_a_batch_is_padded_outside_mask_and_labels(tokenizer):
    rows = [
        next(tokenize(Example("x", tuple(conversation("red", a)["messages"])), tokenizer, 99))
        for a in ("four", "four into a number")
    ]
    batch = collate(rows, pad_token_id=7)
    length = len(rows[0].input_ids)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, len(rows[1].input_ids))
    assert (batch["input_ids"][0, length:] == 7).all()
    assert not batch["attention_mask"][0, length:].any() and batch["attention_mask"][1].all()
    assert (batch["labels"][0, length:] == -100).all()


def test_every_row_is_accounted_for(tmp_path, tokenizer):
    rows = [conversation(f"red {n}", "four") for n in range(6)]
    rows += [rows[0], {"messages": [{"role": "user", "content": "no reply"}]}]
    rows += [conversation("red", "number " * 60), {"messages": 3}]
    section = DataSection(train=save(tmp_path / "a.jsonl", rows), on_bad_row="skip")
    report = prepare(section, tokenizer, 60).report
    train = report.train
    assert (train.rows_read, train.rows_refused, train.rows_without_labels) == (10, 1, 1)
    assert (train.duplicates, train.rows_truncated, train.rows_without_end) == (1, 1, 1)
    assert train.examples == 8 and train.longest == 60 and sum(train.lengths.values()) == 8
    assert train.tokens_lost > 0
    words = "\n".join(report.warnings())
    for part in ("could not be used", "nothing to learn", "were cut", "copies", "a.jsonl:10"):
        assert part in words


def test_faulty_rows_stop_the_run_and_all_are_told(tmp_path, tokenizer):
    rows = [conversation("x", "y"), {"messages": 3}, {"messages": []}, conversation("x", "z")]
    with pytest.raises(InputError, match="2 of 4 rows cannot be used") as caught:
        prepare(DataSection(train=save(tmp_path / "a.jsonl", rows)), tokenizer, 60)
    assert "a.jsonl:2" in str(caught.value) and "a.jsonl:3" in str(caught.value)


def test_a_run_that_would_learn_nothing_does_not_start(tmp_path, tokenizer):
    long = save(tmp_path / "a.jsonl", [conversation("red " * 100, "four")])
    with pytest.raises(InputError, match=r"longer than model\.max_length 32"):
        check_gates(prepare(DataSection(train=long), tokenizer, 32).report)
    silent = save(tmp_path / "b.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    with pytest.raises(InputError, match="no token would be learned"):
        check_gates(prepare(DataSection(train=silent), tokenizer, 32).report)
    with pytest.raises(InputError, match=r"data\.train is empty"):
        prepare(DataSection(), tokenizer, 32)


def test_held_out_rows_do_not_depend_on_the_order_and_copies_stay_together(tmp_path, tokenizer):
    rows = [conversation(f"say {n}", str(n)) for n in range(40)] * 2
    sides = []
    for order in (rows, rows[::-1]):
        section = DataSection(train=save(tmp_path / "a.jsonl", order), heldout_fraction=0.1)
        data = prepare(section, tokenizer, 60)
        sides.append({example.key for example in data.heldout_examples})
        assert len(data.heldout) == 8 and len(data.train) == 72
        assert data.report.overlap == 0
    assert sides[0] == sides[1]


def test_overlap_of_two_files_is_told(tmp_path, tokenizer):
    rows = [conversation(f"say {n}", str(n)) for n in range(4)]
    section = DataSection(
        train=save(tmp_path / "a.jsonl", rows), heldout=save(tmp_path / "b.jsonl", rows[:2])
    )
    report = prepare(section, tokenizer, 60).report
    assert report.overlap == 2
    assert "2 held-out rows are also in the training rows" in report.warnings()


def test_the_columns_map_is_checked(tmp_path, tokenizer):
    file = save(tmp_path / "a.jsonl", [{"question": "x", "reply": "y"}])
    good = DataSection(train=file, columns={"instruction": "question", "output": "reply"})
    assert prepare(good, tokenizer, 60).report.train.formats == ["alpaca"]
    bad = DataSection(train=file, columns={"instruction": "question", "output": "replay"})
    with pytest.raises(InputError, match="did you mean 'reply'"):
        prepare(bad, tokenizer, 60)
    unknown = DataSection(train=file, format="alpaca", columns={**good.columns, "answer": "reply"})
    with pytest.raises(InputError, match="names 'answer'"):
        prepare(unknown, tokenizer, 60)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "formats"),
    [
        ("alpaca_en_demo.json", "alpaca"),
        ("identity.json", "alpaca"),
        ("c4_demo.jsonl", "text"),
        ("wiki_demo.txt", "text"),
        ("tinyshakespeare.txt", "text"),
    ],
)
def test_real_files_are_read_whole(shared, tokenizer, name, formats):
    section = DataSection(train=str(shared / "data" / name), max_rows=50)
    train = prepare(section, tokenizer, 256).report.train
    assert train.formats == [formats] and train.rows_refused == 0 and train.tokens_learned > 0


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("truncated.json", "row 6, line 30, column 15"),
        ("bad_line_7.jsonl", "bad_line_7.jsonl:7: not JSON at column 59"),
        ("missing_column.csv", "needs column 'output'"),
        ("misspelt_column.csv", "did you mean 'ouput'"),
        ("short_row.csv", "short_row.csv:7: row 5 has 2 fields, 3 expected; 'output' is missing"),
        ("latin1.jsonl", "line 3, byte 97: not UTF-8; got 0xE9"),
        ("empty.jsonl", "is empty (0 bytes)"),
        ("null_fields.jsonl", "null_fields.jsonl:8: has no 'instruction', has no 'output'"),
        ("duplicate_keys.jsonl", "duplicate_keys.jsonl:4: key 'output' occurs twice"),
        ("mixed_types.jsonl", "mixed_types.jsonl:7: 'output' must be text, not object"),
        ("gzip_inside.jsonl", "is gzip"),
    ],
)
def test_bad_files_are_refused_by_name_and_place(shared, tokenizer, name, words):
    with pytest.raises(InputError) as caught:
        prepare(DataSection(train=str(shared / "data" / "bad" / name)), tokenizer, 256)
    assert words in str(caught.value)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "examples", "words"),
    [
        ("bom.jsonl", 6, None),
        ("bom.csv", 6, None),
        ("crlf.jsonl", 6, None),
        ("two_user_turns.jsonl", 6, "turns 1 and 2 are both 'user'"),
        ("ends_with_user.jsonl", 5, "no assistant turn"),
        ("long_row.jsonl", 6, "over the limit of 256"),
    ],
)
def test_awkward_files_are_read_and_what_is_odd_is_said(shared, tokenizer, name, examples, words):
    report = prepare(DataSection(train=str(shared / "data" / "bad" / name)), tokenizer, 256).report
    assert report.train.examples == examples
    assert words is None or words in "\n".join(report.warnings())
