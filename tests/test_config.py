import json
from pathlib import Path

import pytest

from whet.config import Config, parse_bytes
from whet.config_file import (
    TEMPLATES,
    commented_yaml,
    known_keys,
    load_config,
    to_json_schema,
    to_yaml,
)
from whet.config_text import parse_yaml
from whet.errors import InputError

ROOT = Path(__file__).resolve().parents[1]


def mistakes(source, overrides=()):
    with pytest.raises(InputError) as caught:
        load_config(source, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_yaml_json_python_and_set_give_the_same_config(tmp_path):
    tree = {"lora": {"rank": 8}, "train": {"learning_rate": 1e-4, "max_steps": 5}}
    (tmp_path / "a.yaml").write_text(
        "lora: {rank: 8}\ntrain:\n  learning_rate: 1e-4\n  max_steps: 5\n"
    )
    (tmp_path / "a.json").write_text(json.dumps(tree))
    assignments = ["lora.rank=8", "train.learning_rate=1e-4", "train.max_steps=5"]
    expected = load_config(tree)
    assert expected.lora.rank == 8 and expected.train.learning_rate == 1e-4
    assert load_config(tmp_path / "a.yaml") == expected
    assert load_config(tmp_path / "a.json") == expected
    assert load_config({}, assignments) == expected
    assert load_config(expected) == expected


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("lora.rnk", "lora.rank"),
        ("train.lr", "train.learning_rate"),
        ("lora.r", "lora.rank"),
        ("rank", "lora.rank"),
        ("modle", "model"),
        ("train.max_seq_length", "model.max_length"),
        ("model.lora_alpha", "lora.alpha"),
    ],
)
def test_an_unknown_key_names_the_one_that_was_meant(written, meant):
    assert f"unknown key `{written}`; did you mean `{meant}`?" in mistakes({}, [f"{written}=1"])


def test_all_mistakes_are_told_at_once():
    text = mistakes(
        {"lora": {"rnk": 8, "alpha": "much"}, "train": {"schedule": "liner", "batch_size": 2.5}},
        ["nonsense", "eval.samples=-1"],
    )
    for part in ("lora.rnk", "lora.alpha", "'liner'", "batch_size", "nonsense", "eval.samples"):
        assert part in text
    assert "did you mean 'linear'?" in text


@pytest.mark.parametrize(
    "tree",
    [
        {"model": {"load_in_4bit": True}, "train": {"parameters": "full"}},
        {"lora": {"init": "loftq"}},
        {"lora": {"init": "pissa"}, "model": {"load_in_4bit": True}},
        {"data": {"heldout": "a.jsonl", "heldout_fraction": 0.1}},
        {"plan": {"embeddings": "8bit"}, "train": {"parameters": "full"}},
        {"plan": {"policy": "offload"}, "engine": {"enabled": False}},
        {"pack": {"enabled": False, "split": True}},
        {"plan": {"memory": "twelve"}},
    ],
)
def test_settings_that_contradict_each_other_are_refused(tree):
    assert mistakes(tree).count("\n") == 1


def test_types_are_strict():
    assert "load_in_4bit" in mistakes({"model": {"load_in_4bit": "yes"}})
    assert "batch_size" in mistakes({"train": {"batch_size": "8"}})
    assert load_config({"lora": {"alpha": 16}}).lora.alpha == 16.0


def test_a_key_given_twice_is_an_error_with_its_place(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("lora:\n  rank: 8\n  rank: 16\n")
    assert "a.yaml:3:3: key 'rank' is given twice" in mistakes(file)


@pytest.mark.parametrize("content", ["lora: [", "- 1\n- 2\n", "", "just text"])
def test_a_file_that_is_no_config_is_one_sentence(tmp_path, content):
    file = tmp_path / "a.yaml"
    file.write_text(content)
    assert "a.yaml" in mistakes(file)


def test_a_missing_or_binary_file_is_one_sentence(tmp_path):
    assert "there is no config file" in mistakes(tmp_path / "no.yaml")
    (tmp_path / "b.yaml").write_bytes(b"run: \xff\xfe")
    assert "not UTF-8" in mistakes(tmp_path / "b.yaml")


@pytest.mark.parametrize("template", TEMPLATES)
def test_init_writes_every_key_and_it_loads(template):
    text = commented_yaml(template)
    load_config(parse_yaml(text))
    for key in known_keys():
        assert f"{key.rsplit('.', 1)[-1]}:" in text
    assert max(map(len, text.splitlines())) <= 100


def test_every_key_has_a_meaning():
    schema = json.loads(to_json_schema())
    for name, section in schema["$defs"].items():
        for key, field in section["properties"].items():
            assert field.get("description"), f"{name}.{key}"


def test_the_published_schema_is_the_code(tmp_path):
    published = (ROOT / "docs" / "config.schema.json").read_text()
    assert published == to_json_schema(), "run `make schema`"


def test_the_resolved_config_reads_back_equal():
    config = load_config({}, ["train.learning_rate=3e-5", "data.columns={output: answer}"])
    assert load_config(parse_yaml(to_yaml(config))) == config


def test_files_beside_the_config_are_found_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "rows.jsonl").write_text("{}")
    file = tmp_path / "sub" / "a.yaml"
    file.write_text("data: {train: [rows.jsonl, org/dataset]}")
    monkeypatch.chdir(tmp_path)
    assert load_config(file).data.train == [str(tmp_path / "sub" / "rows.jsonl"), "org/dataset"]


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("12GB", 12 * 2**30), ("11.5 GiB", 11.5 * 2**30), ("800mb", 800 * 2**20), ("4096", 4096)],
)
def test_memory_is_read_as_people_write_it(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    ("key", "meant"),
    [("gradient_checkpointing", "plan.policy"), ("examples_per_pass", "plan.tokens_per_pass"),
     ("use_gradient_checkpointing", "plan.policy"), ("micro_batch_size", "plan.tokens_per_pass")],
)  # fmt: skip
def test_keys_that_the_planner_replaced_name_its_own(key, meant):
    assert f"did you mean `{meant}`?" in mistakes({"train": {key: 1}})


def test_on_and_off_are_the_words_they_are():
    config = load_config(
        parse_yaml("engine: {cuda_graphs: off, check: off}\npack: {buckets: on}"),
        ["pack.buckets=off"],
    )
    assert (config.engine.cuda_graphs, config.engine.check, config.pack.buckets) == ("off",) * 3
    assert load_config(parse_yaml(to_yaml(config))) == config


@pytest.mark.parametrize("text", ["", "GB", "12 apples", "-3GB", "0", "1e9"])
def test_what_is_no_memory_is_refused(text):
    with pytest.raises(ValueError, match="write 12GB"):
        parse_bytes(text)


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda p: p.name)
def test_every_example_is_a_config(file):
    assert isinstance(load_config(file), Config)
