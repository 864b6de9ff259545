import gzip
import json
import tracemalloc

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from whet.data import readers
from whet.data.readers import read_file
from whet.data.rows import Fault, Row, excerpt_of
from whet.errors import InputError


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


ROWS = [{"text": "one"}, {"text": "two\nlines, and a comma"}, {"text": "عربي 😀"}]
LINES = "\n".join(json.dumps(row) for row in ROWS) + "\n"
TABLE = 'text\none\n"two\nlines, and a comma"\nعربي 😀\n'


def save_tables(folder):
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    pyarrow.feather.write_feather(table, folder / "a.feather")
    with pyarrow.ipc.new_stream(folder / "stream.arrow", table.schema) as stream:
        stream.write_table(table)
    with pyarrow.ipc.new_file(folder / "file.arrow", table.schema) as file:
        file.write_table(table)
    return [folder / n for n in ("a.parquet", "a.feather", "stream.arrow", "file.arrow")]


@pytest.mark.parametrize("piece_bytes", [1, 7, 1 << 20])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr(readers, "_PIECE_BYTES", piece_bytes)
    contents = {
        "a.jsonl": LINES, "a.json": json.dumps(ROWS, indent=1), "a.csv": TABLE, "a.tsv": TABLE,
        "b.json": json.dumps(ROWS, ensure_ascii=False),
    }  # fmt: skip
    files = [write(tmp_path / name, content) for name, content in contents.items()]
    files += [
        write(tmp_path / f"{name}.gz", gzip.compress(content.encode()))
        for name, content in contents.items()
    ]
    for file in [*files, *save_tables(tmp_path)]:
        rows = list(read_file(file))
        assert [row.values for row in rows] == ROWS, file
        assert [row.number for row in rows] == [1, 2, 3]
        assert {row.file for row in rows} == {file.name}


def test_a_text_file_is_one_document_or_one_a_line(tmp_path):
    for name in ("a.txt", "a.md", "a.markdown"):
        file = write(tmp_path / name, "one\n\ntwo\n")
        assert [row.values["text"] for row in read_file(file)] == ["one\n\ntwo\n"]
        lines = [(row.values["text"], row.number, row.line) for row in read_file(file, "x", "line")]
        assert lines == [("one", 1, 1), ("two", 2, 3)]
    packed = write(tmp_path / "b.md.gz", gzip.compress(b"one\r\ntwo"))
    assert [row.values["text"] for row in read_file(packed)] == ["one\ntwo"]


@pytest.mark.parametrize("piece_bytes", [1, 2, 5, 1 << 20])
def test_byte_order_mark_and_carriage_returns_vanish(tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr(readers, "_PIECE_BYTES", piece_bytes)
    file = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "x"}\r\n{"text": "y"}\r\n')
    assert [row.values for row in read_file(file)] == [{"text": "x"}, {"text": "y"}]
    file = write(tmp_path / "a.csv", b'\xef\xbb\xbftext\r\n"x\r\ny"\r\n')
    assert [row.values for row in read_file(file)] == [{"text": "x\ny"}]
    file = write(tmp_path / "a.json", b'\xef\xbb\xbf[\r\n{"text": "x"}\r\n]\r\n')
    assert [(row.values, row.line) for row in read_file(file)] == [({"text": "x"}, 2)]


def test_a_bad_line_is_a_fault_with_its_place_and_the_others_are_read(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"a": 1}\n\n  {"a" 2}\n[3]\n{"a": 1, "a": 2}\n{"a": 4} 5\n')
    items = list(read_file(file))
    assert [type(item) for item in items] == [Row, Fault, Fault, Fault, Fault]
    assert str(items[1]).startswith("a.jsonl:3: not JSON at column 8")
    assert "not list" in str(items[2])
    assert "key 'a' occurs twice" in str(items[3])
    assert "column 10: more text after the object" in str(items[4])
    assert items[1].excerpt == '{"a" 2}'


