"""`whet train` where nobody watches: one JSON object, exit codes, no questions; and its examples."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from whet.config_file import load_config, load_json_config
from whet.errors import InputError

PIPELINE = Path(__file__).resolve().parents[1] / "examples" / "pipeline"


@pytest.fixture
def config_json(config, tmp_path):
    """The tiny model's config as a program writes it: JSON, indented by tabs, which YAML refuses."""
    file = tmp_path / "c.json"
    tree = config.model_dump()
    tree["train"]["max_steps"] = 2
    file.write_text(json.dumps(tree, indent="\t"))
    return file


def run_whet(*arguments, cwd, stdin=None, code=None, **more):
    """Run whet in a process of its own, as a pipeline does; `code` runs first in that process."""
    program = ["-m", "whet"]
    if code:
        program = ["-c", f"{code}\nimport sys\nfrom whet.cli import main\nmain()"]
    return subprocess.run(
        [sys.executable, *program, *map(str, arguments)],
        input=stdin, capture_output=True, text=True, cwd=cwd, **more,
    )  # fmt: skip


def test_the_summary_is_all_of_standard_output_and_nothing_can_ask(config_json, tmp_path):
    # What a library or a user's function might do: print, and ask.
    code = (
        "import whet.train.recipe as recipe\n"
        "plain = recipe.load_model\n"
        "def load_model(*a, **k):\n"
        "    print('NOISE')\n"
        "    try: print('ANSWER', input('log in? '))\n"
        "    except EOFError: print('NOBODY')\n"
        "    return plain(*a, **k)\n"
        "recipe.load_model = load_model\n"
    )
    told = run_whet(
        "train", "--config-json", config_json, "--json", cwd=tmp_path, stdin="yes\n", code=code
    )
    assert told.returncode == 0, told.stderr
    summary = json.loads(told.stdout)
    assert summary["status"] == "done" and summary["exit_code"] == 0 and summary["steps"] == 2
    report = json.loads((Path(summary["run"]) / "report.json").read_text())
    for model in ("base", "tuned"):
        found = report["evaluation"][model]["perplexity"]
        assert summary["evaluation"][model]["perplexity"] == found
    metrics = (Path(summary["run"]) / "metrics.jsonl").read_text().splitlines()
    assert summary["loss"] == [json.loads(m)["loss"] for m in metrics if '"loss"' in m][-1]
    assert (Path(summary["weights"]) / "adapter_config.json").is_file()
    assert "NOISE" in told.stderr and "NOBODY" in told.stderr and "ANSWER" not in told.stderr
    assert "step 2/2" in told.stderr


def test_a_config_comes_through_standard_input(config_json, tmp_path):
    told = run_whet("train", "--config-json", "-", "--print-config", "--set", "train.seed=7",
                    cwd=tmp_path, stdin=config_json.read_text())  # fmt: skip
    assert told.returncode == 0, told.stderr
    assert yaml.safe_load(told.stdout)["train"]["seed"] == 7


@pytest.mark.parametrize(
    ("arguments", "content", "words"),
    [
        (["--config-json", "c.json"], '{"train": {"lr": 1}}', "learning_rate"),
        (["--config-json", "c.json"], '{"train": {},}', "c.json:1:14"),
        (["--config-json", "c.json"], "train: {}", "c.json:1:1"),
        (["--config-json", "c.json"], '{"run": {}, "run": {}}', "'run' is given twice"),
        (["--config-json", "c.json"], "[]", "must hold sections"),
        (["--config-json", "none.json"], "", "there is no config file"),
        (["c.json", "--config-json", "c.json"], "{}", "got both"),
        ([], "", "got neither"),
    ],
)
def test_wrong_input_is_an_object_a_sentence_and_exit_2(
    arguments, content, words, tmp_path, capsys, monkeypatch
):
    from whet.cli import main

    (tmp_path / "c.json").write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["whet", "train", *arguments, "--json"])
    with pytest.raises(SystemExit) as end:
        main()
    told = capsys.readouterr()
    summary = json.loads(told.out)
    assert end.value.code == summary["exit_code"] == 2 and summary["status"] == "wrong input"
    assert words in summary["error"] and summary["error"] in told.err
    assert os.listdir(tmp_path) == ["c.json"]


