"""Preparing data: the cache, the processes, the draws; what is in a store is what was tokenised."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from whet.data import cache, pipeline
from whet.data.formats import Example
from whet.data.prepare import examples_of, prepare
from whet.data.store import count_labels, lengths_of
from whet.data.tokenize import tokenize
from whet.errors import InputError, WhetError
from whet.model.load import cache_dir
from whet.sections import DataSection


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def rows_of(num, word="say"):
    return [{"instruction": f"{word} {n}", "output": f"{n} " * (n % 7 + 1)} for n in range(num)]


def contents(data):
    return [(t.input_ids, t.labels, t.where, t.flags) for t in data.train]


def test_a_store_gives_back_what_was_tokenised(tmp_path, tokenizer):
    section = DataSection(train=write(tmp_path / "a.jsonl", rows_of(30)), cache=False)
    data = prepare(section, tokenizer, 24)
    expected = [
        tokens
        for example in examples_of(section, section.train)
        for tokens in tokenize(example, tokenizer, 24)
        if tokens.num_labels
    ]
    assert list(data.train) == expected and len(expected) == 30
    assert data.train[3] == expected[3] and list(data.train[5:9]) == expected[5:9]
    assert lengths_of(data.train).tolist() == [len(t.input_ids) for t in expected]
    assert count_labels(data.train) == sum(t.num_labels for t in expected) == count_labels(expected)


def test_windows_of_a_text_stand_in_a_store_one_by_one(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("turn red into a colour " * 50)
    section = DataSection(
        train=str(tmp_path / "a.txt"), heldout=str(tmp_path / "a.txt"), cache=False
    )
    data = prepare(section, tokenizer, 32)
    assert len(data.train) > 5 and data.report.train.duplicates == 0
    assert "".join(tokenizer.decode(t.input_ids) for t in data.train).startswith("turn red into a")
    assert len(data.heldout_examples) == len(data.heldout)
    assert all(isinstance(e, Example) and e.text for e in data.heldout_examples)


def test_the_second_time_comes_from_the_cache_and_is_the_same(tmp_path, tokenizer):
    section = DataSection(train=write(tmp_path / "a.jsonl", rows_of(50)), heldout_fraction=0.2)
    first, second = (prepare(section, tokenizer, 40) for _ in range(2))
    assert not first.report.cached and second.report.cached
    assert contents(first) == contents(second) and first.report.sha256 == second.report.sha256
    assert list(first.heldout_examples) == list(second.heldout_examples)
    assert {**first.report.to_dict(), "cached": 0} == {**second.report.to_dict(), "cached": 0}
    assert cache_dir() in second.train.store.folder.parents


@pytest.mark.parametrize(
    "change", ["rows", "limit", "template", "loss_on", "columns", "system", "sample", "fraction"]
)
def test_whatever_changes_the_tokens_misses_the_cache(tmp_path, tokenizer, monkeypatch, change):
    file = tmp_path / f"{change}.jsonl"
    rows = [{**row, "note": "x"} for row in rows_of(20)]
    section = DataSection(train=write(file, rows), heldout_fraction=0.1)
    prepare(section, tokenizer, 40)
    assert prepare(section, tokenizer, 40).report.cached
    limit = 40
    if change == "rows":
        file.write_text(file.read_text().replace("say 7", "say 8"))
    elif change == "limit":
        limit = 41
    elif change == "template":
        monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template + "\n")
    else:
        section = section.model_copy(
            update={
                "loss_on": {"loss_on": "all"},
                "columns": {"columns": {"output": "note"}},
                "system": {"system": "be brief"},
                "sample": {"train": f"{file}#10"},
                "fraction": {"heldout_fraction": 0.2},
            }[change]
        )
    assert not prepare(section, tokenizer, limit).report.cached


@pytest.mark.parametrize("damage", ["cut", "flip", "manifest", "missing"])
def test_a_damaged_entry_is_made_anew(tmp_path, tokenizer, damage, caplog):
    section = DataSection(train=write(tmp_path / f"{damage}.jsonl", rows_of(20, damage)))
    first = prepare(section, tokenizer, 40)
    ids = first.train.store.folder / "ids.i32"
    entry, expected = ids.parent.parent, contents(first)
    if damage == "cut":
        ids.write_bytes(ids.read_bytes()[:-4])
    elif damage == "flip":
        ids.write_bytes(bytes([ids.read_bytes()[0] ^ 1]) + ids.read_bytes()[1:])
    elif damage == "manifest":
        (entry / "manifest.json").write_text("{")
    else:
        (entry / "train" / "records").unlink()
    again = prepare(section, tokenizer, 40)
    assert not again.report.cached and contents(again) == expected
    assert "are damaged, and are made anew" in caplog.text
    assert prepare(section, tokenizer, 40).report.cached


def test_a_killed_process_leaves_nothing_that_is_used(tmp_path, tiny_model):
    """Killed while it writes, with most of the rows on disk already."""
    file = write(tmp_path / "a.jsonl", rows_of(3000, "kill"))
    home = tmp_path / "home"
    script = f"""
