import json
from pathlib import Path

import pytest

from whet.data.sources import (
    SUFFIXES,
    Fault,
    Row,
    digest,
    find_sources,
    kind_of,
    read_rows,
    read_source,
    require_sources,
)
from whet.errors import InputError
from whet.sections import DataSection

ROWS = [{"text": "one"}, {"text": "two"}]


def save(path, text="one"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"text": text}) + "\n")
    return str(path)


def names(source):
    return [source.file_name(path) for path in source.paths]


def test_the_known_names_are_still_here(tmp_path):
    (row,) = read_rows(save(tmp_path / "a.jsonl"))
    assert isinstance(row, Row) and not isinstance(row, Fault)
    assert (row.file, row.where, kind_of(row.values)) == ("a.jsonl", "a.jsonl:1", "object")
    assert ".arrow" in SUFFIXES


def test_a_folder_is_read_in_the_order_of_its_names_with_places_that_tell_files_apart(tmp_path):
    for name in ("b/x.jsonl", "a.jsonl", "b/a.jsonl", ".cache/x.jsonl", ".hidden.jsonl"):
        save(tmp_path / name, name)
    (tmp_path / "photo.png").write_bytes(b"x")
    (tmp_path / "README.md").write_text("about the data")
    (tmp_path / "dataset_info.json").write_text("{}")
    (source,) = find_sources(str(tmp_path))
    assert names(source) == ["a.jsonl", "b/a.jsonl", "b/x.jsonl"]
    rows = list(read_source(source))
    assert [row.where for row in rows] == ["a.jsonl:1", "b/a.jsonl:1", "b/x.jsonl:1"]
    assert [row.values["text"] for row in rows] == ["a.jsonl", "b/a.jsonl", "b/x.jsonl"]


def test_texts_in_a_folder_without_data_files_are_the_data(tmp_path):
    (tmp_path / "a.md").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    assert [row.values["text"] for row in read_rows(str(tmp_path))] == ["one", "two"]


def test_a_folder_that_datasets_saved_is_read(tmp_path):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert [row.values for row in read_rows(str(tmp_path / "saved"))] == ROWS


def test_a_glob_finds_files_and_names_them_from_its_fixed_part(tmp_path):
    for name in ("d/a.jsonl", "d/b.jsonl", "d/e/c.jsonl", "d/notes.txt"):
        save(tmp_path / name)
    for pattern, expected in (
        ("d/*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("d/**/*.jsonl", ["a.jsonl", "b.jsonl", "e/c.jsonl"]),
        ("d/*", ["a.jsonl", "b.jsonl"]),
        ("d/*.txt", ["notes.txt"]),
        ("*/[ab].jsonl", ["d/a.jsonl", "d/b.jsonl"]),
    ):
        assert names(find_sources(str(tmp_path / pattern))[0]) == expected, pattern
    odd = save(tmp_path / "[1].jsonl")
    assert find_sources(odd)[0].paths == (Path(odd),)


def test_a_trailing_number_draws_rows_unless_a_file_is_called_so(tmp_path):
    plain = save(tmp_path / "a.jsonl")
    (source,) = find_sources(f"{plain}#500")
    assert (source.name, source.sample, source.paths) == (f"{plain}#500", 500, (Path(plain),))
    assert find_sources(f"{tmp_path}#7")[0].sample == 7
    assert find_sources(f"{tmp_path}/*.jsonl#8")[0].sample == 8
    assert find_sources("org/rows:test#9")[0].sample == 9
    save(tmp_path / "folder#5" / "a.jsonl")
    assert find_sources(str(tmp_path / "folder#5"))[0].sample is None
    for wrong, words in (("#0", "draws no rows"), ("#half", "must be a number of rows")):
        with pytest.raises(InputError, match=words):
            find_sources(plain + wrong)


def test_weights_belong_to_the_names_in_their_order(tmp_path):
    files = [save(tmp_path / "a.jsonl"), save(tmp_path / "b.jsonl")]
    assert [source.weight for source in find_sources(files, [2, 0.5])] == [2, 0.5]
    assert [source.weight for source in find_sources(files)] == [1, 1]
    with pytest.raises(InputError, match="3 weights for 2 sources"):
        find_sources(files, [1, 1, 1])
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="must be above 0; got"):
            find_sources(files, [1, wrong])


