"""What the doctor says about driver, torch and cards, given what a machine shows."""

from dataclasses import replace
from pathlib import Path

import pytest

from whet.doctor import gpu
from whet.doctor.machine import Machine, Torch, Visible
from whet.doctor.parse import (
    parse_kernel_driver,
    parse_modinfo,
    parse_secure_boot,
    parse_smi,
    parse_smi_csv,
)

OUTPUTS = Path(__file__).parent / "outputs"
GIB = 2**30
CUDA_12 = Torch("2.7.0+cu126", cuda="12.6", nccl="2.26.2")
CPU_TORCH = Torch("2.13.0+cpu")


def told(name):
    return (OUTPUTS / f"{name}.txt").read_text()


def machine(smi=None, csv=None, torch=CUDA_12, **facts):
    found = parse_smi(told(smi)) if smi else None
    cards = parse_smi_csv(told(csv)) if csv else (found.cards if found else ())
    return Machine(torch=torch, smi=found, cards=tuple(cards), **facts)


def working(torch=CUDA_12, name="NVIDIA GeForce RTX 4090", capability=(8, 9)):
    card = Visible(name, capability, 20 * GIB, 24 * GIB)
    archs = torch.archs or ("sm_75", "sm_80", "sm_86", "sm_90")
    return replace(torch, available=True, cards=(card,), archs=archs)


def faults(findings):
    return [finding for finding in findings if finding.status == "fault"]


def test_no_gpu_is_no_fault():
    (finding,) = gpu.check_gpu(machine(torch=CPU_TORCH))
    assert (finding.status, finding.text) == ("ok", "none; whet trains on the CPU")


def test_a_good_machine_has_no_fault():
    found = gpu.check_gpu(machine("smi_470_t4", torch=Torch("2.5.1+cu118", cuda="11.8")))
    assert len(faults(found)) == 1  # its CUDA does not start in this record
    found = gpu.check_gpu(machine("smi_610_rtx5090", torch=working()))
    assert not faults(found)
    assert "610.43.02" in found[0].text and "13.3" in found[0].text
    assert any("RTX 4090, compute capability 8.9, 20.0 of 24.0 GiB free" in f.text for f in found)


@pytest.mark.parametrize(
    ("smi", "torch", "asked"),
    [
        ("smi_470_t4", CUDA_12, "525.60.13"),
        ("smi_418_two_titans", CUDA_12, "525.60.13"),
        ("smi_550_rtx4090", Torch("2.13.0", cuda="13.0"), "580.65.06"),
        ("smi_552_wsl", Torch("2.13.0", cuda="13.0"), "580.65.06"),
    ],
)
def test_a_driver_older_than_torchs_cuda_is_a_fault(smi, torch, asked):
    (fault,) = faults(gpu.check_gpu(machine(smi, torch=torch)))
    assert fault.name == "torch's CUDA" and torch.cuda in fault.text
    assert asked in fault.fix and "newer major version" in fault.why


def test_a_newer_minor_version_of_cuda_runs():
    assert not faults(gpu.check_gpu(machine("smi_535_four_a10", torch=working(CUDA_12))))


@pytest.mark.parametrize("smi", ["smi_550_rtx4090", "smi_610_rtx5090", "smi_525_a100_mig"])
def test_a_cpu_torch_beside_a_gpu_is_a_fault(smi):
    (fault,) = faults(gpu.check_gpu(machine(smi, torch=CPU_TORCH)))
    assert "CPU build" in fault.text and "CUDA wheels" in fault.fix


def test_torch_for_other_hardware_is_a_fault():
    rocm = Torch("2.9.0+rocm6.4", hip="6.4.43482")
    (fault,) = faults(gpu.check_gpu(machine("smi_550_rtx4090", torch=rocm)))
    assert "rocm" in fault.text and fault.fix.startswith("pip uninstall torch")


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (("sm_80", "sm_86"), (8, 9), True),
        (("sm_80", "sm_90"), (12, 0), False),
        (("sm_75", "sm_80"), (7, 0), False),
        (("sm_80", "compute_80"), (12, 0), True),  # PTX is compiled by the driver
        (("sm_90a",), (9, 0), True),
        (("sm_100a", "sm_90"), (10, 3), False),
        (("sm_100", "sm_120"), (12, 1), True),
        ((), (8, 9), True),
    ],
)
def test_code_for_a_card_is_found(archs, capability, runs):
    assert gpu.has_kernels(archs, capability) is runs


def test_no_kernel_image_is_a_fault():
    torch = working(CUDA_12, "NVIDIA GeForce RTX 5090", (12, 0))
    (fault,) = faults(gpu.check_gpu(machine("smi_610_rtx5090", torch=torch)))
    assert "12.0" in fault.text and "sm_90" in fault.text and "no code" in fault.why


def test_a_mismatch_names_the_loaded_module():
    kernel = parse_kernel_driver(told("proc_driver_535"))
    (fault,) = faults(gpu.check_gpu(machine("smi_mismatch", kernel_driver=kernel, on_bus=True)))
    assert "535.104.05" in fault.text and fault.fix.startswith("reboot")


