"""The container's files, as far as they can be judged without an engine: linted, held together."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.container import root

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
SCRIPTS = sorted([*ROOT.glob("docker/*.sh"), *ROOT.glob("examples/**/*.sh")])
SETTINGS = {"JUPYTER_PASSWORD", "JUPYTER_PORT", "SSH_KEY", "SSH_PORT", "USER_PASSWORD"}
VOLUMES = ["/workspace/work", "/workspace/models", "/workspace/datasets"]


def dockerfile_lines():
    """Return the Dockerfile's instructions, each on one line, without comments."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.M)
    return [line for line in re.sub(r"\\\n\s*", "", text).splitlines() if line.strip()]


def dependencies():
    """Return the project's requirements, its extras, and the names of those in `all`."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.10 has none
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names = extras["all"][0].removeprefix("whet[").removesuffix("]").split(",")
    return project["dependencies"], extras, names


def lint(tool, *arguments):
    """Run a linter of the test extra; its findings are the failure's text."""
    program = shutil.which(tool, path=Path(sys.executable).parent) or shutil.which(tool)
    assert program, f"{tool} comes with the extra 'test'"
    told = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)
    assert told.returncode == 0, told.stdout + told.stderr


def test_hadolint_finds_nothing():
    lint("hadolint", "--failure-threshold", "style", DOCKERFILE)


def test_hadolint_would_find_something(tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN cd /x && sudo apt-get install x\n")
    with pytest.raises(AssertionError, match="DL3006"):
        lint("hadolint", tmp_path / "Dockerfile")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    lint("shellcheck", script)
    assert script.stat().st_mode & 0o111, "scripts can be run"


def test_bases_are_pinned_and_the_user_is_not_root():
    lines = dockerfile_lines()
    bases = [line.split()[1] for line in lines if line.startswith("FROM ")]
    outside = [base for base in bases if ":" in base]
    assert len(outside) == 2 and all(re.search(r":\S+@sha256:[0-9a-f]{64}$", b) for b in outside)
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert (
        users == ["1000"] and f"ACCOUNT_ID={users[0]}" in (ROOT / "docker/install.sh").read_text()
    )
    assert any(line.startswith("HEALTHCHECK") for line in lines)
    volumes = next(line for line in lines if line.startswith("VOLUME"))
    assert re.findall(r"/workspace/\w+", volumes) == VOLUMES


def test_the_tests_have_the_image_s_environment():
    [line] = [line for line in dockerfile_lines() if line.startswith("ENV ")]
    given = dict(pair.split("=") for pair in line.split()[1:])
    expected = {**root.IMAGE_ENVIRONMENT, "PATH": given["PATH"]}
    assert given == expected and root.IMAGE_PATH == given["PATH"].replace("$PATH", root.SYSTEM_PATH)


def test_each_run_of_the_dockerfile_is_a_part_of_the_script_and_all_parts_are_run():
    script = (ROOT / "docker/install.sh").read_text()
    parts = re.search(r"\|\| parts=\((.*)\)", script)[1].split()
    runs = [line for line in dockerfile_lines() if line.startswith("RUN ")]
    assert all("/checkout/docker/install.sh --variant" in line for line in runs)
    assert sorted(line.split()[-1] for line in runs) == sorted(parts)


def test_what_a_run_reads_is_mounted_and_reaches_the_build():
    needed = {
        "torch": {"constraints.txt"},
        "libraries": {"constraints.txt", "docker/constraints.txt", "pyproject.toml", "Makefile"},
        "wheel": {"pyproject.toml", "README.md", "LICENSE", "src"},
    }
    ignored = (ROOT / "docker/Dockerfile.dockerignore").read_text().splitlines()
    folders = re.search(r"for folder in (.*); do", (ROOT / "docker/install.sh").read_text())[1]
    assert folders.split() == ["docs", "examples", "notebooks"]
    assert {f"!{folder}" for folder in folders.split()} <= set(ignored)
    for line in dockerfile_lines():
        if not line.startswith("RUN "):
            continue
        mounted = set(re.findall(r"source=([^,\s]+),target=/checkout", line))
        assert needed.get(line.split()[-1], set()) <= mounted
        for name in mounted - {"docker/install.sh"}:
            assert (ROOT / name).exists() and f"!{name}" in ignored


def test_compose_reserves_the_gpu_and_holds_no_secret():
    text = (ROOT / "docker-compose.yml").read_text()
    services = yaml.safe_load(text)["services"]
    [device] = services["whet"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]
    assert "deploy" not in services["whet-cpu"]
    assert services["whet-cpu"]["build"]["args"]["VARIANT"] == "cpu"
    for service in services.values():
        assert service["restart"] == "unless-stopped"
        assert [mount.partition(":")[2] for mount in service["volumes"]] == VOLUMES
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["env_file"] == [{"path": ".env", "required": False}]
        assert "environment" not in service
    assert not re.search(r"(PASSWORD|KEY|TOKEN)\b", text)


def test_the_example_of_settings_names_each_one_and_gives_no_secret():
    lines = (ROOT / ".env.example").read_text().splitlines()
    given = dict(line.split("=", 1) for line in lines if line and line[0] != "#")
    assert set(given) >= SETTINGS
    assert all(not value for name, value in given.items() if not name.endswith("_PORT"))
    assert "/.env" in (ROOT / ".gitignore").read_text().splitlines()
    documented = (ROOT / "docs/container.md").read_text()
    assert all(f"`{name}`" in documented for name in given)


def test_the_entrypoint_reads_these_settings_and_no_other():
    script = (ROOT / "docker/entrypoint.sh").read_text()
    read = set(re.findall(r"\$\{([A-Z_]+):-", script)) - {"HOME", "TMPDIR"}
    assert read - {"XDG_CACHE_HOME"} == SETTINGS - {"JUPYTER_PASSWORD"}  # its Python reads that one
    assert 'os.environ.get("JUPYTER_PASSWORD", "")' in script


def test_all_is_every_extra_but_those_of_development_and_one_that_must_be_built():
    _, extras, names = dependencies()
    assert set(names) == set(extras) - {"all", "test", "docs", "deepspeed"}


def test_what_pip_would_take_the_newest_of_is_pinned():
    asked, extras, names = dependencies()
    asked = [*asked, "ipywidgets", "jupyterlab", *(line for name in names for line in extras[name])]
    pinned = set()
    for file in ("constraints.txt", "docker/constraints.txt"):
        lines = (ROOT / file).read_text().splitlines()
        pinned |= {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    assert {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in asked} <= pinned