def test_a_name_that_leads_nowhere_is_one_sentence(tmp_path):
    save(tmp_path / "train.jsonl")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.docx").write_text("x")
    for name, words in (
        ("trian.jsonl", r"does not exist; did you mean '.*train\.jsonl'"),
        ("nothing/", r"does not exist; check data\.train"),
        ("empty", "holds no file that whet reads; got 0 files"),
        ("*.csv", "matches no file that whet reads; got 0 matches"),
        ("a.docx", r"has a suffix whet does not read; got '\.docx'"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            find_sources(f"{tmp_path}/{name}")
        assert "\n" not in str(caught.value)
    for empty in ("", []):
        with pytest.raises(InputError, match=r"data\.heldout is empty"):
            find_sources(empty, key="data.heldout")
    with pytest.raises(InputError, match="empty name"):
        find_sources(["", "a"])
    with pytest.raises(InputError, match="2 sources of data.train") as caught:
        find_sources([f"{tmp_path}/x.jsonl", f"{tmp_path}/y.jsonl"])
    assert "x.jsonl" in str(caught.value) and "y.jsonl" in str(caught.value)


def test_a_config_s_sources_are_checked_without_reading(tmp_path):
    good = save(tmp_path / "a.jsonl")
    require_sources(DataSection(train=["org/rows:test", good], heldout=good))
    with pytest.raises(InputError, match=r"data\.train is empty"):
        require_sources(DataSection())
    with pytest.raises(InputError, match="check data.heldout"):
        require_sources(DataSection(train=good, heldout=str(tmp_path / "qwertyuiop.csv")))
    with pytest.raises(InputError, match="1 weights for 2 sources"):
        require_sources(DataSection(train=[good, good], weights=[1]))


def test_a_digest_changes_with_bytes_and_names_and_with_nothing_else(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        save(folder / "a.jsonl")
        save(folder / "b.jsonl", "two")
    same = {digest(source) for source in find_sources([str(first), str(second)])}
    assert len(same) == 1 and len(same.copy().pop()) == 64
    (second / "b.jsonl").rename(second / "c.jsonl")
    same.add(digest(find_sources(str(second))[0]))
    save(second / "c.jsonl", "twO")
    same.add(digest(find_sources(str(second))[0]))
    assert len(same) == 3


@pytest.fixture
def hub(monkeypatch):
    """A Hub that has two rows, and a list of what was asked of it."""
    import datasets

    asked = []

    def load(name, **wanted):
        asked.append((name, wanted))
        rows = datasets.Dataset.from_list(ROWS)
        return rows.to_iterable_dataset() if wanted.get("streaming") else rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


@pytest.mark.parametrize(("name", "split"), [("org/rows", "train"), ("org/rows:test", "test")])
def test_a_hub_dataset_is_read_by_id_and_split(hub, name, split):
    rows = list(read_rows(f"{name}#1"))
    assert hub == [("org/rows", {"split": split})]
    assert [row.values for row in rows] == ROWS and rows[1].where == f"{name} row 2"


def test_a_hub_dataset_streams_when_asked_to_and_then_has_no_digest(hub):
    (source,) = find_sources("org/rows")
    assert [row.values for row in read_source(source, streaming=True)] == ROWS
    assert hub == [("org/rows", {"split": "train", "streaming": True})]
    assert digest(source, streaming=True) is None and len(hub) == 1
    assert digest(source) is None  # it is in memory alone


def test_a_hub_dataset_s_digest_is_of_its_cached_files(tmp_path, monkeypatch):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split: datasets.load_from_disk(tmp_path / "saved")
    )
    found = digest(find_sources("org/rows")[0])
    assert found is not None and len(found) == 64


def test_a_dataset_that_the_hub_does_not_give_is_one_sentence(monkeypatch):
    import datasets

    def load(name, split):
        raise ConnectionError("Couldn't reach 'org/rows' on the Hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(InputError, match="neither a file here nor a dataset") as caught:
        list(read_rows("org/rows"))
    assert "second line" not in str(caught.value)


def test_a_stream_that_breaks_names_the_row_it_reached(monkeypatch):
    import datasets

    def rows():
        yield ROWS[0]
        raise ConnectionError("gone\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows())
    with pytest.raises(InputError, match="'org/rows' cannot be read beyond row 1: gone;"):
        list(read_rows("org/rows"))
