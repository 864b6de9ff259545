"""The command line as a person uses it: words, exit codes, and what is left behind."""

import io
import json
import os
import subprocess
import sys

import pytest

from whet.cli import main
from whet.config_file import load_config, to_yaml
from whet.errors import InputError
from whet.train.recipe import LogListener, fit


@pytest.fixture
def whet(capsys, monkeypatch):
    """Run the command line in this process (a new one takes seconds to import torch)."""

    def run(*arguments, cwd=None, stdin=""):
        monkeypatch.setattr(sys, "argv", ["whet", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        if cwd is not None:
            monkeypatch.chdir(cwd)
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        told = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, told.out, told.err)

    return run


@pytest.fixture(scope="module")
def trained(tiny_model, rows_file, tmp_path_factory):
    config = load_config(
        {
            "run": {"name": "tiny", "dir": str(tmp_path_factory.mktemp("runs"))},
            "model": {"name": str(tiny_model)},
            "data": {"train": str(rows_file), "heldout_fraction": 0.2, "system": "be brief"},
            "train": {"batch_size": 4, "max_steps": 4, "learning_rate": 5e-3, "warmup_steps": 0},
        }
    )
    return fit(config, listener=LogListener())


@pytest.mark.parametrize(
    "command",
    ["", "init", "doctor", "top", "data", "train", "eval", "generate", "chat", "serve", "export"],
)
def test_help_needs_no_torch(command):
    code = (
        "import sys; sys.argv = ['whet', *sys.argv[1:]]\n"
        "from whet.cli import main\n"
        "try: main()\n"
        "finally: print('HEAVY', sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, *command.split(), "--help"], capture_output=True, text=True
    )
    assert told.returncode == 0 and "Usage:" in told.stdout and "HEAVY []" in told.stdout


def test_importing_whet_loads_nothing_heavy():
    code = "import sys, whet; print({'torch', 'pydantic', 'typer', 'yaml'} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert told.stdout.strip() == "set()"


def test_help_of_train_is_the_config_s_own_documentation(whet):
    text = whet("train", "--help").stdout
    assert "lora.rank = 16" in text and "Rank of the update" in text


def test_an_unknown_key_exits_2_and_names_the_right_one(whet, config, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(to_yaml(config))
    told = whet("train", file, "--set", "lora.rnk=8")
    assert told.returncode == 2
    assert "`lora.rnk`; did you mean `lora.rank`?" in told.stderr and "Traceback" not in told.stderr
    assert not os.path.exists(config.run.dir)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"], "got neither"),
        (["trian"], "No such command"),
        (["train", "c.yaml", "--sett", "a=b"], "No such option"),
        (["train", "nowhere.yaml"], "there is no config file 'nowhere.yaml'"),
        (
            ["train", "c.yaml", "--set", "data.train=nowhere.jsonl"],
            "'nowhere.jsonl' does not exist",
        ),
        (["train", "c.yaml", "--set", "data.train=c.yaml"], "suffix whet does not read"),
        (["train", "c.yaml", "--set", "model.name=./nowhere"], "'./nowhere' does not exist"),
        (["train", "c.yaml", "--set", "lora.targets=[q_prj]"], "did you mean 'q_proj'"),
        (["train", "c.yaml", "--set", "model.max_length=1000"], "256 tokens"),
        (["train", "c.yaml", "--resume"], "there is no run"),
        (["data", "c.yaml", "--set", "data.columns={text: body}"], "names 'text'"),
        (["eval", "nowhere/at/all"], "'nowhere/at/all' does not exist"),
        (["generate", ".", "-p", "x"], "is not a Hugging Face model"),
        (["generate", "m", "-p", "x", "--top-p", "3"], "top_p must be"),
        (["export", "."], "is not a run"),
        (["export", ".", "--to", "gguff"], "gguff"),
        (["init", "c.yaml"], "'c.yaml' exists already"),
        (["init", "--template", "slft"], "did you mean 'sft'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_input_is_one_sentence_and_exit_2(whet, config, tmp_path, arguments, words):
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    told = whet(*arguments, cwd=tmp_path)
    assert told.returncode == 2, told.stderr
    assert words in told.stderr and "Traceback" not in told.stderr
    assert not (tmp_path / "runs" / "tiny" / "adapter").exists()


def test_debug_gives_the_traceback(whet):
    with pytest.raises(InputError):
        whet("train", "nowhere.yaml", "--debug")


def test_a_fresh_process_ends_with_the_same_codes(tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "whet", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    assert run("--version").stdout.startswith("whet 0.")
    for arguments in (["train", "nowhere.yaml"], ["train"], ["export", ".", "--to", "gguff"]):
        told = run(*arguments)
        assert told.returncode == 2 and "Traceback" not in told.stderr


def test_a_model_that_the_hub_does_not_give_is_one_sentence(config, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(to_yaml(config))
    told = subprocess.run(
        [sys.executable, "-m", "whet", "train", file, "--set", "model.name=no-org/no-model"],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert told.returncode == 2 and "no-org/no-model" in told.stderr, told.stderr
    assert "Traceback" not in told.stderr


def test_ctrl_c_outside_training_ends_with_130(whet, config, tmp_path, monkeypatch):
    import whet.evaluate as module

    def interrupted(*_):
        raise KeyboardInterrupt

    (tmp_path / "c.yaml").write_text(to_yaml(config))
    monkeypatch.setattr(module, "mean_loss", interrupted)
    told = whet("train", tmp_path / "c.yaml")
    assert told.returncode == 130 and "whet: stopped" in told.stderr


def test_init_data_print_config_and_train_follow_each_other(whet, tiny_model, rows_file, tmp_path):
    assert whet("init", "mine.yaml", cwd=tmp_path).returncode == 0
    sets = [
        f"--set={text}"
        for text in (f"model.name={tiny_model}", f"data.train={rows_file}", "train.max_steps=2")
    ]
    told = whet("data", "mine.yaml", *sets, cwd=tmp_path)
    assert told.returncode == 0 and "tokens learned" in told.stdout, told.stderr
    report = json.loads(whet("data", "mine.yaml", *sets, "--json", cwd=tmp_path).stdout)
    assert report["train"]["examples"] == 20 and report["heldout"]["examples"] == 2
    printed = whet("train", "mine.yaml", *sets, "--print-config", cwd=tmp_path).stdout
    assert "max_steps: 2" in printed and not (tmp_path / "runs").exists()
    told = whet("train", "mine.yaml", *sets, cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    lines = told.stdout.splitlines()
    assert sum(line.startswith("step ") for line in lines) == 2
    assert any("perplexity" in line for line in lines) and "whet chat runs/mine" in told.stdout
    assert "\x1b" not in told.stdout, "no terminal codes in a pipe"
    assert "Traceback" not in told.stderr


def test_eval_shows_base_and_tuned(whet, trained):
    told = whet("eval", trained.path)
    assert told.returncode == 0, told.stderr
    assert "base" in told.stdout and "tuned" in told.stdout and "perplexity" in told.stdout
    found = json.loads(whet("eval", trained.path, "--json").stdout)
    assert found["tuned"]["loss"] == pytest.approx(
        trained.report["evaluation"]["tuned"]["loss"], rel=1e-4
    )


def test_generate_uses_the_system_prompt_of_the_run(whet, trained):
    told = whet(
        "generate", trained.path, "-p", "say red", "--max-new-tokens", 6, "--json", "--logprobs"
    )
    assert told.returncode == 0, told.stderr
    (answer,) = json.loads(told.stdout)
    assert "be brief" in answer["prompt"] and answer["num_tokens"] == len(answer["logprobs"]) <= 6
    raw = whet("generate", trained.path, "-p", "say red", "--raw", "--max-new-tokens", 4, "--echo")
    assert raw.stdout.startswith("say red")


def test_chat_answers_each_line(whet, trained):
    told = whet(
        "chat", trained.path, "--max-new-tokens", 4, stdin="say red\n/reset\n\nsay blue\n/exit\nx\n"
    )
    assert told.returncode == 0, told.stderr
    assert len(told.stdout.splitlines()) >= 2 and "Traceback" not in told.stderr


def test_export_writes_checks_and_keeps_what_is_not_its_own(whet, trained, tmp_path):
    told = whet("export", trained.path, "--out", tmp_path / "m", "--dtype", "bfloat16")
    assert told.returncode == 0, told.stderr
    assert "200 of 200 strings equal" in told.stdout and "FAIL" not in told.stdout
    assert whet("export", trained.path, "--out", tmp_path / "m").returncode == 0  # again, over it
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    told = whet("export", trained.path, "--to", "adapter", "--out", mine)
    assert told.returncode == 2 and "holds something else" in told.stderr
    assert [p.name for p in mine.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "gguf", "--dtype", "float16"], "--dtype is for --to merged"),
        (["--to", "merged", "--quant", "f16"], "--quant is for --to gguf and ollama"),
        (["--to", "gguf", "--quant", "q4_km"], "did you mean 'q4_k_m'"),
        (["--bits", "3"], "--bits 4 is for --to merged"),
        (["--to", "adapter", "--base", "dequantised"], "an adapter is written as it was trained"),
        (["--base", "dequantised"], "leave --base out"),
        (["--to", "llama2c"], "llama2.c has no place for this model"),
    ],
)
def test_an_export_that_cannot_be_is_told(arguments, words, whet, trained, tmp_path):
    told = whet("export", trained.path, "--out", tmp_path / "m", *arguments)
    assert told.returncode == 2 and words in told.stderr
    assert not list(tmp_path.glob("m/*"))


def test_doctor_finds_no_fault_here(whet, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    told = whet("doctor")
    assert told.returncode == 0 and "ok  CPU" in told.stdout, told.stdout
    assert json.loads(whet("doctor", "--json").stdout)[0]["name"] == "system"


def test_generate_reads_files_of_prompts_and_all_samplers(whet, trained, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('"say red"\n{"messages": [{"role": "user", "content": "say blue"}]}\n')
    sampling = ["--temperature", 1, "--top-k", 20, "--min-p", 0.01, "--repetition-penalty", 1.1]
    told = whet(
        "generate", trained.path, "-p", "say four", "--prompts", file, "--max-new-tokens", 5, *sampling,
        "--stop", "\\n", "--seed", 2, "--logprobs", "--top-logprobs", 2, "--json",
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    answers = json.loads(told.stdout)
    assert [
        a["prompt"].count(w) for a, w in zip(answers, ("four", "red", "blue"), strict=True)
    ] == [1] * 3
    assert all(len(item["top"]) == 2 for answer in answers for item in answer["logprobs"])
    alone = whet(
        "generate", trained.path, "-p", "say blue", "--max-new-tokens", 5, *sampling, "--stop", "\\n",
        "--seed", 2, "--json",
    )  # fmt: skip
    assert json.loads(alone.stdout)[0]["text"] == answers[2]["text"]
    assert whet("generate", trained.path).returncode == 2
    wrong = whet("generate", trained.path, "-p", "a", "--min-p", 3, "--top-k", -1)
    assert wrong.returncode == 2 and "min_p" in wrong.stderr and "top_k" in wrong.stderr


def test_serve_refuses_before_it_loads(whet, trained, monkeypatch):
    monkeypatch.delenv("WHET_API_KEY", raising=False)
    told = whet("serve", trained.path, "--host", "0.0.0.0")
    assert told.returncode == 2 and "WHET_API_KEY" in told.stderr
    monkeypatch.setenv("WHET_API_KEY", " ")
    assert "empty" in whet("serve", trained.path).stderr
    monkeypatch.setenv("WHET_API_KEY", "k")
    assert whet("serve", trained.path, "--slots", 0).returncode == 2
    monkeypatch.setitem(sys.modules, "fastapi", None)
    told = whet("serve", trained.path, "--host", "0.0.0.0")
    assert told.returncode == 2 and "pip install 'whet[serve]'" in told.stderr
