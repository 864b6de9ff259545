"""Trainer's uploads, against a stand-in for the Hub that keeps what it is given in a folder."""

import fnmatch
import shutil
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.compat.runs import make_model, parameters, run
from whet.engine import swap


class LocalHub:
    """What Trainer calls of huggingface_hub's HfApi, over a folder."""

    def __init__(self, folder):
        self.folder, self.commits = folder, []

    def create_repo(self, name, **_):
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=name)

    def upload_folder(
        self, repo_id, folder_path, commit_message, path_in_repo="", ignore_patterns=(),
        run_as_future=False, **_,
    ):  # fmt: skip
        self.commits.append(commit_message)
        for file in Path(folder_path).rglob("*"):
            name = str(file.relative_to(folder_path))
            if file.is_file() and not any(fnmatch.fnmatch(name, p) for p in ignore_patterns):
                target = self.folder / repo_id / path_in_repo / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
        done = Future()
        done.set_result(commit_message)
        return done if run_as_future else commit_message

    def files(self):
        return {str(f.relative_to(self.folder)) for f in self.folder.rglob("*") if f.is_file()}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    made = LocalHub(tmp_path / "hub")
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: made)
    # The card asks the Hub about the base model; the stand-in has no such page.
    monkeypatch.setattr("transformers.Trainer.create_model_card", lambda self, **_: None)
    return made


STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_hub_strategy_uploads_what_it_says(strategy, kind, hub, tokenizer, tmp_path):
    model = make_model(kind)
    swap.attach(model)
    trainer = run(
        model, tokenizer, tmp_path / "out", train=False, processing_class=tokenizer,
        settings={
            "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "push_to_hub": True,
            "hub_model_id": "me/tiny", "hub_strategy": strategy, "hub_always_push": True,
        },
    )  # fmt: skip
    trainer.train()
    assert (len(hub.commits) == 0) == (strategy == "end")
    trainer.push_to_hub()
    assert hub.commits[-1] == "End of training"
    names = {name.removeprefix("me/tiny/") for name in hub.files()}
    weights = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    assert {weights, "tokenizer.json", "training_args.bin"} <= names
    folders = {name.split("/")[0] for name in names if "/" in name}
    expected = {
        "checkpoint": {"last-checkpoint"},
        "all_checkpoints": {"checkpoint-2", "checkpoint-4"},
    }
    assert folders == expected.get(strategy, set())
    assert all(f"{folder}/optimizer.pt" in names for folder in folders)
    loaded = load(hub.folder / "me" / "tiny", kind)
    for name, value in parameters(trainer.model).items():
        assert torch.equal(loaded[name], value), name


def load(folder, kind):
    """Load what was uploaded with plain libraries."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if kind == "full":
        return parameters(AutoModelForCausalLM.from_pretrained(folder))
    return parameters(PeftModel.from_pretrained(make_model("full"), str(folder)))
