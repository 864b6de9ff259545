"""The image, containers of it, and a key to log in with."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.container import root


@pytest.fixture(scope="module")
def image():
    """The root as an image: libraries from the cache, whet and the entrypoint from the checkout."""
    folder = root.CACHE / f"session-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield root.install(root.libraries(), folder / "whet", ["wheel", "whet", "user"])
    shutil.rmtree(folder)


@pytest.fixture
def start(image, tmp_path):
    """Start containers; what is left of them at the end is killed."""
    started, folders = [], []

    def begin(*argv, user="1000:1000", read_only=False, volumes=None, check=True, **environment):
        upper = image.folders[0].with_name(f"container-{len(os.listdir(image.folders[0].parent))}")
        folders.append(upper)
        ports = {"JUPYTER_PORT": root.free_port(), "SSH_PORT": root.free_port()}
        settings = {
            **root.IMAGE_ENVIRONMENT,
            **{name: str(port) for name, port in ports.items()},
            **environment,
        }
        binds = []
        for name in root.VOLUMES if volumes else ():
            (volumes / name).mkdir(exist_ok=True)
            os.chown(volumes / name, *(int(number) for number in user.split(":")))
            binds.append((volumes / name, f"/workspace/{name}"))
        command, variables = root.command_in(
            image, upper, ["whet-entrypoint", *argv], settings, binds, user, read_only
        )
        log = tmp_path / f"{upper.name}.log"
        with open(log, "wb") as out:
            process = subprocess.Popen(
                command, env=variables, stdin=subprocess.DEVNULL, stdout=out,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        container = root.Container(process, log, ports)
        started.append(container)
        if check and not argv:
            root.wait_until(
                lambda: root.health(container, **environment).returncode == 0, container
            )
        return container

    yield begin
    for container in started:
        container.kill()
    for upper in folders:
        for folder in (upper, Path(f"{upper}.work"), Path(f"{upper}.root")):
            shutil.rmtree(folder)


@pytest.fixture(scope="module")
def key(tmp_path_factory):
    """A key pair: the private key's text and the public key's line."""
    file = tmp_path_factory.mktemp("key") / "id"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", file], check=True)
    return file.read_text(), file.with_suffix(".pub").read_text().strip()
