import pytest

from whet import doctor


def test_this_machine_can_train():
    findings = doctor.examine()
    assert not [finding for finding in findings if finding.status == "fault"]
    assert {"system", "packages", "GPU", "CPU", "4-bit", "memory", "disk"} <= {
        f.name for f in findings
    }


def test_a_missing_package_is_a_fault_with_its_command(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    faults = [finding for finding in doctor.examine() if finding.status == "fault"]
    assert len(faults) == 1 and "no-such-package" in faults[0].text
    assert faults[0].fix == "pip install -c constraints.txt no-such-package"


def test_a_cpu_torch_beside_a_gpu_is_a_fault(monkeypatch):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a working GPU")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    finding = doctor._gpu()
    assert finding.status == "fault" and finding.fix


def test_too_many_threads_are_told(monkeypatch):
    import torch

    monkeypatch.setattr(torch, "get_num_threads", lambda: 10_000)
    assert doctor._cpu().status == "warn"
