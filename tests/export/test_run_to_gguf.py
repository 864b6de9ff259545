"""A run's GGUF export from end to end: its files, its table, and faults that the gate names."""

import json
import shutil

import gguf
import numpy as np
import pytest
from tests.compat.test_hub import LocalHub
from typer.testing import CliRunner

from whet.cli import app
from whet.config_file import load_config
from whet.errors import WhetError
from whet.export.check import mean_divergence, num_bits, perplexity
from whet.export.exports import check_files, export_gguf, write_files
from whet.export.live import live_of
from whet.export.ollama import export_ollama, parse_modelfile
from whet.export.weights import tuned_weights
from whet.model.load import load_tokenizer
from whet.train.recipe import LogListener, fit

pytest.importorskip("cyllama")


@pytest.fixture(scope="module")
def trained(tiny_model, rows_file, tmp_path_factory):
    return fit(
        load_config({
            "run": {"name": "tiny", "dir": str(tmp_path_factory.mktemp("runs"))},
            "model": {"name": str(tiny_model), "dtype": "float32"},
            "data": {"train": str(rows_file), "heldout_fraction": 0.2, "system": "Repeat."},
            "lora": {"rank": 4}, "train": {"max_steps": 6, "batch_size": 4, "learning_rate": 5e-3},
            "eval": {"samples": 0},
        }),
        listener=LogListener(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def live(trained):
    return live_of(trained, load_tokenizer(trained.config.model, trained.weights_dir))


def test_several_types_are_written_checked_and_described(trained, tmp_path):
    kinds = ["f32", "f16", "bf16", "q8_0", "q4_k_m"]
    files, gates = export_gguf(trained, tmp_path, kinds)
    assert [file.name for file in files] == [f"tiny-{kind}.gguf" for kind in kinds]
    assert {p.name for p in tmp_path.iterdir()} == {
        *(file.name for file in files), "README.md", "check.json"
    }  # fmt: skip
    for gate in gates:
        assert gate.passed, gate.causes
        assert {"tokens", "chat template", "end of turn", "greedy answers"} <= {
            finding.name for finding in gate.findings
        }
    assert (
        gates[0].scores["max_error"] < gates[1].scores["max_error"] < gates[2].scores["max_error"]
    )
    assert [entry["kind"] for entry in json.loads((tmp_path / "check.json").read_text())] == kinds
    assert "| tiny-q4_k_m.gguf | KL |" in (tmp_path / "README.md").read_text()


def test_a_small_file_alone_leaves_no_16_bit_file(trained, tmp_path):
    export_gguf(trained, tmp_path, ["q5_k_m"])
    export_gguf(trained, tmp_path, ["q6_k"])  # beside the first
    assert {p.name for p in tmp_path.iterdir()} == {
        "tiny-q5_k_m.gguf", "tiny-q6_k.gguf", "README.md", "check.json",
    }  # fmt: skip
    assert len(json.loads((tmp_path / "check.json").read_text())) == 2


@pytest.fixture
def written(trained, live, tmp_path):
    """An f16 and a q8_0 file, unharmed, with what checks the first so many of them."""
    tokenizer = load_tokenizer(trained.config.model, trained.weights_dir)
    kinds = ["f16", "q8_0"]
    with tuned_weights(trained) as weights:
        files, _ = write_files(weights, tokenizer, tmp_path, "m", kinds)

    def causes(most=2):
        gates = check_files(live, weights, files[:most], kinds[:most])
        return [gate.causes for gate in gates]

    return files, causes


def flip(file, name):
    """Change the sign of one tensor inside a GGUF file."""
    tensor = next(t for t in gguf.GGUFReader(file, "r+").tensors if t.name == name)
    tensor.data[:] = -tensor.data
    tensor.data.base.flush() if hasattr(tensor.data.base, "flush") else None


def test_a_flipped_tensor_is_caught(written):
    files, causes = written
    assert causes() == [[], []]
    flip(files[0], "blk.1.ffn_down.weight")
    flip(files[1], "blk.1.ffn_norm.weight")  # of no weight in this model's predictions
    assert causes() == [
        ["tensors: tensor blk.1.ffn_down.weight is not what was trained",
         "logits: the weights are not those that were trained"],
        ["tensors: tensor blk.1.ffn_norm.weight is not what was trained"],
    ]  # fmt: skip


def without(file, key):
    """Rename a metadata key inside a GGUF file, so that nobody finds it."""
    data = file.read_bytes()
    assert data.count(key) == 1
    file.write_bytes(data.replace(key, b"x" * len(key)))


def test_a_dropped_template_is_caught(written):
    files, causes = written
    without(files[0], b"tokenizer.chat_template")
    assert causes() == [["chat template: the file has no chat template"], []]


def test_a_changed_end_of_turn_is_caught(written):
    files, causes = written
    # Its text tells llama.cpp that it ends a turn, and so does the metadata: both have to go.
    data = files[0].read_bytes()
    renamed = data.replace(b"tokenizer.ggml.eos_token_id", b"tokenizer.ggml.eos_token_ix")
    place = renamed.index(b"<|im_end|>")
    files[0].write_bytes(renamed[:place] + b"<|im_enx|>" + renamed[place + 10 :])
    (found,) = causes(1)
    assert any(cause.startswith("end of turn: generation goes on after") for cause in found)
    assert any(cause.startswith("tokens: ") for cause in found)


def test_weights_that_are_not_numbers_are_caught(written):
    files, causes = written
    tensor = next(
        t for t in gguf.GGUFReader(files[0], "r+").tensors if t.name == "output_norm.weight"
    )
    tensor.data[:] = np.nan
    try:
        found, _ = causes()
    except WhetError as error:  # llama.cpp itself may refuse them
        assert "nan" in str(error).lower()
    else:
        assert "tensors: tensor output_norm.weight is not what was trained" in found
        assert "logits: the weights are not those that were trained" in found


def test_the_command_exits_1_with_the_cause(trained, tmp_path, monkeypatch):
    from whet.export import gguf_layout

    monkeypatch.setattr(gguf_layout, "_interleave", lambda heads: lambda value: value)
    told = CliRunner().invoke(
        app, ["export", str(trained.path), "--to", "gguf", "--quant", "f16", "--out", str(tmp_path / "o")]
    )  # fmt: skip
    assert isinstance(told.exception, WhetError) and told.exception.exit_code == 1
    assert "logits: the weights are not those that were trained" in str(told.exception)
    assert "FAIL" in told.stdout
    assert "The check failed" in (tmp_path / "o" / "README.md").read_text()


def test_an_export_is_pushed_when_it_has_passed(trained, tmp_path, monkeypatch):
    hub = LocalHub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda **_: hub)
    told = CliRunner().invoke(
        app, ["export", str(trained.path), "--to", "gguf", "--quant", "f16,q4_0", "--out",
              str(tmp_path / "o"), "--push", "me/tiny"],
    )  # fmt: skip
    assert told.exit_code == 0, told.output
    assert hub.files() == {
        f"me/tiny/{name}" for name in ("tiny-f16.gguf", "tiny-q4_0.gguf", "README.md", "check.json")
    }


def test_a_hub_that_refuses_is_an_error_in_words(trained, tmp_path, monkeypatch):
    class Closed(LocalHub):
        def create_repo(self, name, **_):
            raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi", lambda **_: Closed(tmp_path))
    told = CliRunner().invoke(
        app, ["export", str(trained.path), "--to", "adapter", "--no-check", "--out", str(tmp_path / "o"),
              "--push", "me/tiny"],
    )  # fmt: skip
    assert "could not be uploaded to 'me/tiny': no route to host" in str(told.exception)
    assert (tmp_path / "o" / "adapter_config.json").is_file()


def test_ollama_gets_a_modelfile_beside_its_file(trained, tmp_path):
    files, gates = export_ollama(trained, tmp_path, ["q8_0"])
    assert [file.name for file in files] == ["tiny-q8_0.gguf", "Modelfile"]
    assert [gate.causes for gate in gates] == [[], []]
    found = parse_modelfile((tmp_path / "Modelfile").read_text())
    assert ("FROM", "./tiny-q8_0.gguf") in found and ("SYSTEM", "Repeat.") in found
    assert ("PARAMETER", 'stop "<|im_end|>"') in found
    assert any(
        name == "TEMPLATE" and "{{ range $i, $m := .Messages }}" in text for name, text in found
    )
    shutil.rmtree(tmp_path)


def test_the_measures_are_those_of_their_names():
    logits = [np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], np.float32))]
    other = [np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]], np.float32))]
    assert perplexity(logits, [[0, 1]]) == pytest.approx(4)
    assert mean_divergence(logits, logits) == pytest.approx(0, abs=1e-12)
    assert mean_divergence(logits, other) == pytest.approx((0.5 * np.log(2) - 0.25 * np.log(2)) / 2)
    assert [num_bits(kind) for kind in ("q8_0", "q4_k_m", "nf4", "iq3_s", "tq1_0", "q2_k")] == [
        8, 4, 4, 3, 2, 2,
    ]  # fmt: skip
