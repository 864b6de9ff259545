"""What docker/install.sh and docker/entrypoint.sh promise, in a Debian root made by debootstrap.

Minutes of work, and the network the first time: run by `make test-container`.
"""

import json
import re
import socket
import time
from pathlib import Path

import pytest

from tests.container import root

pytestmark = [
    pytest.mark.container,
    pytest.mark.slow,
    pytest.mark.skipif(bool(root.missing()), reason=root.missing() or "can be made"),
]

PASSWORD, SUDO = "a password: with 'quotes'", "another $one"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # this machine may have other work
CELL = (Path(__file__).parent / "cell.py").read_text()


def run_cell(container, code, secret=PASSWORD, kind="password", user="1000:1000"):
    port = str(container.ports["JUPYTER_PORT"])
    container.run("tee", "/tmp/cell.py", stdin=CELL, user=user)
    return container.run(
        "/opt/whet/bin/python", "/tmp/cell.py", port, kind, secret, stdin=code, user=user
    )


def ssh(container, private, command, *options):
    """Log in from inside, as the root of the test, with the key or without one."""
    container.run("sh", "-c", "umask 077; cat > /tmp/key", stdin=private or "none", user="0:0")
    return container.run(
        "ssh", "-F", "none", "-i", "/tmp/key", "-p", str(container.ports["SSH_PORT"]),
        "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "BatchMode=yes",
        "-o", "IdentitiesOnly=yes", *options, "whet@127.0.0.1", command, user="0:0", HOME="/tmp",
    )  # fmt: skip


