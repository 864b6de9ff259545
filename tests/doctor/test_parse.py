"""Every parser on what the tools of many driver generations print (tests/doctor/outputs)."""

from pathlib import Path

import pytest

from whet.doctor import parse

OUTPUTS = Path(__file__).parent / "outputs"
MIB = 2**20


def told(name):
    return (OUTPUTS / f"{name}.txt").read_text()


@pytest.mark.parametrize(
    ("name", "driver", "cuda", "cards"),
    [
        ("smi_384_gtx1080", "384.130", None, [("GeForce GTX 1080", 8114, 412)]),
        ("smi_418_two_titans", "418.87.00", (10, 1),
         [("TITAN RTX", 24190, 20411), ("TITAN RTX", 24190, 11)]),
        ("smi_470_t4", "470.103.01", (11, 4), [("Tesla T4", 15109, 0)]),
        ("smi_525_a100_mig", "525.105.17", (12, 0),
         [("NVIDIA A100-SXM...", 40960, 38), ("NVIDIA A100-SXM...", 40960, 0)]),
        ("smi_535_four_a10", "535.104.05", (12, 2),
         [("NVIDIA A10", 23028, 4)] * 3 + [("NVIDIA A10", 23028, 21977)]),
        ("smi_550_rtx4090", "550.90.07", (12, 4), [("NVIDIA GeForce RTX 4090", 24564, 6803)]),
        ("smi_552_wsl", "552.22", (12, 4), [("NVIDIA GeForce RTX 3060", 12288, 1022)]),
        ("smi_610_rtx5090", "610.43.02", (13, 3), [("NVIDIA GeForce RTX 5090", 32607, 15)]),
        ("smi_q_535", "535.104.05", (12, 2), []),
    ],
)  # fmt: skip
def test_nvidia_smi_of_every_generation_is_read(name, driver, cuda, cards):
    found = parse.parse_smi(told(name))
    assert (found.driver, found.cuda, found.trouble) == (driver, cuda, None)
    assert [(c.name, c.total_bytes // MIB, c.used_bytes // MIB) for c in found.cards] == cards
    assert [card.index for card in found.cards] == list(range(len(cards)))


@pytest.mark.parametrize(
    ("name", "trouble"),
    [
        ("smi_mismatch", "mismatch"),
        ("smi_no_driver", "no driver"),
        ("smi_no_devices", "no devices"),
        ("smi_unknown_error", "unknown"),
        ("smi_wsl_blocked", "blocked"),
        ("smi_lost", "lost"),
    ],
)
def test_what_nvidia_smi_says_when_it_fails_is_told_apart(name, trouble):
    found = parse.parse_smi(told(name))
    assert found.trouble == trouble and not found.cards and found.driver is None


def test_the_table_tells_use_heat_and_power():
    card = parse.parse_smi(told("smi_535_four_a10")).cards[3]
    assert (card.utilization, card.temperature_c, card.power_watts) == (1.0, 67, 148)
    card = parse.parse_smi(told("smi_552_wsl")).cards[0]
    assert (card.utilization, card.temperature_c, card.power_watts) == (0.06, 49, None)


def test_parts_of_a_card_are_read_and_the_card_beside_it_is_whole():
    found = parse.parse_smi(told("smi_525_a100_mig"))
    assert [card.mig for card in found.cards] == [True, False]
    assert found.cards[0].utilization is None  # a card that is cut does not say
    assert [(m.gpu, m.index, m.used_bytes // MIB, m.total_bytes // MIB) for m in found.migs] == [
        (0, 0, 19, 19968),
        (0, 1, 9219, 19968),
    ]


@pytest.mark.parametrize(
    ("name", "processes"),
    [
        ("smi_384_gtx1080", [(0, 1203, "G", 260), (0, 2210, "G", 148)]),
        ("smi_418_two_titans", [(0, 30411, "C", 20397)]),
        ("smi_525_a100_mig", [(0, 51877, "C", 9197)]),
        ("smi_550_rtx4090", [(0, 2263, "G", 261), (0, 2581, "C+G", 102), (0, 88120, "C", 6390)]),
        ("smi_552_wsl", [(0, 23, "G", None)]),
        ("smi_610_rtx5090", []),
    ],
)
def test_who_holds_the_gpu_is_read(name, processes):
    found = parse.parse_smi(told(name)).processes
    assert [
        (p.gpu, p.pid, p.kind, None if p.used_bytes is None else p.used_bytes // MIB) for p in found
    ] == processes


def test_a_process_keeps_its_whole_name():
    assert parse.parse_smi(told("smi_550_rtx4090")).processes[2].name == "ollama serve"


def test_the_query_is_read_by_its_line_of_names():
    first, second = parse.parse_smi_csv(told("csv_550_two"))
    assert (first.name, first.capability) == ("NVIDIA GeForce RTX 4090", (8, 9))
    assert (first.total_bytes, first.used_bytes) == (24564 * MIB, 6803 * MIB)
    assert (first.utilization, first.temperature_c, first.power_watts) == (0.04, 46, 23.31)
    assert (second.index, second.capability, second.mig) == (1, (8, 6), False)
    (old,) = parse.parse_smi_csv(told("csv_384_old"))
    assert old.name == "GeForce GTX 1080" and old.capability is None
    (cut,) = parse.parse_smi_csv(told("csv_525_mig"))
    assert cut.mig and cut.utilization is None
    assert parse.parse_smi_csv(told("csv_wsl"))[0].power_watts is None


@pytest.mark.parametrize("name", ["csv_refused", "smi_no_driver", "smi_no_devices"])
def test_a_refused_query_has_no_cards(name):
    assert parse.parse_smi_csv(told(name)) == []
    assert parse.parse_smi_csv("") == []


def test_the_loaded_driver_is_read():
    assert parse.parse_kernel_driver(told("proc_driver_535")) == ("535.104.05", False)
    assert parse.parse_kernel_driver(told("proc_driver_580_open")) == ("580.65.06", True)
    assert parse.parse_kernel_driver("") is None


@pytest.mark.parametrize(
    ("name", "on"), [("on", True), ("off", False), ("shim_off", False), ("no_efi", None)]
)
def test_secure_boot_is_read(name, on):
    assert parse.parse_secure_boot(told(f"mokutil_{name}")) is on


def test_a_module_says_whether_it_is_signed():
    assert parse.parse_modinfo(told("modinfo_signed")) == ("550.90.07", True)
    assert parse.parse_modinfo(told("modinfo_unsigned")) == ("550.90.07", False)
    assert parse.parse_modinfo(told("modinfo_none")) == (None, False)


def test_toolkit_and_libraries_are_read():
    assert parse.parse_nvcc(told("nvcc_124")) == "12.4"
    found = parse.parse_ldconfig(told("ldconfig"))
    assert found["libcudnn.so.9"] == "/lib/x86_64-linux-gnu/libcudnn.so.9"
    assert found["libcuda.so.1"] == "/lib/x86_64-linux-gnu/libcuda.so.1"  # the first, 64-bit
    assert found["ld-linux-x86-64.so.2"] == "/lib64/ld-linux-x86-64.so.2"


def test_a_group_is_limited_by_its_parents_too():
    files = parse.cgroup_files(told("cgroup_v2_session"))["memory"]
    assert files == [
        "/user.slice/user-1000.slice/session-2.scope/memory.max",
        "/user.slice/user-1000.slice/memory.max",
        "/user.slice/memory.max",
        "/memory.max",
    ]
    assert parse.cgroup_files(told("cgroup_v2_container"))["memory"] == ["/memory.max"]


def test_version_1_is_read_in_a_container_too():
    files = parse.cgroup_files(told("cgroup_v1_docker"))
    assert files["memory"] == [
        "/memory/docker/3f1d0b7c/memory.limit_in_bytes",
        "/memory/docker/memory.limit_in_bytes",
        "/memory/memory.limit_in_bytes",  # the only one that a container sees
    ]
    assert "/cpu,cpuacct/cpu.cfs_quota_us" in files["cpu"]
    both = parse.cgroup_files(told("cgroup_hybrid"))
    assert both["memory"][0] == "/memory/job/17/memory.limit_in_bytes"
    assert "/memory.max" in both["memory"]


def test_the_lowest_limit_counts_and_no_limit_is_none():
    v2 = {"/a/b/memory.max": "max\n", "/a/memory.max": "8589934592\n", "/memory.max": ""}
    assert parse.parse_memory_limits(v2) == 8 * 2**30
    v1 = {"x": "9223372036854771712\n"}
    assert parse.parse_memory_limits(v1) is None
    assert parse.parse_memory_limits({**v2, **v1, "c": "4294967296"}) == 4 * 2**30
    assert parse.parse_cpu_limits({"a": "max 100000\n", "b": "250000 100000\n"}) == 2.5
    assert parse.parse_cpu_limits({"a": "-1\n", "b": "150000\n"}) == 1.5
    assert parse.parse_cpu_limits({"a": "", "b": "max 100000"}) is None


def test_containers_are_known_by_their_marks():
    assert parse.parse_container("", {"docker": False, "podman": True}) == "podman"
    assert parse.parse_container("0::/kubepods.slice/kubepods-pod1", {}) == "kubepods"
    assert parse.parse_container("0::/init.scope", {"docker": False}) is None
