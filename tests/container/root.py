"""A Debian root with whet in it, and containers of it, without a container engine.

debootstrap makes the root, docker/install.sh fills it, namespaces and overlay mounts do what an engine
would. Needs root on a Linux machine; packages come from where this machine's apt and pip take theirs.
What takes long is kept in the user's cache folder: the base, and the libraries under a hash of what
names them. whet itself and the entrypoint are installed anew each time.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
# Read when this module is: the tests set XDG_CACHE_HOME to a folder of their own later.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "whet-container"
SUITE = "bookworm"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
IMAGE_PATH = f"/opt/whet/bin:{SYSTEM_PATH}"
# What the Dockerfile's ENV says.
IMAGE_ENVIRONMENT = {
    "PATH": IMAGE_PATH,
    "HF_HOME": "/workspace/models/huggingface",
    "XDG_CACHE_HOME": "/workspace/work/.cache",
}
VOLUMES = ("work", "models", "datasets")

# What an engine does before the first process: mounts at $M, then the user.
ENTER = r"""
set -e
mount -t overlay overlay -o "lowerdir=$LOWER,upperdir=$UPPER,workdir=$WORK" "$M"
mount -t proc proc "$M/proc"
mount --rbind /dev "$M/dev"
mount -t tmpfs -o mode=1777 tmpfs "$M/tmp"
[ -e "$M/etc/resolv.conf" ] || : > "$M/etc/resolv.conf"
mount --bind /etc/resolv.conf "$M/etc/resolv.conf"
while [ "$1" != -- ]; do
    if [ -d "$1" ]; then mkdir -p "$M$2"; else mkdir -p "$(dirname "$M$2")"; : >> "$M$2"; fi
    mount --bind "$1" "$M$2"
    shift 2
done
shift
[ -z "$READ_ONLY" ] || mount -o remount,ro "$M"
user=$1 groups=$2
shift 2
exec chroot --userspec="$user" --groups="$groups" "$M" /usr/bin/env -i "$@"
"""


@dataclass(frozen=True)
class Layer:
    """A folder of an overlay and those below it, the topmost first."""

    folders: tuple[Path, ...]


def missing() -> str:
    """Return why no root can be made here, or nothing."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "needs root on Linux"
    tools = [
        name
        for name in ("debootstrap", "unshare", "nsenter", "ssh-keygen")
        if not shutil.which(name)
    ]
    return f"needs {', '.join(tools)}" if tools else ""


def command_in(
    layer: Layer,
    upper: Path,
    argv: Sequence[str],
    environment: dict[str, str],
    binds: Sequence[tuple[Path, str]] = (),
    user: str = "0:0",
    read_only: bool = False,
) -> tuple[list[str], dict[str, str]]:
    """Return the command that runs `argv` in a root of its own, as process 1, and ENTER's variables."""
    places = [part for source, target in binds for part in (str(source), target)]
    settings = [f"{name}={value}" for name, value in environment.items()]
    group = user.partition(":")[2]
    entering = ["sh", "-c", ENTER, "enter", *places, "--", user, group, *settings, *argv]
    variables = {
        "LOWER": ":".join(map(str, layer.folders)),
        "UPPER": str(upper),
        "WORK": f"{upper}.work",
        "M": f"{upper}.root",
        "READ_ONLY": "yes" if read_only else "",
        "PATH": os.environ["PATH"],
    }
    for name in ("UPPER", "WORK", "M"):
        Path(variables[name]).mkdir(parents=True, exist_ok=True)
    return ["unshare", "--mount", "--pid", "--fork", "--kill-child", *entering], variables


def install(layer: Layer, upper: Path, parts: Sequence[str]) -> Layer:
    """Run parts of docker/install.sh, from the checkout, in a root; return the layer that they made."""
    environment, binds = package_sources()
    argv = ["/checkout/docker/install.sh", "--variant", "cpu", "--image", *parts]
    binds = [(CHECKOUT, "/checkout"), *binds]
    made = command_in(layer, upper, argv, {"PATH": SYSTEM_PATH, **environment}, binds)
    log = upper.with_name(upper.name + ".log")
    with open(log, "w") as out:
        done = subprocess.run(made[0], env=made[1], stdout=out, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"install.sh {' '.join(parts)} failed:\n{log.read_text()[-3000:]}")
    return Layer((upper, *layer.folders))


