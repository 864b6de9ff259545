import errno
import os
import subprocess
import sys

import pytest

from whet.config_file import load_config
from whet.errors import InputError, WhetError
from whet.runs import RunFolder, require_free, resume_run, start_run, whole_folder, write_text


@pytest.fixture
def config(tmp_path):
    return load_config({"run": {"name": "r", "dir": str(tmp_path)}})


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    write_text(file, "old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WhetError, match="the disk is full"):
        write_text(file, "new")
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_is_whole_or_absent(tmp_path):
    folder = tmp_path / "adapter"
    with pytest.raises(KeyError), whole_folder(folder) as temporary:
        (temporary / "half").write_text("x")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    for text in ("one", "two"):
        with whole_folder(folder) as temporary:
            (temporary / "file").write_text(text)
            (temporary / "file").chmod(0o600)
    plain = tmp_path / "adapter" / "plain"
    plain.write_text("")
    assert (folder / "file").stat().st_mode == plain.stat().st_mode
    assert (folder / "file").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_a_file_size_limit_is_told_in_one_sentence(tmp_path):
    """The kernel refuses the write for real, in a process of its own, for text and for safetensors."""
    code = f"""
import resource, torch
from pathlib import Path
from safetensors.torch import save_file
from whet.errors import WhetError
from whet.runs import whole_folder
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for save in (
    lambda f: save_file({{"w": torch.zeros(65536)}}, f / "w.safetensors"),
    lambda f: torch.save(torch.zeros(65536), f / "w.pt"),
    lambda f: (f / "w.txt").write_text("x" * 65536),
):
    try:
        with whole_folder(Path({str(tmp_path)!r}) / "out") as folder:
            save(folder)
    except WhetError as error:
        print(error)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("could not be written") == 3
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_run_is_moved_aside_not_overwritten(config, tmp_path):
    for number in range(3):
        run, moved = start_run(config)
        write_text(run.path / "mine", str(number))
        assert moved == (None if number == 0 else tmp_path / f"r.{number}")
    assert (tmp_path / "r.1" / "mine").read_text() == "0"
    assert (tmp_path / "r.2" / "mine").read_text() == "1"


def test_a_run_in_progress_is_not_touched(config):
    run, _ = start_run(config)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        write_text(run.lock_file, str(other.pid))
        with pytest.raises(InputError, match=f"being trained by process {other.pid}"):
            start_run(config)
        with pytest.raises(InputError, match="being trained"), run.lock():
            pass
    finally:
        other.kill()
        other.wait()
    with run.lock():  # its holder has died
        assert run.lock_file.read_text() == str(os.getpid())
    assert not run.lock_file.exists()


def test_resume_refuses_settings_that_change_the_numbers(config):
    run, _ = start_run(config)
    (run.checkpoints_dir / "step-3").mkdir(parents=True)
    changed = load_config(config, ["lora.rank=8", "train.max_steps=9"])
    with pytest.raises(InputError, match=r"lora\.rank: 16 became 8") as caught:
        resume_run(changed, "")
    assert "max_steps" not in str(caught.value)
    _, checkpoint = resume_run(load_config(config, ["train.max_steps=9"]), "")
    assert checkpoint.name == "step-3"
    assert run.config.train.max_steps == 9


def test_there_may_be_nothing_to_resume(config):
    with pytest.raises(InputError, match="no run"):
        resume_run(config, "")
    start_run(config)
    with pytest.raises(InputError, match="no checkpoint"):
        resume_run(config, "")


def test_a_run_does_not_go_on_with_other_data(config):
    run, _ = start_run(config)
    run.update_report(data={"sha256": "then"})
    with pytest.raises(InputError, match="the data has changed"):
        resume_run(config, "now")


def test_a_run_that_never_made_a_step_is_not_kept(config):
    run, _ = start_run(config)
    run.update_report(device="cpu")
    again, moved = start_run(config)
    assert moved is None and again.report == {}


def test_checkpoints_are_ordered_by_step_and_half_ones_ignored(config):
    run, _ = start_run(config)
    for name in ("step-10", "step-9", ".step-11.1234.tmp"):
        (run.checkpoints_dir / name).mkdir(parents=True)
    assert [p.name for p in run.checkpoints()] == ["step-9", "step-10"]
    with run.lock():
        assert not (run.checkpoints_dir / ".step-11.1234.tmp").exists()


def test_metrics_survive_a_line_cut_by_a_kill(config):
    run, _ = start_run(config)
    run.metrics_file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert [row["step"] for row in run.metrics()] == [1, 2]
    run.forget_metrics_after(1)
    assert run.metrics_file.read_text() == '{"step": 1}\n'


def test_too_little_disk_is_told_before_the_work(tmp_path):
    with pytest.raises(WhetError, match="keeping the checkpoints needs"):
        require_free(tmp_path / "not" / "there", 2**60, "keeping the checkpoints")


def test_only_a_finished_run_opens(config, tmp_path):
    with pytest.raises(InputError, match="is not a run"):
        RunFolder.open(tmp_path)
    run, _ = start_run(config)
    with pytest.raises(InputError, match="no trained weights yet"):
        RunFolder.open(run.path)
    run.adapter_dir.mkdir()
    assert RunFolder.open(run.path).weights_dir == run.adapter_dir