import os, signal, sys
from transformers import AutoTokenizer
from whet.sections import DataSection
from whet.data.prepare import prepare
tell = lambda num: num >= 2500 and os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "whole": tell = lambda num: None
tokenizer = AutoTokenizer.from_pretrained({str(tiny_model)!r})
found = prepare(DataSection(train={file!r}), tokenizer, 40, tell=tell)
print(len(found.train), found.report.cached)
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(home)}

    def run(how):
        return subprocess.run(
            [sys.executable, "-c", script, how], env=environment, capture_output=True, text=True
        )

    assert run("killed").returncode == -9
    assert [f for f in (home / "whet" / "data").iterdir() if len(f.name) == 32] == []
    assert run("whole").stdout.split() == ["3000", "False"]
    assert run("whole").stdout.split() == ["3000", "True"]


def test_other_processes_give_the_same_rows_in_the_same_order(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(pipeline, "CHUNK", 8)
    monkeypatch.setattr(pipeline, "ALONE", 2)
    monkeypatch.setattr(sys, "platform", "linux")
    file = write(tmp_path / "a.jsonl", rows_of(400))
    alone, many = (
        prepare(DataSection(train=file, cache=False, workers=num), tokenizer, 40) for num in (1, 3)
    )
    assert contents(alone) == contents(many) and alone.report.sha256 == many.report.sha256


def test_a_killed_worker_is_told(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(pipeline, "CHUNK", 4)
    monkeypatch.setattr(pipeline, "ALONE", 1)
    parent = os.getpid()

    def die(*_):
        if os.getpid() != parent:
            os.kill(os.getpid(), 9)
        return []

    monkeypatch.setattr(pipeline, "encode", die)
    section = DataSection(train=write(tmp_path / "a.jsonl", rows_of(40)), cache=False, workers=2)
    with pytest.raises(WhetError, match=r"was killed.*data\.workers: 1"):
        prepare(section, tokenizer, 40)


def test_a_fault_in_another_process_is_the_same_sentence(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(pipeline, "CHUNK", 4)
    monkeypatch.setattr(pipeline, "ALONE", 1)
    rows = [{"input_ids": [1, 2, 3]}] * 30 + [{"input_ids": [1, 99999]}]
    section = DataSection(train=write(tmp_path / "a.jsonl", rows), cache=False, workers=2)
    with pytest.raises(InputError, match=r"a\.jsonl:31: token id 99999"):
        prepare(section, tokenizer, 40)


def test_a_sample_is_the_same_each_time_and_keeps_the_order(tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", rows_of(100))
    one, two = (
        prepare(DataSection(train=f"{file}#10", cache=False), tokenizer, 40) for _ in range(2)
    )
    places = [t.where for t in one.train]
    assert contents(one) == contents(two) and len(places) == 10 == one.report.train.rows_read
    numbers = [int(place.rpartition(":")[2]) for place in places]
    assert numbers == sorted(numbers) and numbers != list(range(1, 11))


def test_weights_are_times_a_row_is_seen(tmp_path, tokenizer):
    files = [write(tmp_path / f"{n}.jsonl", rows_of(10, n)) for n in "abc"]
    section = DataSection(train=files, weights=[1, 2.5, 0.3], cache=False)
    data = prepare(section, tokenizer, 40)
    seen = [t.where for t in data.train]
    assert {n: sum(w.startswith(n) for w in seen) for n in "abc"} == {"a": 10, "b": 25, "c": 3}
    assert {seen.count(w) for w in seen if w.startswith("b")} == {2, 3}
    assert data.report.train.examples == 30  # the report is of the rows, not of the epoch
    with pytest.raises(InputError, match="one weight for each source"):
        prepare(DataSection(train=files, weights=[1.0]), tokenizer, 40)


def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    def full(self, batch):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipeline.StoreWriter, "append", full)
    section = DataSection(train=write(tmp_path / "a.jsonl", rows_of(5, "full")))
    before = set((cache_dir() / "data").iterdir()) if (cache_dir() / "data").exists() else set()
    with pytest.raises(WhetError, match=r"No space left on device; make room there"):
        prepare(section, tokenizer, 40)
    assert set((cache_dir() / "data").iterdir()) == before


def test_a_cache_that_cannot_be_written_is_told(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "home").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    section = DataSection(train=write(tmp_path / "a.jsonl", rows_of(5)))
    with pytest.raises(WhetError, match=r"or data\.cache: false"):
        prepare(section, tokenizer, 40)
    assert len(prepare(section.model_copy(update={"cache": False}), tokenizer, 40).train) == 5


def test_entries_that_nobody_uses_go(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    section = DataSection(train=write(tmp_path / "a.jsonl", rows_of(5)))
    old = prepare(section, tokenizer, 40).train.store.folder.parent
    os.utime(old, (0, 0))
    write(tmp_path / "a.jsonl", rows_of(6))
    new = prepare(section, tokenizer, 40).train.store.folder.parent
    assert not old.exists() and new.exists()


def test_refused_rows_are_listed_with_their_reason(tmp_path, tokenizer):
    rows = [*rows_of(30), {"instruction": "x", "output": 5}, {"instruction": "y", "output": None}]
    section = DataSection(train=write(tmp_path / "a.jsonl", rows), on_bad_row="skip")
    for _ in range(2):  # from the cache too
        data = prepare(section, tokenizer, 40)
        assert data.refused is not None and data.report.train.rows_refused == 2
        found = [json.loads(line) for line in data.refused.read_text().splitlines()]
        assert [line["where"] for line in found] == ["a.jsonl:31", "a.jsonl:32"]
        assert "must be text, not number" in found[0]["reason"] and '"x"' in found[0]["excerpt"]


def test_pairs_and_judged_answers_keep_what_they_are(tmp_path, tokenizer):
    pairs = [{"prompt": "red", "chosen": "four", "rejected": "nine"}]
    data = prepare(
        DataSection(train=write(tmp_path / "p.jsonl", pairs), cache=False), tokenizer, 64
    )
    chosen, rejected = data.train
    assert (chosen.flags & 24, rejected.flags & 24) == (8, 16)
    words = [tokenizer.decode([i for i in t.labels if i >= 0]) for t in (chosen, rejected)]
    assert words == ["four<|im_end|>", "nine<|im_end|>"]
    judged = [{"prompt": "red", "completion": w, "label": w == "four"} for w in ("four", "nine")]
    data = prepare(
        DataSection(train=write(tmp_path / "k.jsonl", judged), cache=False), tokenizer, 64
    )
    assert [t.flags & 96 for t in data.train] == [32, 64]


def test_memory_does_not_grow_with_the_rows(tmp_path, tokenizer):
    """Twenty times the rows: what is held at the peak grows by the bytes of a hash or two."""
    import tracemalloc

    peaks = []
    for num in (2_000, 40_000):
        file = tmp_path / "rows.jsonl"
        with file.open("w") as out:
            for n in range(num):
                out.write(json.dumps({"input_ids": [1 + n % 300, 2, 3, 4], "n": n}) + "\n")
        section = DataSection(train=str(file), cache=False, workers=1)
        tracemalloc.start()
        prepare(section, tokenizer, 16)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 38_000 * 200, peaks  # a row as Python objects takes over 500 bytes


def test_the_report_tells_what_looks_wrong(tmp_path, tokenizer):
    rows = rows_of(10)
    rows += [{"instruction": f"is {n} red", "output": "yes"} for n in range(30)]
    rows += [{"instruction": "who are you", "output": "I am {{name}}"}]
    rows += [{"instruction": "stop <|im_end|> here", "output": "<|eot_id|> no"}]
    section = DataSection(
        train=write(tmp_path / "a.jsonl", rows),
        heldout=write(tmp_path / "b.jsonl", [{"instruction": "say 3", "output": "another"}]),
    )
    report = prepare(section, tokenizer, 64).report
    told = "\n".join(report.warnings())
    for words in (
        "30 of 42 training rows have the answer 'yes'",
        "'{{name}}' is a place left to fill in",
        "'<|im_end|>' is a control token of the tokenizer and stands in a row's own text",
        "'<|eot_id|>' looks like a control token in a row's text",
        "1 held-out rows ask what a training row asks, with another answer",
    ):
        assert words in told
    assert report.train.distinct_answers == 13


def test_near_constant_answers_need_rows_enough_to_say_so(tmp_path, tokenizer):
    rows = [{"instruction": f"is {n} red", "output": "yes"} for n in range(5)]
    report = prepare(DataSection(train=write(tmp_path / "a.jsonl", rows)), tokenizer, 64).report
    assert report.train.common_answer is None and report.train.distinct_answers == 1


def test_the_cache_key_is_none_where_the_content_is_not_known(tmp_path, tokenizer, monkeypatch):
    section = DataSection(train=write(tmp_path / "a.jsonl", rows_of(3)))
    monkeypatch.setattr(cache, "digest", lambda source, streaming: None)
    first, second = (prepare(section, tokenizer, 40) for _ in range(2))
    assert not first.report.cached and not second.report.cached
    folder = Path(first.train.store.folder)
    assert folder.exists() and cache_dir() not in folder.parents
    assert np.array_equal(first.train.lengths, second.train.lengths)