def test_a_failure_of_the_work_is_told_in_the_object_too(config_json, capsys, monkeypatch):
    from whet import cli_train
    from whet.cli import main
    from whet.train import recipe

    def load_model(*arguments, **named):
        raise ZeroDivisionError("nothing left")

    monkeypatch.setattr(recipe, "load_model", load_model)
    monkeypatch.setattr(cli_train, "_close_input", lambda: None)  # this process's own
    arguments = ["whet", "train", "--config-json", str(config_json), "--json"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(ZeroDivisionError):  # which Python tells, and exits with 1
        main()
    summary = json.loads(capsys.readouterr().out)
    assert summary == {"status": "failed", "exit_code": 1, "error": "nothing left"}


def test_sigterm_leaves_a_checkpoint_and_resume_goes_on(config_json, tmp_path):
    command = [sys.executable, "-m", "whet", "train", "--config-json", str(config_json), "--json"]
    long = ["--set", "train.max_steps=100000", "--set", "train.epochs=100000"]
    run = subprocess.Popen(
        [*command, *long], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    for line in run.stderr:
        if line.startswith("step "):
            break
    run.send_signal(signal.SIGTERM)
    out, _ = run.communicate(timeout=60)
    summary = json.loads(out)
    assert run.returncode == summary["exit_code"] == 130 and summary["status"] == "stopped"
    [checkpoint] = (tmp_path / "runs" / "tiny" / "checkpoints").glob("step-*")
    steps = int(checkpoint.name.removeprefix("step-"))
    assert f"after step {steps}" in summary["error"]


def test_files_beside_a_json_config_are_found_from_anywhere(monkeypatch, tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    (tmp_path / "c.json").write_text('{"data": {"train": "rows.jsonl"}}')
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = load_json_config("../c.json", ["train.seed=3"])
    assert found.data.train == str(tmp_path / "rows.jsonl") and found.train.seed == 3
    with pytest.raises(InputError, match="bytes? 0"):
        (tmp_path / "c.json").write_bytes(b"\xff\xfe{")
        load_json_config("../c.json")


# --- examples/pipeline ---------------------------------------------------------------------------


def test_the_examples_config_is_one():
    config = load_json_config(str(PIPELINE / "nightly.json"))
    assert config == load_config(PIPELINE / "nightly.json") and Path(config.data.train).is_file()


def test_the_workflow_and_the_timers_say_what_exists():
    workflow = yaml.safe_load((PIPELINE / "github-actions.yml").read_text())
    steps = workflow["jobs"]["train"]["steps"]
    lines = [line for step in steps for line in step.get("run", "").splitlines()]
    assert "whet train --config-json fine-tune.json --json > summary.json" in lines
    service = (PIPELINE / "whet-nightly.service").read_text()
    timer = (PIPELINE / "whet-nightly.timer").read_text()
    assert "SuccessExitStatus=130" in service and "OnCalendar=" in timer
    [line] = [
        text
        for text in (PIPELINE / "whet.crontab").read_text().splitlines()
        if text and text[0].isdigit()
    ]
    for text in (service, line):
        assert "/workspace/examples/pipeline/nightly.sh" in text
    for file in ("nightly.sh", "nightly.json"):
        assert (PIPELINE / file).is_file()


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_takes_the_units_as_they_are(tmp_path):
    files = [tmp_path / name for name in ("whet-nightly.service", "whet-nightly.timer")]
    for file in files:
        text = (PIPELINE / file.name).read_text()
        file.write_text(text.replace("/workspace/examples/pipeline", str(PIPELINE)))
    told = subprocess.run(["systemd-analyze", "verify", *files], capture_output=True, text=True)
    assert told.returncode == 0 and not told.stdout + told.stderr


FAKE_WHET = r"""#!/usr/bin/env bash
echo "$@" >> calls
case $1 in
    train) mkdir -p runs/nightly/checkpoints; cat answer; exit $(cat code) ;;
    export) mkdir model.new; echo new > model.new/weights ;;
esac
"""


def test_the_nightly_script_exports_what_got_better_and_resumes_what_was_stopped(tmp_path):
    fake = tmp_path / "bin" / "whet"
    fake.parent.mkdir()
    fake.write_text(FAKE_WHET)
    fake.chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()

    def night(code, tuned=None, status="done"):
        scores = {"base": {"perplexity": 9.0}, "tuned": {"perplexity": tuned}} if tuned else {}
        answer = {"status": status, "exit_code": code, "evaluation": scores}
        (work / "answer").write_text(json.dumps(answer, indent=2))
        (work / "code").write_text(str(code))
        (work / "calls").write_text("")
        path = f"{fake.parent}:{os.environ['PATH']}"
        done = subprocess.run(
            [PIPELINE / "nightly.sh", PIPELINE / "nightly.json", work],
            env={**os.environ, "PATH": path}, capture_output=True, text=True,
        )  # fmt: skip
        return done.returncode, (work / "calls").read_text()

    code, calls = night(130, status="stopped")
    assert code == 130 and "--resume" not in calls and "export" not in calls
    code, calls = night(0, tuned=9.5)
    assert code == 3 and "--resume" in calls and not (work / "model").exists()
    code, calls = night(0, tuned=2.0)
    assert code == 0 and "--resume" not in calls
    assert (work / "model" / "weights").read_text() == "new\n"
    code, calls = night(2, status="wrong input")
    assert code == 2 and (work / "model").is_dir()
    code, calls = night(0, tuned=2.0)
    assert code == 0 and "--resume" not in calls and (work / "model.old").is_dir()
