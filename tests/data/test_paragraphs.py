"""`text_rows: paragraph` makes a document of each piece between blank lines, and drops nothing else."""

import pytest

from whet.config_file import load_config
from whet.data.prepare import prepare
from whet.data.readers import read_file
from whet.errors import InputError


def test_blank_lines_end_a_document_and_its_first_line_is_its_place(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"\n\none\r\ntwo\r\n \t\r\n\nthree\nfour")
    rows = list(read_file(file, text_rows="paragraph"))
    assert [row.values for row in rows] == [{"text": "one\ntwo"}, {"text": "three\nfour"}]
    assert [row.line for row in rows] == [3, 7]


def test_a_tenth_of_a_texts_paragraphs_is_held_out(tokenizer, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("\n\n".join(f"paragraph {n}\nof a text" for n in range(40)))
    settings = {"train": str(file), "text_rows": "paragraph", "heldout_fraction": 0.1}
    data = prepare(load_config({"data": settings}).data, tokenizer, 64)
    assert len(data.train) == 36 and len(data.heldout) == 4


def test_one_document_cannot_be_split_and_the_remedy_is_told(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("one document\n\nof two paragraphs")
    settings = {"train": str(tmp_path / "a.txt"), "heldout_fraction": 0.1}
    with pytest.raises(InputError, match="set data.text_rows: paragraph"):
        prepare(load_config({"data": settings}).data, tokenizer, 64)