def processes(container):
    """Return (command line, uid, environment) of each process that the container has."""
    inside = container.run(
        "sh", "-c", "for p in /proc/[0-9]*; do echo \"$p\"; done", user="0:0"
    ).stdout.split()  # fmt: skip
    base = Path(f"/proc/{container.first()}/root/proc")
    found = []
    for place in inside:
        folder = base / Path(place).name
        try:
            status = (folder / "status").read_text()
            found.append(
                (
                    (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(),
                    int(re.search(r"^Uid:\s+(\d+)", status, re.M)[1]),
                    (folder / "environ").read_bytes().decode(),
                )
            )
        except (FileNotFoundError, ProcessLookupError):
            continue  # the shell that listed them
    return found


# --- Jupyter -------------------------------------------------------------------------------------


def test_jupyter_takes_the_password_and_runs_a_cell_and_refuses_another_password(start):
    container = start(JUPYTER_PASSWORD=PASSWORD)
    code = (
        "import getpass, os, whet, torch\n"
        "print(getpass.getuser(), os.getuid(), whet.__version__, os.environ.get('JUPYTER_PASSWORD'))"
    )
    told = run_cell(container, code)
    assert told.returncode == 0, told.stderr
    assert told.stdout.split() == ["whet", "1000", "0.1.0", "None"]
    for wrong in ("", "a password", PASSWORD + "!"):
        assert run_cell(container, code, wrong).returncode == 3
    assert run_cell(container, code, PASSWORD, kind="token").returncode == 3
    assert "SSH is off" in container.output()


def test_without_a_password_a_random_token_is_printed_once(start):
    first, second = start(), start(JUPYTER_PASSWORD="  ")
    tokens = [re.findall(r"token=(\w{20,})", c.output()) for c in (first, second)]
    assert [len(found) for found in tokens] == [1, 1] and tokens[0] != tokens[1]
    token = tokens[0][0]
    assert run_cell(first, "print(6 * 7)", token, "token").stdout == "42\n"
    assert run_cell(first, "print(6 * 7)", tokens[1][0], "token").returncode == 3
    assert run_cell(first, "print(6 * 7)", "", "password").returncode == 3
    assert first.output().count(token) == 1
    assert not any(token in line for line, _, _ in processes(first))


def test_nothing_runs_as_root_and_no_process_carries_a_secret(start, key):
    container = start(JUPYTER_PASSWORD=PASSWORD, USER_PASSWORD=SUDO, SSH_KEY=key[1])
    assert run_cell(container, "print(1)").returncode == 0
    found = processes(container)
    lines = " ".join(line for line, _, _ in found)
    assert all(word in lines for word in ("tini", "jupyter", "sshd", "ipykernel"))
    assert {uid for _, uid, _ in found} == {1000}
    for line, _, environment in found:
        assert PASSWORD not in line + environment and SUDO not in line + environment, line


# --- SSH and sudo --------------------------------------------------------------------------------


def test_ssh_takes_the_key_and_nothing_else(start, key):
    container = start(SSH_KEY=key[1], USER_PASSWORD=SUDO, HF_TOKEN="hf_x")
    told = ssh(container, key[0], "id -un; command -v whet; echo $HF_HOME $HF_TOKEN $USER_PASSWORD")
    assert told.stdout.split() == [
        "whet", "/opt/whet/bin/whet", "/workspace/models/huggingface", "hf_x"
    ], told.stderr  # fmt: skip
    assert "whet 0.1.0" in ssh(container, key[0], "bash -lc 'whet --version'").stdout
    told = ssh(container, None, "id -un")
    assert told.returncode == 255 and "Permission denied (publickey)" in told.stderr
    told = ssh(container, key[0], "id", "-o", "PubkeyAuthentication=no")
    assert "Permission denied (publickey)" in told.stderr, "a password is no way in"
    assert key[1].split()[1] not in container.output()


def test_the_host_key_stays_with_the_work(start, key, tmp_path):
    seen = []
    for _ in range(2):
        container = start(SSH_KEY=key[1], volumes=tmp_path)
        seen.append(re.search(r"host key (SHA256:\S+)", container.output())[1])
        assert container.stop() == 0
    assert seen[0] == seen[1] and start(SSH_KEY=key[1]).output().count(seen[0]) == 0


def test_sudo_takes_the_password_that_was_given_and_there_is_none_without(start):
    def become_root(container, password):
        return container.run("sudo", "-S", "-k", "-p", "", "id", "-u", stdin=password + "\n")

    container = start(USER_PASSWORD=SUDO)
    assert become_root(container, SUDO).stdout == "0\n"
    assert become_root(container, "wrong").returncode != 0
    # The door is closed: whoever asks again changes nothing.
    again = container.run("sudo", "-n", "/usr/local/sbin/whet-sudo-password", stdin="mine\n")
    assert again.returncode == 0 and become_root(container, "mine").returncode != 0

    container = start()
    container.run("sudo", "-n", "/usr/local/sbin/whet-sudo-password", stdin="mine\n")
    for password in ("mine", "", "*", "!"):
        assert become_root(container, password).returncode != 0
    assert container.run("sudo", "-n", "id").returncode != 0


# --- supervision ---------------------------------------------------------------------------------


def kill(container, word, user="1000:1000"):
    assert container.run("pkill", "-KILL", "-f", word, user=user).returncode == 0


def test_what_dies_is_started_again(start, key):
    container = start(SSH_KEY=key[1], JUPYTER_PASSWORD=PASSWORD)
    kill(container, "/usr/sbin/sshd -D")
    container.wait_for("sshd ended (killed by SIGKILL); starting it again")
    kill(container, "jupyter-lab")
    container.wait_for("jupyter ended (killed by SIGKILL); starting it again")
    root.wait_until(lambda: root.health(container, SSH_KEY=key[1]).returncode == 0, container)
    assert run_cell(container, "print(1)").stdout == "1\n"
    assert ssh(container, key[0], "echo 2").stdout == "2\n"


def test_what_does_not_stay_ends_the_container_with_its_reason(start, key):
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = str(other.getsockname()[1])
        container = start(JUPYTER_PORT=port, SSH_KEY=key[1], check=False)
        assert container.process.wait(90) == 1
    told = container.output()
    assert f"port {port} is already in use" in told
    last = told.splitlines()[-1]
    assert last.startswith("whet: ended: jupyter died 3 times within 60 s (exit code 1)")


def test_what_is_killed_again_and_again_ends_the_container_with_its_reason(start, key):
    container = start(SSH_KEY=key[1])
    for times in (1, 2):
        kill(container, "jupyter-lab")
        container.wait_for("jupyter ended (killed by SIGKILL); starting it again", times)
        root.wait_until(
            lambda: container.run("pgrep", "-f", "jupyter-lab").returncode == 0, container
        )
    kill(container, "jupyter-lab")
    assert container.process.wait(30) == 1
    last = container.output().splitlines()[-1]
    assert last.startswith("whet: ended: jupyter died 3 times within 60 s (killed by SIGKILL)")


def test_a_health_check_tells_what_does_not_answer(start, key):
    container = start(SSH_KEY=key[1])
    container.run("pkill", "-STOP", "-f", "/usr/sbin/sshd -D")
    told = root.health(container, SSH_KEY=key[1])
    assert told.returncode != 0 and "sshd answers ''" in told.stdout
    assert root.health(container).returncode == 0, "Jupyter alone is well"


def test_sigterm_ends_everything_in_good_order(start, key):
    container = start(SSH_KEY=key[1], JUPYTER_PASSWORD=PASSWORD)
    assert run_cell(container, "print(1)").returncode == 0  # its kernel stays
    began = time.monotonic()
    assert container.stop() == 0
    assert time.monotonic() - began < 15, "Docker would have killed it"
    assert container.output().rstrip().endswith("whet: ended")
    assert "killed" not in container.output() and "starting it again" not in container.output()


def test_a_signal_reaches_a_command(start):
    container = start("sh", "-c", "trap 'exit 5' TERM; echo ready; while :; do sleep 0.1; done")
    container.wait_for("ready")
    assert container.stop() == 5


# --- as other users ------------------------------------------------------------------------------


@pytest.mark.parametrize("user", ["4321:4321", "4321:0", "33:33"])
def test_any_uid_can_work(start, key, user):
    container = start(user=user, SSH_KEY=key[1], JUPYTER_PASSWORD=PASSWORD)
    code = (
        "import getpass, os\nopen('/workspace/work/x', 'w')\nprint(getpass.getuser(), os.getuid())"
    )
    told = run_cell(container, code, user=user)
    assert told.stdout.split() == ["whet", user.split(":")[0]], told.stderr
    told = ssh(container, key[0], "whoami; id -u; touch ~/x && echo home")
    assert told.stdout.split() == ["whet", user.split(":")[0], "home"], told.stderr
    assert {uid for _, uid, _ in processes(container)} == {int(user.split(":")[0])}
    assert container.stop() == 0


def test_a_root_that_is_read_only_will_do(start, key, tmp_path):
    container = start(read_only=True, volumes=tmp_path, SSH_KEY=key[1], JUPYTER_PASSWORD=PASSWORD)
    assert container.run("touch", "/workspace/x", "/home/whet/x").returncode != 0
    told = run_cell(container, "open('/workspace/work/x', 'w').write('kept')")
    assert told.returncode == 0 and (tmp_path / "work" / "x").read_text() == "kept"
    assert ssh(container, key[0], "whoami").stdout == "whet\n"
    assert container.stop() == 0


def test_a_folder_that_cannot_be_written_is_told_and_the_rest_goes_on(start, key, tmp_path):
    container = start(read_only=True, SSH_KEY=key[1])
    for folder in ("work", "models"):
        told = f"/workspace/{folder} cannot be written by uid 1000; mount a folder there"
        assert container.output().count(told) == 1
    told = ssh(container, key[0], "echo $XDG_CACHE_HOME; whet --version")
    assert re.fullmatch(r"/tmp/whet-\w+/home/.cache\nwhet 0.1.0\n", told.stdout), told.stderr
    container = start(check=False, TMPDIR="/proc")
    assert (
        container.process.wait(30) == 2 and "folder /proc cannot be written" in container.output()
    )


def test_started_as_root_it_is_root_no_more(start):
    container = start(user="0:0", USER_PASSWORD=SUDO, JUPYTER_PASSWORD=PASSWORD)
    assert {uid for _, uid, _ in processes(container)} == {1000}
    assert (
        run_cell(container, "import os; print(os.getuid(), os.getgroups())").stdout
        == "1000 [1000]\n"
    )
    told = container.run("sudo", "-S", "-k", "-p", "", "id", "-u", stdin=SUDO + "\n")
    assert told.stdout == "0\n"


# --- a command, and wrong input ------------------------------------------------------------------


def test_a_command_runs_instead_and_its_exit_code_is_the_container_s(start):
    container = start("sh", "-c", "id -u; echo $USER_PASSWORD; exit 7", USER_PASSWORD=SUDO)
    assert container.process.wait(30) == 7 and container.output() == "1000\n\n"


def few_rows(work):
    """Write four of the quickstart's held-out rows where a container's volume `work` is."""
    work.mkdir()
    lines = (root.CHECKOUT / "examples/quickstart/heldout.jsonl").read_text().splitlines(True)
    (work / "rows.jsonl").write_text("".join(lines[:4]))


def test_whet_trains_in_it_unattended(start, tmp_path):
    """The pipeline's script and config as they are, but for fewer steps and held-out rows."""
    work, inside = tmp_path / "work", "/workspace/work"
    few_rows(work)
    config = json.loads((root.CHECKOUT / "examples/pipeline/nightly.json").read_text())
    config["train"] |= {"max_steps": 3, "warmup_steps": 1}
    config["data"]["train"] = "/workspace/examples/quickstart/train.jsonl"
    config["data"]["heldout"] = "rows.jsonl"
    config["eval"] = {"samples": 0}
    (work / "nightly.json").write_text(json.dumps(config))
    script = "/workspace/examples/pipeline/nightly.sh"
    container = start(script, f"{inside}/nightly.json", inside, volumes=tmp_path, **ONE_THREAD)
    assert container.process.wait(400) == 0, container.output()
    summary = json.loads((work / "summary.json").read_text())
    assert summary["status"] == "done" and summary["steps"] == 3
    assert container.output().startswith("perplexity on held-out rows: ")
    assert (work / "model/config.json").is_file() and (work / "runs/nightly/adapter").is_dir()


def test_doctor_finds_nothing_wrong_with_a_cpu(start):
    container = start("whet", "doctor")
    assert container.process.wait(120) == 0, container.output()


NOTEBOOK = """
import nbformat
from nbclient import NotebookClient
book = nbformat.read("quickstart.ipynb", 4)
first = next(cell for cell in book.cells if cell.cell_type == "code")
first.source += "\\nANSWER = 2\\nSET += ['train.max_steps=1', 'eval.samples=0']"
first.source += "\\nSET += ['data.heldout=/workspace/work/rows.jsonl']"
NotebookClient(book, timeout=400).execute()
"""


def test_the_notebooks_are_there_and_what_they_train_is_kept(start, tmp_path):
    """Runs one to its end with its first cell's values changed, as somebody at Jupyter would."""
    there = sorted(p.name for p in root.CHECKOUT.glob("notebooks/*.ipynb"))
    container = start("ls", "/workspace/notebooks")
    assert container.process.wait(30) == 0
    assert [name for name in container.output().split() if name.endswith(".ipynb")] == there
    if "quickstart.ipynb" not in there:
        pytest.skip("this checkout has no notebooks")
    few_rows(tmp_path / "work")
    command = ["sh", "-c", 'cd /workspace/notebooks && python -c "$0"', NOTEBOOK]
    container = start(*command, volumes=tmp_path, **ONE_THREAD)
    assert container.process.wait(400) == 0, container.output()
    assert (tmp_path / "work" / "runs" / "quickstart" / "report.json").is_file()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"SSH_KEY": "-----BEGIN PRIVATE KEY-----"}, "SSH_KEY must hold public keys"),
        ({"SSH_KEY": "PUBLIC\n# of hers\nssh-ed25519 AAAA x"}, "line 3 is none"),
        ({"SSH_KEY": "SECRET"}, "SSH_KEY must hold public keys"),
        ({"SSH_KEY": "PUBLIC", "SSH_PORT": "8888", "JUPYTER_PORT": "8888"}, "must differ"),
        ({"JUPYTER_PORT": "9" * 30}, "JUPYTER_PORT must be a number from 1 to 65535"),
        ({"JUPYTER_PORT": "88x"}, "JUPYTER_PORT must be a number from 1 to 65535; got '88x'"),
        ({"SSH_PORT": "70000"}, "SSH_PORT must be"),
        ({"USER_PASSWORD": SUDO, "user": "4321:4321"}, "USER_PASSWORD cannot be set"),
        (
            {"USER_PASSWORD": SUDO, "read_only": True},
            "USER_PASSWORD cannot be set (/etc cannot be written)",
        ),
    ],
)
def test_wrong_settings_are_one_sentence_and_exit_2(start, key, settings, words):
    if "SSH_KEY" in settings:
        text = settings["SSH_KEY"].replace("SECRET", key[0]).replace("PUBLIC", key[1])
        settings = {**settings, "SSH_KEY": text}
    container = start(check=False, **settings)
    assert container.process.wait(30) == 2
    told = container.output()
    [line] = [line for line in told.splitlines() if "cannot be written by uid" not in line]
    assert line.startswith("whet: ") and words in line
    assert "PRIVATE" not in told and SUDO not in told
