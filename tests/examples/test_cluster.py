"""The cluster recipes are what their systems read, and each ends in one command that whet has."""

import copy
import re
import shlex
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.examples.cluster_schemas import PYTORCH_JOB, SKY_TASK, TRAIN_JOB

FOLDER = Path(__file__).parents[2] / "examples/cluster"
SCHEMAS = {
    "pytorchjob.yaml": PYTORCH_JOB,
    "trainjob.yaml": TRAIN_JOB,
    "skypilot.yaml": SKY_TASK,
}


def read(name):
    return yaml.safe_load((FOLDER / name).read_text())


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_manifest_holds_its_schema_and_a_misspelt_field_does_not(name):
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[name])
    found = read(name)
    jsonschema.validate(found, SCHEMAS[name])
    for key in [k for k in found if isinstance(found[k], dict)] or [""]:
        wrong = copy.deepcopy(found)
        if key != "envs":
            wrong[key]["replicaz"] = 1
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(wrong, SCHEMAS[name])


def shell_of(name):
    if name == "pytorchjob.yaml":
        replicas = read(name)["spec"]["pytorchReplicaSpecs"].values()
        [text] = {r["template"]["spec"]["containers"][0]["args"][0] for r in replicas}
        return text
    if name == "trainjob.yaml":
        return read(name)["spec"]["trainer"]["args"][0]
    return read(name)["run"] if name == "skypilot.yaml" else (FOLDER / name).read_text()


@pytest.mark.parametrize("name", sorted(p.name for p in FOLDER.iterdir()))
def test_each_ends_in_the_same_command(name):
    text = shell_of(name)
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    joined = text.replace("\\\n", " ")
    [line] = re.findall(r"exec (whet train .*)", joined)
    words = shlex.split(line)
    options = dict(zip(words[3::2], words[4::2], strict=True))
    assert set(options) == {"--nnodes", "--nproc", "--node-rank", "--rdzv"}
    assert re.fullmatch(r"\$\w+:[$\w]+", options["--rdzv"])


def test_counts_agree_within_a_manifest():
    job = read("pytorchjob.yaml")["spec"]
    replicas = job["pytorchReplicaSpecs"].values()
    words = shlex.split(shell_of("pytorchjob.yaml"))
    assert int(words[words.index("--nnodes") + 1]) == sum(r["replicas"] for r in replicas)
    nproc = words[words.index("--nproc") + 1]
    limits = [
        r["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
        for r in replicas
    ]
    assert job["nprocPerNode"] == nproc and {str(n) for n in limits} == {nproc}
    trainer = read("trainjob.yaml")["spec"]["trainer"]
    words = shlex.split(trainer["args"][0])
    assert str(trainer["numNodes"]) == words[words.index("--nnodes") + 1]
    assert str(trainer["numProcPerNode"]) == words[words.index("--nproc") + 1]


def test_slurm_starts_one_task_a_machine_with_all_of_its_gpus():
    lines = (FOLDER / "slurm.sbatch").read_text().splitlines()
    keys = dict(
        line.removeprefix("#SBATCH --").split("=", 1) for line in lines if "#SBATCH" in line
    )
    assert {"job-name", "nodes", "gpus-per-node", "cpus-per-task", "time", "output"} <= set(keys)
    assert keys["ntasks-per-node"] == "1" and int(keys["nodes"]) > 1
    assert lines[0] == "#!/bin/bash"
    first = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    last = max(n for n, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert last < first, "sbatch stops reading at the first command"