def package_sources() -> tuple[dict[str, str], list[tuple[Path, str]]]:
    """Return pip's settings on this machine as variables, and the local files they name."""
    told = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    environment = {k: v for k, v in os.environ.items() if k.lower().endswith("_proxy")}
    for line in told.stdout.splitlines():
        name, _, value = line.partition("=")
        section, _, key = name.strip(":").rpartition(".")
        if section in ("global", "install", "env", ":env:") or section.endswith("env:"):
            environment["PIP_" + key.upper().replace("-", "_")] = shlex.split(value)[0]
    binds: dict[Path, str] = {}

    def moved(word: str) -> str:
        path = Path(word.removeprefix("file://"))
        if not path.is_absolute() or not path.exists():
            return word
        # The links of a local index lead to files beside it.
        found = path.parent if path.name == "simple" else path
        binds[found] = (
            f"/machine{found}"  # its own place may be a package's, as that of certificates
        )
        return word.replace(str(path), f"/machine{path}")

    environment = {k: " ".join(map(moved, v.split())) for k, v in environment.items()}
    return environment, list(binds.items())


def base() -> Layer:
    """Return the layer that debootstrap makes, from the cache where it is there."""
    folder = CACHE / f"base-{SUITE}"
    if not folder.is_dir():
        half = CACHE / f"base-{SUITE}.half"
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(parents=True)
        subprocess.run(
            ["debootstrap", "--variant=minbase", SUITE, str(half), *apt_mirror()],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        # As in Docker's images of Debian: packages start no services, and need not survive a power cut.
        policy = half / "usr/sbin/policy-rc.d"
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
        (half / "etc/dpkg/dpkg.cfg.d/speed").write_text("force-unsafe-io\n")
        half.rename(folder)
    return Layer((folder,))


def apt_mirror() -> list[str]:
    """Return where this machine's apt gets Debian from, or nothing for debootstrap's own choice."""
    told = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(RELEASE) $(REPO_URI)", "Created-By: Packages"],
        capture_output=True, text=True,
    )  # fmt: skip
    return [line.split()[1] for line in told.stdout.splitlines() if line.split()[:1] == [SUITE]][:1]


def libraries() -> Layer:
    """Return the layer with all but whet itself, from the cache where nothing that names it changed."""
    found = hashlib.sha256()
    for name in (
        "docker/install.sh",
        "docker/constraints.txt",
        "constraints.txt",
        "pyproject.toml",
    ):
        found.update((CHECKOUT / name).read_bytes())
    folder = CACHE / f"libraries-{found.hexdigest()[:16]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        below = base()
        if not folder.is_dir():
            for old in CACHE.glob("libraries*"):
                shutil.rmtree(old) if old.is_dir() else old.unlink()
            half = CACHE / "libraries.half"
            install(below, half, ["system", "torch", "libraries"])
            half.rename(folder)
    return Layer((folder, *below.folders))


@dataclass
class Container:
    """A running container: the process, and what it has written."""

    process: subprocess.Popen[bytes]
    log: Path
    ports: dict[str, int] = field(default_factory=dict)

    def output(self) -> str:
        """Return what it has written so far."""
        return self.log.read_text()

    def _children(self) -> list[int]:
        pid = self.process.pid
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def first(self) -> int:
        """Return the number, on this machine, of the process that is number 1 inside."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"ended:\n{self.output()}"
            if found := self._children():
                return found[0]
            time.sleep(0.05)
        raise AssertionError("the container has no process 1")

    def kill(self) -> None:
        """End it at once where it still runs: process 1 takes all others with it.

        The end of unshare alone would not do: what has changed its user since is not told of it.
        """
        while self.process.poll() is None:
            for child in self._children():
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            time.sleep(0.05)

    def run(
        self, *argv: str, user: str = "1000:1000", stdin: str = "", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside, as `docker exec` does."""
        settings = [f"{k}={v}" for k, v in {"PATH": IMAGE_PATH, **environment}.items()]
        uid, _, gid = user.partition(":")
        who = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups"]
        inside = ["nsenter", "--target", str(self.first()), "--mount", "--pid", "--root", "--wd"]
        return subprocess.run(
            [*inside, "/usr/bin/env", "-i", *settings, *who, *argv],
            input=stdin, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    def wait_for(self, text: str, times: int = 1, seconds: float = 60) -> str:
        """Wait until the output has a text so many times; return the output."""
        deadline = time.monotonic() + seconds
        while self.output().count(text) < times:
            assert time.monotonic() < deadline, f"no '{text}' in:\n{self.output()}"
            assert self.process.poll() is None, f"ended before '{text}':\n{self.output()}"
            time.sleep(0.1)
        return self.output()

    def stop(self, seconds: float = 30) -> int:
        """Send SIGTERM to process 1 and return the exit code."""
        os.kill(self.first(), signal.SIGTERM)
        return self.process.wait(seconds)


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(true: Callable[[], bool], container: Container, seconds: float = 60) -> None:
    """Wait until something holds, as long as the container runs."""
    deadline = time.monotonic() + seconds
    while not true():
        assert container.process.poll() is None, container.output()
        assert time.monotonic() < deadline, container.output()
        time.sleep(0.2)


def health(
    container: Container, user: str = "1000:1000", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the image's health check."""
    ports = {name: str(port) for name, port in container.ports.items()}
    return container.run("whet-entrypoint", "--health", user=user, **{**environment, **ports})