BAD_VALUES = [
    ('{"a": NaN}', "NaN is not JSON"),
    ('{"a": [-Infinity]}', "-Infinity is not JSON"),
    ('{"a": "\\ud800"}', "half of a surrogate pair"),
    ('{"\\udfff": 1}', "half of a surrogate pair"),
    ('{"a": 1, "a": 2}', "key 'a' occurs twice"),
]


@pytest.mark.parametrize(("value", "words"), BAD_VALUES)
def test_what_python_lets_pass_and_json_or_a_tokenizer_does_not_is_a_fault(tmp_path, value, words):
    good = '{"a": "\\ud83d\\ude00"}'
    lines = list(read_file(write(tmp_path / "a.jsonl", f"{good}\n{value}\n{good}\n")))
    array = list(read_file(write(tmp_path / "a.json", f"[{good},\n{value},\n{good}]")))
    for items in (lines, array):
        assert [type(item) for item in items] == [Row, Fault, Row]
        assert words in items[1].reason and items[1].where.endswith(":2")
        assert items[0].values == {"a": "😀"}


@pytest.mark.parametrize("value", ["[" * 100_000, '{"a":' * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_json_that_python_cannot_hold_is_a_fault(tmp_path, value):
    (fault,) = read_file(write(tmp_path / "a.jsonl", f" {value}"))
    assert isinstance(fault, Fault) and len(fault.excerpt) == 120
    with pytest.raises(InputError, match=r"a\.json', row 1, line 2"):
        list(read_file(write(tmp_path / "a.json", f"[\n{value}]")))


def test_a_short_csv_row_names_its_own_line_after_a_quoted_break(tmp_path):
    items = list(read_file(write(tmp_path / "a.csv", 'q,a\n"x\ny",1\n\nz\nz,1,2\n')))
    assert items[0].line == 2
    assert str(items[1]) == "a.csv:5: row 2 has 1 fields, 2 expected; 'a' is missing"
    assert "3 fields, 2 expected; put text that holds the separator" in str(items[2])


def test_a_csv_field_may_be_long(tmp_path):
    (row,) = read_file(write(tmp_path / "a.csv", f"text\n{'x' * 200_000}\n"))
    assert len(row.values["text"]) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", '[{"a": 1},\n{"a": "tw', "row 2, line 2, column 7: the file or line ends"),
        ("a.json", '[{"a": 1}', "row 1, line 1, column 10.*after row 1"),
        ("a.json", '[{"a": 1},', "row 2, line 1, column 11.*after row 1"),
        ("a.json", '[{"a": 1},]', "row 2, line 1, column 11: expecting value"),
        ("a.json", '[{"a": 1}] [', "line 1, column 12: text after the closing"),
        ("a.json", '[{"a": 1} {"a": 2}]', "column 11: expecting ',' delimiter"),
        ("a.json", '{"a": 1}', "must hold a JSON array.*text that starts with"),
        ("a.json", '{"data": [{"a": 1}]}', "an object whose key 'data' holds a list"),
        ("a.json", "[]", "holds no rows"),
        ("a.json", " \n", "is empty"),
        ("a.jsonl", b"", r"is empty \(0 bytes\)"),
        ("a.jsonl", b" \n", "is empty"),
        ("a.jsonl", '[\n{"a": 1}\n]', r"is a JSON array.*rename it to 'a\.json'"),
        ("a.jsonl", '[{"a": 1}]', "is a JSON array"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}', "line 2, byte 8: not UTF-8; got 0xE9.*Latin-1"),
        ("a.jsonl", b'\xff\xfe{\0"\0', "line 1, byte 1: not UTF-8; got 0xFF.*UTF-16"),
        ("a.json", b'[\n"\xc3\xa9\xe9"]', "line 2, byte 4: not UTF-8; got 0xE9"),
        ("a.txt", "é".encode()[:1], "line 1, byte 1: not UTF-8; got 0xC3"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), r"is gzip, not text; rename it to a\.jsonl\.gz"),
        ("a.jsonl.gz", b"{}", r"is not gzip, though its name says so; rename it to a\.jsonl"),
        ("a.jsonl.gz", b"", r"is empty \(0 bytes\)"),
        ("a.txt.gz", gzip.compress(b"", mtime=0), "is empty"),
        ("a.csv", "q,a\n", "a header and no rows"),
        ("a.csv", "q,q\n1,2\n", "has column 'q' twice"),
        ("a.csv", 'q\n"x\ny', "line 2: a quote opens and does not close"),
        ("a.csv", "q\rx\r", "line 1: a carriage return stands alone"),
        ("a.csv", b"q\nx\0y\n", "line 2: holds a NUL byte"),
        ("a.csv", "\n", "is empty"),
        ("a.md", " ", "is empty"),
        ("a.parquet", b"nonsense", "not readable parquet"),
        ("a.parquet", b"", "is empty"),
        ("a.arrow", b"nonsense", "not readable arrow"),
        ("a.arrow", b"ARROW1nonsense", "not readable arrow"),
        ("a.docx", b"x", "suffix whet does not read; got '.docx'"),
        ("a.parquet.gz", b"x", "suffix whet does not read; got '.parquet.gz'"),
    ],
)
@pytest.mark.parametrize("piece_bytes", [1, 1 << 20])
def test_an_unreadable_file_is_one_sentence(
    tmp_path, monkeypatch, piece_bytes, name, content, words
):
    monkeypatch.setattr(readers, "_PIECE_BYTES", piece_bytes)
    with pytest.raises(InputError, match=words) as caught:
        list(read_file(write(tmp_path / name, content)))
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_gzip_file_names_the_row_that_was_reached(tmp_path):
    lines = "".join(f'{{"a": "{number * 7919}"}}\n' for number in range(500)).encode()
    whole = gzip.compress(lines)
    file = tmp_path / "a.jsonl.gz"
    half = lines[: lines.index(b"\n", 3000) + 1]
    for content in (whole[:-9], gzip.compress(half) + whole[: len(whole) // 2], whole + b"x" * 40):
        read = []
        with pytest.raises(InputError, match=r"a\.jsonl\.gz' cannot be read") as caught:
            read += read_file(write(file, content))
        assert "fetch it again" in str(caught.value)
    middle = bytearray(whole)
    middle[40:60] = b"\xff" * 20
    with pytest.raises(InputError, match="cannot be read"):
        list(read_file(write(file, bytes(middle))))


def test_rows_before_the_damage_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_PIECE_BYTES", 64)
    lines = "".join(f'{{"a": "{number * 7919}"}}\n' for number in range(500)).encode()
    with pytest.raises(InputError, match=r"cannot be read beyond row \d\d+: "):
        list(read_file(write(tmp_path / "a.jsonl.gz", gzip.compress(lines)[:-9])))


def test_what_the_system_refuses_is_one_sentence(tmp_path):
    for suffix in ("jsonl", "jsonl.gz", "parquet", "arrow"):
        (tmp_path / f"a.{suffix}").mkdir()
        with pytest.raises(InputError, match="cannot be read: Is a directory"):
            list(read_file(tmp_path / f"a.{suffix}"))
        with pytest.raises(InputError, match="cannot be read: No such file"):
            list(read_file(tmp_path / f"b.{suffix}"))


def test_a_damaged_arrow_file_does_not_end_the_process(tmp_path):
    for file in save_tables(tmp_path):
        whole = file.read_bytes()
        for place in range(0, len(whole), max(1, len(whole) // 60)):
            damaged = bytearray(whole)
            damaged[place : place + 4] = b"\xff\x7f\xff\x7f"
            try:
                list(read_file(write(tmp_path / f"d{file.suffix}", bytes(damaged))))
            except InputError:
                pass


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    file = tmp_path / name
    with file.open("w") as out:
        out.write({"a.json": "[", "a.csv": "text,b\n"}.get(name, ""))
        for number in range(200_000):
            row = {"text": f"row {number} " + "word " * 15, "b": str(number)}
            end = "]" if number == 199_999 else ","
            out.write(
                ",".join(row.values()) + "\n" if name == "a.csv"
                else json.dumps(row) + (end if name == "a.json" else "\n")
            )  # fmt: skip
    assert file.stat().st_size > 17_000_000
    tracemalloc.start()
    try:
        count = sum(isinstance(row, Row) for row in read_file(file, text_rows="line"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 200_000 and peak < 20e6


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow", "a.txt"])
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.text(alphabet='[]{}",:\\u0dtrueNa\n\r -1e9\0é', max_size=80).map(str.encode),
    ),
    st.booleans(),
    st.sampled_from([1, 3, 1 << 20]),
)
def test_random_bytes_give_rows_faults_or_one_sentence(
    tmp_path, monkeypatch, name, content, packed, piece_bytes
):
    monkeypatch.setattr(readers, "_PIECE_BYTES", piece_bytes)
    starts = {"a.json": b"[", "a.arrow": b"ARROW1\0\0"}
    content = starts.get(name, b"") + content
    if packed and name not in ("a.parquet", "a.arrow"):
        name, content = f"{name}.gz", gzip.compress(content)[: len(content) + 20]
    try:
        items = list(read_file(write(tmp_path / name, content)))
    except InputError as error:
        assert str(error)
        return
    for item in items:
        assert isinstance(item, Row | Fault)
        assert len(item.excerpt) <= 120 and item.excerpt.isprintable()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(
        st.dictionaries(
            st.text(max_size=4),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.floats(-9, 9),
                lambda inner: st.lists(inner, max_size=3),
            ),
            max_size=3,
        ),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([1, 3, 10, 40]),
    st.sampled_from([None, 2]),
    st.booleans(),
)
def test_an_array_is_read_as_json_loads_reads_it_however_it_is_cut(
    tmp_path_factory, rows, piece_bytes, indent, ascii_only
):
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    file = write(tmp_path_factory.getbasetemp() / "whole.json", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_PIECE_BYTES", piece_bytes)
        assert [row.values for row in read_file(file)] == json.loads(text)


def test_an_excerpt_is_short_printable_and_on_one_line():
    assert excerpt_of("a\n\tb\x1b[31m" + "x" * 500) == "a b [31m" + "x" * 112
    row = Row({"a": None, "b": "é\n"}, "a.jsonl", 3, 4)
    assert row.excerpt == '{"a":null,"b":"é\\n"}' and row.where == "a.jsonl:4"
    assert str(Fault("x:1", "is wrong", "abc")) == "x:1: is wrong"


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "rows", "faults", "words"),
    [
        ("bad_line_7.jsonl", 9, 1, "bad_line_7.jsonl:7: not JSON at column 59"),
        ("short_row.csv", 9, 1, "short_row.csv:7: row 5 has 2 fields, 3 expected; 'output'"),
        ("duplicate_keys.jsonl", 7, 1, "duplicate_keys.jsonl:4: key 'output' occurs twice"),
        ("bom.jsonl", 6, 0, None),
        ("bom.csv", 6, 0, None),
        ("crlf.jsonl", 6, 0, None),
        ("long_row.jsonl", 6, 0, None),
    ],
)
def test_awkward_files_are_read_whole(shared, name, rows, faults, words):
    items = list(read_file(shared / "data" / "bad" / name))
    found = [item for item in items if isinstance(item, Fault)]
    assert (len(items) - len(found), len(found)) == (rows, faults)
    assert words is None or words in str(found[0])
    for row in items:
        if isinstance(row, Row):
            assert list(row.values) == ["instruction", "input", "output"]
            assert not any(str(value).endswith("\r") for value in row.values.values())


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("truncated.json", "row 6, line 30, column 15: the file .* ends inside.*after row 5"),
        ("latin1.jsonl", "line 3, byte 97: not UTF-8; got 0xE9, which looks like Latin-1"),
        ("empty.jsonl", r"is empty \(0 bytes\)"),
        ("gzip_inside.jsonl", "is gzip, not text; rename it to gzip_inside.jsonl.gz or unpack it"),
    ],
)
def test_broken_files_are_refused_by_name_and_place(shared, name, words):
    with pytest.raises(InputError, match=words) as caught:
        list(read_file(shared / "data" / "bad" / name))
    assert name in str(caught.value)