def test_secure_boot_with_an_unsigned_module_is_told():
    facts = {
        "on_bus": True,
        "secure_boot": parse_secure_boot(told("mokutil_on")),
        "module": parse_modinfo(told("modinfo_unsigned")),
    }
    (fault,) = faults(gpu.check_gpu(machine("smi_no_driver", **facts)))
    assert "not signed" in fault.text and "mokutil --import" in fault.fix


def test_a_signed_module_that_is_not_loaded_is_another_fault():
    facts = {"on_bus": True, "module": parse_modinfo(told("modinfo_signed"))}
    (fault,) = faults(gpu.check_gpu(machine("smi_no_driver", secure_boot=False, **facts)))
    assert "not loaded" in fault.text and "modprobe" in fault.fix
    module = parse_modinfo(told("modinfo_unsigned"))
    off = machine("smi_no_driver", on_bus=True, secure_boot=False, module=module)
    assert "modprobe" in faults(gpu.check_gpu(off))[0].fix  # Secure Boot is not the cause


def test_a_card_without_a_driver_is_told():
    found = gpu.check_gpu(machine(on_bus=True, nouveau=True, torch=CPU_TORCH))
    assert [f.name for f in faults(found)] == ["driver", "torch's CUDA"]
    assert "nouveau" in found[0].text and "ubuntu-drivers" in found[0].fix


@pytest.mark.parametrize(
    ("smi", "facts", "words"),
    [
        ("smi_no_devices", {"on_bus": True}, "finds no GPU"),
        ("smi_lost", {"on_bus": True}, "no longer answers"),
        ("smi_unknown_error", {"container": "docker", "device_files": True}, "does not answer"),
        ("smi_wsl_blocked", {"release": "5.15.153.1-microsoft-standard-WSL2"}, "blocked"),
    ],
)
def test_each_way_a_driver_fails_has_its_own_line(smi, facts, words):
    fault = faults(gpu.check_gpu(machine(smi, **facts)))[0]
    assert fault.name == "driver" and words in fault.text and fault.fix and fault.why


def test_a_container_that_asked_for_a_gpu_and_got_none_is_told():
    asked = {"container": "docker", "variables": {"NVIDIA_VISIBLE_DEVICES": "all"}}
    (fault,) = gpu.check_gpu(machine(torch=CPU_TORCH, **asked))
    assert fault.status == "fault" and "--gpus all" in fault.fix
    asked["variables"] = {"NVIDIA_VISIBLE_DEVICES": "void"}
    assert gpu.check_gpu(machine(torch=CPU_TORCH, **asked))[0].status == "ok"


def test_torchs_own_words_name_the_fault():
    torch = replace(CUDA_12, error="CUDA unknown error - this may be due to an incorrectly set up")
    (fault,) = faults(gpu.check_gpu(machine("smi_550_rtx4090", torch=torch)))
    assert "CUDA does not start" in fault.text and "nvidia_uvm" in fault.fix


def test_hidden_gpus_are_a_warning():
    hidden = machine("smi_550_rtx4090", variables={"CUDA_VISIBLE_DEVICES": ""})
    (finding,) = [f for f in gpu.check_gpu(hidden) if f.name == "torch's CUDA"]
    assert finding.status == "warn" and "unset" in finding.fix


def test_others_on_the_gpu_are_named():
    found = gpu.check_gpu(machine("smi_550_rtx4090", torch=working()))
    (line,) = [f for f in found if f.name == "GPU's users"]
    assert line.status == "warn" and "ollama serve (process 88120, 6.2 GiB)" in line.text
    assert "Xorg" not in line.text  # a desktop is no surprise
    hidden = gpu.check_holders(machine("smi_535_four_a10", torch=working()))
    assert "21.5 GiB held by processes that are not seen" in hidden[0].text
    assert gpu.check_holders(machine("smi_610_rtx5090", torch=working())) == []


def test_parts_of_a_card_are_listed():
    found = gpu.check_cards(machine("smi_525_a100_mig", "csv_525_mig"))
    assert [f.text for f in found if f.name == "MIG"] == [
        "part 0 of GPU 0: 19.5 of 19.5 GiB free",
        "part 1 of GPU 0: 10.5 of 19.5 GiB free",
    ]
    none_made = told("smi_525_a100_mig").split("| MIG devices")[0]
    cut = machine("smi_525_a100_mig", "csv_525_mig")
    (fault,) = faults(gpu.check_cards(replace(cut, smi=parse_smi(none_made))))
    assert "no part has been made" in fault.text and "mig" in fault.fix


def test_nccl_matters_where_gpus_work_together():
    without = replace(CUDA_12, nccl=None)
    assert gpu.check_nccl(machine(torch=without), needed=False).status == "ok"
    fault = gpu.check_nccl(machine(torch=without), needed=True)
    assert fault.status == "fault" and "your torch (2.7.0+cu126) has no NCCL" in fault.text
    assert gpu.check_nccl(machine(), needed=True).text == "2.26.2, in torch"


def test_versions_of_cudnn_are_written_as_people_do():
    assert gpu._cudnn(90100) == "9.1.0" and gpu._cudnn(8902) == "8.9.2"
