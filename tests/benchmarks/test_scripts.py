import csv
import io
import json
import os
import subprocess
import zipfile
from pathlib import Path

import pytest
from benchmarks.summary import summarise

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.sh"))


def run(*words, **variables):
    return subprocess.run(
        ["bash", *map(str, words)], capture_output=True, text=True, env={**os.environ, **variables}
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_bash_accepts_the_script(script):
    assert run("-n", script).stderr == ""


def test_a_dry_run_prints_a_command_for_every_part_in_the_list_and_makes_nothing(tmp_path):
    results = str(tmp_path / "results")
    listed = run(ROOT / "benchmarks/gpu.sh", "--list").stdout.splitlines()
    dry = run(ROOT / "benchmarks/gpu.sh", "--dry-run", RESULTS_DIR=results).stdout.splitlines()
    assert [line.split()[0] for line in listed] == [line.split(":")[0] for line in dry]
    assert all(": timeout -k 10 4" in line for line in dry)
    assert not Path(results).exists()


def test_without_a_cuda_device_a_part_says_so_in_one_line(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho False\n")
    python.chmod(0o755)
    done = run(ROOT / "benchmarks/gpu.sh", "tests", PYTHON=str(python))
    assert (done.stdout, done.stderr) == ("tests: left out, no CUDA device\n", "")


def test_an_unknown_part_is_refused_with_the_names_of_all():
    done = run(ROOT / "benchmarks/gpu.sh", "tets")
    assert done.returncode == 2
    assert "no part 'tets'; use tests kernels" in done.stderr


def test_a_part_that_is_done_is_skipped_and_one_that_fails_stops_no_other(tmp_path):
    python, results = tmp_path / "python", tmp_path / "results"
    # Answers "is there CUDA", fails as pytest, and does well as everything else.
    python.write_text(
        '#!/bin/sh\ncase "$*" in *is_available*) echo True;; *"-m pytest"*) exit 1;; esac\n'
    )
    python.chmod(0o755)
    variables = {"PYTHON": str(python), "RESULTS_DIR": str(results)}
    first = run(ROOT / "benchmarks/gpu.sh", "tests", "kernels", **variables).stdout
    second = run(ROOT / "benchmarks/gpu.sh", "tests", "kernels", **variables).stdout
    assert "tests: failed with code 1" in first and "tests: failed with code 1" in second
    assert "kernels: done already" in second and "kernels: done already" not in first
    assert not (results / "tests.done").exists()


def test_wheels_over_the_limit_are_joined_again_and_a_broken_piece_is_found(tmp_path):
    wheel = tmp_path / "big-1.0-py3-none-any.whl"
    wheel.write_bytes(b"0123456789" * 100)
    shell = (
        f'cd "{tmp_path}" && sha256sum {wheel.name} >{wheel.name}.sha256 && split -b 600 -d -a 2'
    )
    assert run("-c", f"{shell} {wheel.name} {wheel.name}.piece- && rm {wheel.name}").returncode == 0
    assert run(ROOT / "benchmarks/wheels.sh", "join", tmp_path).returncode == 0
    assert wheel.read_bytes() == b"0123456789" * 100
    wheel.unlink()
    (tmp_path / f"{wheel.name}.piece-01").write_bytes(b"broken")
    assert run(ROOT / "benchmarks/wheels.sh", "join", tmp_path).returncode != 0
    assert not wheel.exists()


def test_a_repacked_wheel_names_in_record_what_it_holds(tmp_path):
    wheel = tmp_path / "bitsandbytes-0-py3-none-any.whl"
    names = [f"bitsandbytes/libbitsandbytes_{kind}.so" for kind in ("cpu", "cuda126", "cuda130")]
    record = "bitsandbytes-0.dist-info/RECORD"
    with zipfile.ZipFile(wheel, "w") as made:
        for name in names:
            made.writestr(name, name)
        made.writestr(record, "".join(f"{name},sha256=x,1\n" for name in names) + f"{record},,\n")
    script = (ROOT / "benchmarks/wheels.sh").read_text()
    function = script[script.index("repack() {") : script.index("collect() {")]
    assert run("-c", f'PYTHON=python3\n{function}\nrepack "{wheel}" cuda130').returncode == 0
    with zipfile.ZipFile(wheel) as smaller:
        rows = [row[0] for row in csv.reader(io.StringIO(smaller.read(record).decode()))]
        assert rows == smaller.namelist() == [names[0], names[2], record]
    assert "has no library" in run(
        "-c", f'PYTHON=python3\n{function}\nrepack "{wheel}" cuda999'
    ).stderr  # fmt: skip


def test_the_summary_reads_every_kind_of_result_and_leaves_out_what_is_broken(tmp_path):
    entry = {
        "title": "whet default", "invalid": "", "step_seconds": 1.0, "ratio": 1.0, "mfu": 0.4,
        "tokens_per_second": 900.0, "above_bytes": 2**30, "heldout_loss": 1.5,
    }  # fmt: skip
    failed = {**entry, "title": "trl default", "step_seconds": 0.0, "invalid": "did not start"}
    row = {
        "kernel": "norm", "pass": "forward", "ours_ms": 1.0, "eager_ms": 2.0,
        "percent_of_ceiling": 80.0,
    }  # fmt: skip
    search = {
        "peer": "whet", "memory_gib": 8.0, "fits": 2048, "fails": 3000, "reason": "", "tries": [],
    }  # fmt: skip
    files = {
        "kernels": {"rows": [row]},
        "peers": {
            "workloads": [{"workload": {"name": "w"}, "entries": [entry, failed], "left_out": []}]
        },
        "contexts": {"found": [search]},
    }
    for name, found in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    (tmp_path / "half.json").write_text('{"rows": [')
    (tmp_path / "tests.log").write_text("....\n12 passed, 3 skipped in 40.1s\n")
    text = "\n".join(summarise(tmp_path))
    for words in (
        "12 passed", "eager 2.00x", "held-out 1.5000", "did not start", "2,048", "half.json: not whole",
    ):  # fmt: skip
        assert words in text
