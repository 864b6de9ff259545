import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from whet.data.sources import Fault, Row, read_rows
from whet.errors import InputError


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


ROWS = [{"text": "one"}, {"text": "two\nlines, and a comma"}, {"text": "عربي"}]


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    files = [
        write(tmp_path / "a.jsonl", "\n".join(json.dumps(r) for r in ROWS) + "\n"),
        write(tmp_path / "a.json", json.dumps(ROWS, indent=1)),
        write(tmp_path / "a.csv", 'text\none\n"two\nlines, and a comma"\nعربي\n'),
        write(tmp_path / "a.tsv", 'text\none\n"two\nlines, and a comma"\nعربي\n'),
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for file in [*files, str(tmp_path / "a.parquet")]:
        rows = list(read_rows(file))
        assert [row.values for row in rows] == ROWS, file
        assert [row.number for row in rows] == [1, 2, 3]


def test_a_text_file_is_one_document_or_one_a_line(tmp_path):
    file = write(tmp_path / "a.txt", "one\n\ntwo\n")
    assert [row.values["text"] for row in read_rows(file)] == ["one\n\ntwo\n"]
    assert [(row.values["text"], row.line) for row in read_rows(file, "line")] == [
        ("one", 1),
        ("two", 3),
    ]


def test_byte_order_mark_and_carriage_returns_vanish(tmp_path):
    file = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "x"}\r\n{"text": "y"}\r\n')
    assert [row.values for row in read_rows(file)] == [{"text": "x"}, {"text": "y"}]
    file = write(tmp_path / "a.csv", b"\xef\xbb\xbftext\r\nx\r\n")
    assert [row.values for row in read_rows(file)] == [{"text": "x"}]


def test_a_bad_line_is_a_fault_with_its_place_and_the_others_are_read(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"a": 1}\n\n{"a" 2}\n[3]\n{"a": 1, "a": 2}\n{"a": 4}\n')
    items = list(read_rows(file))
    assert [type(item) for item in items] == [Row, Fault, Fault, Fault, Row]
    assert str(items[1]).startswith("a.jsonl:3: not JSON at column 6")
    assert "not list" in str(items[2])
    assert "key 'a' occurs twice" in str(items[3])


def test_a_short_csv_row_names_its_own_line_after_a_quoted_break(tmp_path):
    file = write(tmp_path / "a.csv", 'q,a\n"x\ny",1\nz\n')
    items = list(read_rows(file))
    assert items[0].line == 2
    assert str(items[1]) == "a.csv:4: row 2 has 1 fields, 2 expected; 'a' is missing"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", '[{"a": 1},\n{"a": "tw', "row 2, line 2, column 7: the file or line ends"),
        ("a.json", '[{"a": 1}', "row 1, line 1, column 10"),
        ("a.json", '{"a": 1}', "must hold a JSON array"),
        ("a.json", "[]", "holds no rows"),
        ("a.jsonl", b"", r"is empty \(0 bytes\)"),
        ("a.jsonl", b" \n", "is empty"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}', "line 2, byte 8: not UTF-8; got 0xE9"),
        ("a.jsonl", gzip.compress(b"{}"), "is gzip"),
        ("a.csv", "q,a\n", "a header and no rows"),
        ("a.parquet", b"nonsense", "not readable parquet"),
        ("a.docx", b"x", "suffix whet does not read"),
    ],
)
def test_an_unreadable_file_is_one_sentence(tmp_path, name, content, words):
    with pytest.raises(InputError, match=words) as caught:
        list(read_rows(write(tmp_path / name, content)))
    assert name in str(caught.value)


def test_a_missing_file_suggests_its_neighbour(tmp_path):
    write(tmp_path / "train.jsonl", "{}")
    with pytest.raises(InputError, match=r"did you mean '.*train\.jsonl'"):
        list(read_rows(str(tmp_path / "trian.jsonl")))
    with pytest.raises(InputError, match="is a folder"):
        list(read_rows(str(tmp_path)))


@pytest.mark.parametrize(("source", "split"), [("org/rows", "train"), ("org/rows:test", "test")])
def test_a_hub_dataset_is_read_by_id_and_split(monkeypatch, source, split):
    import datasets

    asked = []

    def load(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = list(read_rows(source))
    assert asked == [("org/rows", split)]
    assert [row.values for row in rows] == ROWS and rows[1].where == f"{source} row 2"


def test_a_dataset_that_the_hub_does_not_give_is_one_sentence(monkeypatch):
    import datasets

    def load(name, split):
        raise ConnectionError("Couldn't reach 'org/rows' on the Hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(InputError, match="neither a file here nor a dataset") as caught:
        list(read_rows("org/rows"))
    assert "second line" not in str(caught.value)
