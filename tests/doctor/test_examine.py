"""The doctor on the machine the tests run on, and the checks of packages, memory and the Hub."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from whet import doctor
from whet.doctor import finding, resources, software
from whet.doctor.machine import Machine, Torch, look

GIB = 2**30
PLAIN = Machine(torch=Torch("2.13.0+cpu", threads=8), cores=8, memory_bytes=(16 * GIB, 32 * GIB))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def here():
    return look()


def test_this_machine_can_train():
    found = doctor.examine()
    assert not [one for one in found if one.status == "fault"]
    names = {one.name for one in found}
    assert {"system", "Python", "packages", "GPU", "NCCL", "Triton", "4-bit", "CPU", "Hub"} <= names
    assert {"memory", "disk", "flash-attn", "CUDA toolkit"} <= names


def test_a_machine_without_a_gpu_is_told_so(here):
    if here.has_gpu:
        pytest.skip("this machine has a GPU")
    from whet.doctor.gpu import check_gpu

    assert [one.text for one in check_gpu(here)] == ["none; whet trains on the CPU"]
    assert "not used without a GPU" in software.check_triton(here).text


def test_triton_in_its_interpreter_does_not_count(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(software, "version_of", lambda name: "3.9.0")
    found = software.check_triton(
        replace(PLAIN, torch=Torch("2.13.0", cuda="13.0", available=True))
    )
    assert found.status == "warn" and found.fix == "unset TRITON_INTERPRET"


@pytest.mark.parametrize(
    ("outcome", "status", "words"),
    [
        (RuntimeError("Failed to find C compiler. Please specify via CC"), "fault", "gcc"),
        (RuntimeError("ptxas exited with code 255"), "fault", "--force-reinstall triton"),
        (ImportError("libtriton.so"), "fault", "--force-reinstall triton"),
        (False, "fault", "--force-reinstall triton"),
        (True, "ok", ""),
    ],
)
def test_a_kernel_that_does_not_run_is_a_fault(monkeypatch, outcome, status, words):
    pytest.importorskip("triton")
    from whet.doctor import triton_probe

    def doubles(device):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton_probe, "doubles", doubles)
    found = software.check_triton(
        replace(PLAIN, torch=Torch("2.13.0", cuda="13.0", available=True))
    )
    assert found.status == status and words in (found.fix or "")


def test_the_test_kernel_doubles():
    pytest.importorskip("triton")
    code = "from whet.doctor.triton_probe import doubles; assert doubles('cpu')"
    interpreted = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], env=interpreted, check=True)


def test_a_missing_package_is_a_fault_with_its_command(monkeypatch):
    monkeypatch.setattr(finding, "PACKAGES", ("torch", "no-such-package"))
    monkeypatch.setattr(software, "PACKAGES", ("torch", "no-such-package"))
    (fault,) = [one for one in software.check_packages() if one.status == "fault"]
    assert "no-such-package" in fault.text
    assert fault.fix == "pip install -c constraints.txt no-such-package"


@pytest.mark.parametrize(
    ("builds", "apart"),
    [
        ({"torch": "2.9.0+cu126", "torchvision": "0.24.0+cpu"}, "torchvision 0.24.0+cpu"),
        ({"torch": "2.9.0+cu126", "torchvision": "0.24.0+cu126", "torchaudio": None}, None),
        ({"torch": "2.9.0", "torchvision": "0.24.0+cpu"}, None),  # no tag: cannot be told
    ],
)
def test_wheels_of_different_builds_are_told(builds, apart):
    found = software.check_wheels(builds)
    assert (apart is None) == (not found) and (not found or apart in found[0].text)


def test_threads_are_held_against_cores_and_limits():
    assert resources.check_cpu(PLAIN).status == "ok"
    many = resources.check_cpu(replace(PLAIN, torch=Torch("2", threads=64)))
    assert many.status == "warn" and many.fix == "set OMP_NUM_THREADS=8"
    few = resources.check_cpu(replace(PLAIN, torch=Torch("2", threads=1)))
    assert few.status == "warn" and "unset" in few.fix
    held = resources.check_cpu(replace(PLAIN, cpu_limit=2.0, variables={"OMP_NUM_THREADS": "8"}))
    assert held.status == "warn" and held.fix == "set OMP_NUM_THREADS=2"
    assert "2 of the cores" in held.text and "OMP_NUM_THREADS=8" in held.text


@pytest.mark.parametrize(
    ("limit", "status"), [(None, "ok"), (64 * GIB, "ok"), (3 * GIB, "warn"), (GIB, "fault")]
)
def test_a_limit_on_memory_is_told(limit, status):
    found = resources.check_memory(replace(PLAIN, memory_limit=limit))
    assert found.status == status
    if status != "ok":
        assert "GiB" in found.text and "--memory" in found.fix


def test_shared_memory_matters_in_a_container():
    small = replace(PLAIN, container="docker", shm_bytes=64 * 2**20)
    (fault,) = resources.check_container(small, several=True)
    assert fault.status == "fault" and "64 MiB" in fault.text and "--shm-size" in fault.fix
    assert resources.check_container(small, several=False)[0].status == "warn"
    assert resources.check_container(replace(small, container=None), several=True) == []
    assert resources.check_container(replace(small, shm_bytes=8 * GIB), several=True) == []


def test_containers_without_the_toolkit_are_told():
    from whet.doctor.parse import Card

    card = (Card(0, "NVIDIA A10", 24 * GIB, 0),)
    found = resources.check_container(
        replace(PLAIN, cards=card, tools=frozenset({"docker"})), False
    )
    assert found[0].status == "warn" and "nvidia-ctk runtime configure" in found[0].fix
    both = frozenset({"docker", "nvidia-ctk"})
    assert (
        resources.check_container(replace(PLAIN, cards=card, tools=both), False)[0].status == "ok"
    )


def test_little_room_on_the_disk_is_a_warning(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "not" / "made"))
    assert [one.name for one in resources.check_disk(tmp_path)] == ["disk"]
    used = resources.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda path: used._replace(free=GIB))
    assert resources.check_disk(tmp_path)[0].status == "warn"


class Hub(BaseHTTPRequestHandler):
    def do_GET(self):
        known = self.headers.get("Authorization") == "Bearer right"
        self.send_response(200 if known else 401)
        self.end_headers()
        self.wfile.write(json.dumps({"name": "ada"}).encode() if known else b"{}")

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_hub_says_who_we_are(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert resources.check_hub(hub, "right").text == "reached, logged in as ada"
    refused = resources.check_hub(hub, "wrong")
    assert refused.status == "warn" and refused.fix == "hf auth login"
    assert resources.check_hub(hub).status == "ok"
    assert resources.check_hub().text.startswith("not asked")  # offline


def test_a_hub_that_is_not_there_is_a_warning_in_time(monkeypatch):
    closed = resources.check_hub("http://127.0.0.1:9", "right")
    assert closed.status == "warn" and "cannot be reached" in closed.text
    never = threading.Event()
    monkeypatch.setattr(resources, "HUB_SECONDS", 0.05)
    monkeypatch.setattr(resources, "_ask", lambda *_: never.wait(20) and (0, ""))
    assert "no answer" in resources.check_hub("http://127.0.0.1:9", "right").text
    never.set()
