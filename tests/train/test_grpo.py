"""Methods that trl runs: grpo and reward, and the examples with trl's own trainers."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from tests.train.test_recipe import Heard

from whet.config_file import load_config
from whet.errors import InputError, WhetError
from whet.train.recipe import fit
from whet.train.with_trl import load_rewards, prompts_of
from whet.trained import load_trained

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
REWARD = '''
import re

def short(completions, answer, **_):
    """Shorter is better, and the answer best."""
    texts = [c[-1]["content"] for c in completions]
    return [1.0 / (1 + len(t)) + (t == a) for t, a in zip(texts, answer)]

def wrong_length(completions, **_):
    return [1.0]

def raises(completions, answer):
    return [0.0] * len(completions)
'''


@pytest.fixture
def grpo(config, tmp_path):
    pytest.importorskip("trl", reason="trl is not installed")
    (tmp_path / "reward.py").write_text(REWARD)
    return load_config(config, [
        "method=grpo", f"grpo.reward={tmp_path}/reward.py:short", "grpo.num_generations=4",
        "grpo.max_new_tokens=5", "train.max_steps=3", "train.batch_size=2", "lora.dropout=0",
    ])  # fmt: skip


def test_a_run_samples_judges_and_learns(grpo):
    heard = Heard()
    run = fit(grpo, listener=heard)
    rows = [row for row in run.metrics() if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3] == [p.step for p in heard.steps]
    for row in rows:
        assert row["reward"] > 0 and row["rewards/short/mean"] == pytest.approx(row["reward"])
        assert row["grad_norm"] > 0
    report = run.report
    assert report["reward"]["num_answers"] == report["data"]["heldout"]["examples"] > 0
    assert report["training"]["steps"] == 3 and report["engine"]["layers_fused"] == 2
    assert "**tuned**" in run.samples_file.read_text()
    assert load_trained(str(run.path)).run.adapter_dir.is_dir()


def test_prompts_are_conversations_and_the_answer_is_a_column(grpo):
    first = next(prompts_of(grpo))
    assert first == {"prompt": [{"role": "user", "content": "say red"}], "answer": "red0"}
    assert len(list(prompts_of(load_config(grpo, ["data.max_rows=3"])))) == 3


def test_a_faulty_reward_function_is_told_in_a_sentence(grpo, tmp_path):
    def judge(name):
        settings = load_config(grpo, [f"grpo.reward={tmp_path}/reward.py:{name}"])
        return load_rewards(settings)[0](
            completions=[[{"content": "a"}]] * 2, answer=["a"] * 2, more=1
        )

    assert judge("short") == [1.5, 1.5]
    with pytest.raises(WhetError, match="a number for each of 2 completions; got 1 items"):
        judge("wrong_length")
    with pytest.raises(WhetError, match=r"raises\(\) raised TypeError.*give it \*\*kwargs"):
        judge("raises")
    with pytest.raises(
        InputError, match="grpo.reward: .* has no function 'shot'; did you mean 'short'"
    ):
        judge("shot")


def test_a_run_with_trl_is_not_resumed(grpo):
    with pytest.raises(InputError, match="method 'grpo' cannot be resumed"):
        fit(grpo, resume=True, listener=Heard())


@pytest.mark.parametrize("method", ["grpo", "reward"])
def test_without_trl_the_extra_is_named(grpo, method, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "trl", None)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    more = [f"data.train={pairs}", "data.heldout_fraction=0"] if method == "reward" else []
    config = load_config(grpo, [f"method={method}", *more])
    with pytest.raises(InputError, match=r"needs trl.*pip install 'whet\[trl\]'"):
        fit(config, listener=Heard())


@pytest.mark.parametrize("parameters", ["lora", "full", "last_layers"])
def test_a_reward_model_learns_to_score_the_chosen_answer_higher(grpo, tmp_path, parameters):
    rows = [{"prompt": f"say {n}", "chosen": "red", "rejected": "blue green"} for n in range(14)]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_config(grpo, [
        "method=reward", f"data.train={pairs}", "train.max_steps=10", "train.batch_size=4",
        "train.learning_rate=5e-3", f"train.parameters={parameters}", "train.last_layers=1",
    ])  # fmt: skip
    heard = Heard()
    run = fit(config, listener=heard)
    rows = [row for row in run.metrics() if "loss" in row]
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"] and rows[-1]["accuracy"] == 1
    assert run.report["reward"]["eval_accuracy"] == 1
    assert run.report["engine"]["layers_fused"] == 2, heard.notes
    from transformers import AutoModelForSequenceClassification

    folder = run.adapter_dir if parameters == "lora" else run.model_dir
    names = "".join(p.name for p in folder.iterdir())
    assert ("adapter_model" in names) == (parameters == "lora")
    if parameters != "lora":
        assert AutoModelForSequenceClassification.from_pretrained(folder).config.num_labels == 1


def test_trls_dpo_trainer_learns_with_the_engine_in_the_model(
    grpo, tiny_model, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["trl_dpo.py", "--model", str(tiny_model), "--steps", "9"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EXAMPLES / "trl_dpo.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert end.value.code == 0 and "learned" in said and "NOT" not in said


@pytest.mark.slow
def test_the_reward_of_trls_grpo_trainer_rises_with_the_engine_in_the_model(monkeypatch, capsys):
    pytest.importorskip("trl", reason="trl is not installed")
    monkeypatch.setattr(sys, "argv", ["trl_grpo.py"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EXAMPLES / "trl_grpo.py"), run_name="__main__")
    assert end.value.code == 0 and "NOT" not in capsys.readouterr().out
