import math

import pytest
import torch

from whet.config_file import load_config
from whet.data.prepare import prepare
from whet.errors import InputError
from whet.evaluate import compare, evaluate, mean_loss
from whet.sections import EvalSection
from whet.trained import load_trained


@pytest.fixture(scope="module")
def loaded(tiny_model):
    return load_trained(str(tiny_model))


@pytest.fixture
def data(loaded, rows_file):
    section = load_config({"data": {"train": str(rows_file), "heldout_fraction": 0.4}}).data
    return prepare(section, loaded.tokenizer, 256)


def test_perplexity_weighs_by_tokens_not_by_rows(loaded, data):
    total, count = 0.0, 0
    for row in data.heldout:
        logits = loaded.model(torch.tensor([row.input_ids])).logits[0].double().log_softmax(-1)
        for n in range(1, len(row.labels)):
            if row.labels[n] != -100:
                total -= logits[n - 1, row.labels[n]].item()
                count += 1
    scores, _ = evaluate(loaded.model, loaded.tokenizer, data, EvalSection())
    assert scores.num_tokens == count
    assert scores.loss == pytest.approx(total / count, rel=1e-5)
    assert scores.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_batch_size_does_not_matter(loaded, data, batch_size):
    whole, count = mean_loss(loaded.model, data.heldout, 100)
    loss, same = mean_loss(loaded.model, data.heldout, batch_size)
    assert same == count and loss == pytest.approx(whole, rel=1e-6)


def test_exact_match_counts_equal_answers(loaded, data, monkeypatch):
    import whet.evaluate as module
    from whet.generate import Completion

    references = [example.messages[-1]["content"] for example in data.heldout_examples]
    given = [f" {text}\n" if n % 2 else f"{text}." for n, text in enumerate(references)]
    monkeypatch.setattr(
        module, "generate", lambda *_, **__: [Completion("", text, 1, True) for text in given]
    )
    scores, samples = evaluate(loaded.model, loaded.tokenizer, data, EvalSection(exact_match=True))
    assert scores.exact_match == (len(references) // 2) / len(references)
    assert scores.num_answers == len(samples) == len(references)
    assert samples[0].question == data.heldout_examples[0].messages[0]["content"]


def test_without_exact_match_only_the_samples_are_generated(loaded, data):
    scores, samples = evaluate(loaded.model, loaded.tokenizer, data, EvalSection(samples=2))
    assert scores.exact_match is None and len(samples) == 2
    assert evaluate(loaded.model, loaded.tokenizer, data, EvalSection(samples=0))[1] == []


def test_a_plain_model_is_measured_on_a_file(loaded, rows_file):
    found = compare(loaded, str(rows_file))
    assert found.tuned is None and found.base.num_tokens > 0
    with pytest.raises(InputError, match="--data"):
        compare(loaded)


def test_a_second_set_is_measured_beside_whatever_its_layout(loaded, rows_file, tmp_path):
    """Each set's scores are those it has alone; base and tuned of one plain model are one."""
    other = tmp_path / "other.jsonl"
    other.write_text(
        '{"question": "a user", "answer": "the number"}\n{"question": "red", "answer": "4"}\n'
    )
    found = compare(loaded, str(rows_file), str(other))
    assert found.base == compare(loaded, str(rows_file)).base
    assert found.also.base == compare(loaded, str(other)).base and found.also.tuned is None
    assert not found.also.base_samples


def test_what_a_run_forgot_is_told_on_the_terminal(
    config, rows_file, tmp_path, capsys, monkeypatch
):
    import sys

    from whet.cli import main
    from whet.train.recipe import fit

    run = fit(load_config(config, ["train.max_steps=4", "eval.exact_match=false"]))
    other = tmp_path / "other.txt"
    other.write_text("the assistant answers a user. " * 20)
    names = ["whet", "eval", str(run.path), "--data", str(rows_file), "--also", str(other)]
    monkeypatch.setattr(sys, "argv", names)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "Held-out rows" in out and f"Second set: {other}" in out
    assert "nats per token" in out.split("Second set")[1]
    monkeypatch.setattr(sys, "argv", [*names[:-1], "nowhere.jsonl"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
