"""What the doctor says about several processes and nodes."""

import json
import os
import socket
import sys
from dataclasses import replace

import pytest

from whet.doctor import distributed, hosts
from whet.doctor.machine import Machine, Torch, Visible
from whet.errors import InputError

GIB = 2**30
CPU = Machine(torch=Torch("2.13.0+cpu", threads=2), cores=2, memory_bytes=(16 * GIB, 32 * GIB))
CARD = Visible("NVIDIA A10", (8, 6), 20 * GIB, 22 * GIB)
HERE = {"lo": ["127.0.0.1"], "eth0": ["10.0.0.2"], "docker0": ["172.17.0.1"]}


def by_name(findings):
    return {finding.name: finding for finding in findings}


def test_a_torch_without_nccl_beside_gpus_is_a_fault_with_its_fix():
    torch = Torch("2.9.0", cuda="12.8", available=True, cards=(CARD, CARD))
    found = distributed.check_backend(replace(CPU, torch=torch))
    assert found.status == "fault" and "your torch (2.9.0) has no NCCL" in found.text
    assert "CUDA wheels" in found.fix
    assert distributed.check_backend(replace(CPU, torch=replace(torch, nccl="2.27"))).status == "ok"
    assert distributed.check_backend(CPU).text.startswith("gloo")
    assert distributed.check_backend(replace(CPU, torch=Torch("2", gloo=False))).status == "fault"


def test_gpus_that_do_not_reach_each_other_are_told(monkeypatch):
    two = replace(CPU, torch=Torch("2.9.0", cuda="12.8", available=True, cards=(CARD, CARD)))
    monkeypatch.setattr("torch.cuda.can_device_access_peer", lambda a, b: True)
    assert distributed.check_peers(two)[0].status == "ok"
    monkeypatch.setattr("torch.cuda.can_device_access_peer", lambda a, b: a < b)
    (finding,) = distributed.check_peers(two)
    assert (
        finding.status == "warn" and "1 of 2" in finding.text and "NCCL_P2P_DISABLE" in finding.fix
    )
    assert distributed.check_peers(CPU) == []


@pytest.mark.parametrize("text", ["node1", ":29500", "node1:port", "node1:0", "node1:70000"])
def test_a_rendezvous_is_host_and_port(text):
    with pytest.raises(InputError, match="HOST:PORT"):
        distributed.meeting_point(text, {})


def test_a_rendezvous_comes_from_torchruns_variables():
    assert distributed.meeting_point(None, {}) == ("localhost", 29500)
    told = {"MASTER_ADDR": "node1", "MASTER_PORT": "1234"}
    assert distributed.meeting_point(None, told) == ("node1", 1234)
    assert distributed.meeting_point("[::1]:5", told) == ("::1", 5)


def test_a_port_that_is_taken_is_a_fault():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen(1)
        port = holder.getsockname()[1]
        taken = distributed.check_port("127.0.0.1", port, several=False)
        assert taken.status == "fault" and str(port) in taken.text and "MASTER_PORT" in taken.fix
    assert distributed.check_port("127.0.0.1", port, several=False).status == "ok"


def test_another_hosts_port_is_tried(monkeypatch):
    monkeypatch.setattr(distributed, "_own_addresses", set)
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen(1)
        port = holder.getsockname()[1]
        assert "is reached" in distributed.check_port("127.0.0.1", port, several=False).text
    waiting = distributed.check_port("127.0.0.1", port, several=False)
    assert waiting.status == "ok" and "nobody listens" in waiting.text

    def silent(*_):
        raise TimeoutError("timed out")

    monkeypatch.setattr(distributed.socket, "create_connection", silent)
    fault = distributed.check_port("127.0.0.1", port, several=False)
    assert fault.status == "fault" and "firewall" in fault.fix


def test_localhost_is_no_meeting_point_of_several_nodes():
    fault = distributed.check_port("127.0.0.1", 29500, several=True)
    assert fault.status == "fault" and "each node itself" in fault.text


@pytest.mark.parametrize(
    ("variables", "status"),
    [
        ({"NCCL_SOCKET_IFNAME": "eth", "GLOO_SOCKET_IFNAME": "eth0"}, "ok"),
        ({"NCCL_SOCKET_IFNAME": "=eth0", "GLOO_SOCKET_IFNAME": "eth0"}, "ok"),
        ({"NCCL_SOCKET_IFNAME": "^lo,docker", "GLOO_SOCKET_IFNAME": "eth0"}, "ok"),
        ({"NCCL_SOCKET_IFNAME": "ib0"}, "fault"),
        ({"NCCL_SOCKET_IFNAME": "=eth"}, "fault"),
        ({"NCCL_SOCKET_IFNAME": "^lo,docker,eth"}, "fault"),
        ({"GLOO_SOCKET_IFNAME": "eth"}, "fault"),  # gloo takes whole names
    ],
)
def test_variables_that_name_an_interface_are_held_against_them(variables, status):
    assert distributed.check_interfaces(variables, HERE, True)[0].status == status


def test_interfaces_of_several_nodes_are_not_guessed(monkeypatch):
    monkeypatch.setattr(distributed, "_own_name_is_local", lambda: False)
    assert distributed.check_interfaces({}, HERE, True)[0].text == "eth0"
    two = {**HERE, "ib0": ["10.1.0.2"]}
    warned = distributed.check_interfaces({}, two, True)[0]
    assert warned.status == "warn" and "eth0, ib0" in warned.text
    assert distributed.check_interfaces({}, {"lo": ["127.0.0.1"]}, True)[0].status == "fault"
    assert distributed.check_interfaces({}, two, False)[0].status == "ok"
    monkeypatch.setattr(distributed, "_own_name_is_local", lambda: True)
    local = distributed.check_interfaces({}, HERE, True)[0]
    assert local.status == "warn" and "/etc/hosts" in local.text


def test_time_outs_are_told():
    assert "gloo 30 minutes" in distributed.check_timeouts({}).text
    off = distributed.check_timeouts({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"})
    assert off.status == "warn" and "for ever" in off.why


def test_a_small_shm_is_a_fault_when_processes_work_together(monkeypatch):
    monkeypatch.setattr(distributed, "interfaces", lambda: {"lo": ["127.0.0.1"]})
    small = replace(CPU, container="docker", shm_bytes=64 * 2**20)
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    found = by_name(distributed.check_distributed(small, f"127.0.0.1:{port}", False))
    assert found["shared memory"].status == "fault" and found["rendezvous"].status == "ok"
    world = replace(CPU, variables={"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"})
    found = by_name(distributed.check_distributed(world, f"127.0.0.1:{port}", False))
    assert found["rendezvous"].status == "fault"  # two nodes cannot meet at localhost


def node(host, **more):
    return {
        "host": host, "versions": {"python": "3.11.7", "torch": "2.13.0+cu130"}, "cuda": "13.0",
        "nccl": "2.27.5", "driver": "580.65.06", "gpus": ["NVIDIA A10"] * 2, "variables": {},
        "shared": None, "findings": [], **more,
    }  # fmt: skip


def test_equal_nodes_are_equal():
    found = distributed.compare({"a": node("a"), "b": node("b")})
    assert [finding.status for finding in found] == ["ok", "ok"]
    assert found[0].text == "equal on 2 nodes"


def test_what_differs_between_nodes_is_told_with_both_values():
    other = node(
        "b", versions={"python": "3.11.7", "torch": "2.12.0+cu130"}, nccl="2.26.2",
        driver="570.86.15", gpus=["NVIDIA A10"], variables={"NCCL_P2P_DISABLE": "1"},
    )  # fmt: skip
    found = distributed.compare({"a": node("a"), "b": other})
    faults = [finding.text for finding in found if finding.status == "fault"]
    assert faults == [
        "torch: 2.13.0+cu130 on a, 2.12.0+cu130 on b",
        "nccl: 2.27.5 on a, 2.26.2 on b",
    ]
    warned = [finding.text for finding in found if finding.status == "warn"]
    assert warned == [
        "driver: 580.65.06 on a, 570.86.15 on b",
        "GPUs: 2 NVIDIA A10 on a, 1 NVIDIA A10 on b",
        "NCCL_P2P_DISABLE: none on a, 1 on b",
    ]


def test_a_nodes_own_faults_are_passed_on():
    line = {"name": "NCCL", "status": "fault", "text": "none", "fix": "f", "why": "w"}
    (fault, *_) = distributed.compare({"a": node("a"), "b": node("b", findings=[line])})
    assert (fault.name, fault.status, fault.fix) == ("b: NCCL", "fault", "f")


def test_one_folder_has_one_mark(tmp_path):
    first, second = distributed._read_mark(tmp_path), distributed._read_mark(tmp_path)
    assert first == second and len(first) == 12
    (tmp_path / "other").mkdir()
    apart = distributed._read_mark(tmp_path / "other")
    same = distributed.compare({"a": node("a", shared=first), "b": node("b", shared=second)})
    assert by_name(same)["shared folder"].status == "ok"
    for seen in (apart, None):
        differ = distributed.compare({"a": node("a", shared=first), "b": node("b", shared=seen)})
        assert by_name(differ)["shared folder"].status == "fault"
    distributed.forget_mark(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    with pytest.raises(InputError, match="cannot be used"):
        distributed._read_mark(tmp_path / "not there")


def test_a_file_of_hosts_is_read(tmp_path):
    file = tmp_path / "hosts"
    file.write_text("# the cluster\nnode1 slots=8\n\nuser@10.0.0.2  # spare\nnode1\n")
    assert hosts.read_hosts(file) == ["node1", "user@10.0.0.2"]
    file.write_text("-oProxyCommand=reboot\n")
    with pytest.raises(InputError, match="is no host"):
        hosts.read_hosts(file)
    file.write_text("# nobody\n")
    with pytest.raises(InputError, match="names no hosts"):
        hosts.read_hosts(file)
    with pytest.raises(InputError, match="cannot be read"):
        hosts.read_hosts(tmp_path / "none")


def whet(monkeypatch, capsys, *arguments):
    from whet.cli import main

    monkeypatch.setattr(sys, "argv", ["whet", "doctor", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        told = capsys.readouterr()
        return end.code or 0, told.out, told.err
    raise AssertionError("the command line always exits")


def test_reports_of_nodes_are_compared(tmp_path, monkeypatch, capsys):
    files = []
    for name, torch in (("a", "2.13.0"), ("b", "2.12.0")):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(node(name, versions={"torch": torch})))
    code, out, _ = whet(monkeypatch, capsys, "--compare", *files)
    assert code == 1 and "torch: 2.13.0 on a, 2.12.0 on b" in out
    code, out, _ = whet(monkeypatch, capsys, "--distributed", "--compare", files[0], files[0])
    assert code == 0 and "equal on 2 nodes" in out
    files[0].write_text("{}")
    code, _, err = whet(monkeypatch, capsys, "--compare", *files)
    assert code == 2 and "is no report of a node" in err
    code, _, err = whet(monkeypatch, capsys, "--compare")
    assert code == 2 and "go together" in err
    code, _, err = whet(monkeypatch, capsys, "--rdzv", "a:1")
    assert code == 2 and "go with --distributed" in err


def test_this_node_reports_on_itself(tmp_path, monkeypatch, capsys):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    there = ("--rdzv", f"127.0.0.1:{port}", "--shared", tmp_path)
    code, out, _ = whet(monkeypatch, capsys, "--distributed", "--json", *there)
    told = json.loads(out)
    assert code == 0 and told.keys() >= hosts._KEYS and told["host"] == socket.gethostname()
    assert not [line for line in told["findings"] if line["status"] == "fault"]
    report = tmp_path / "me.json"
    report.write_text(out)
    assert hosts.read_reports([report, report]).keys() == {
        told["host"],
        f"{told['host']} ({report})",
    }


def test_hosts_are_asked_by_ssh_and_compared(tmp_path, monkeypatch, capsys):
    """An ssh that answers for two hosts, and fails for a third."""
    for name in ("node1", "node2"):
        (tmp_path / f"{name}.json").write_text(json.dumps(node(name)))
    ssh = tmp_path / "ssh"
    ssh.write_text(
        '#!/bin/sh\nwhile [ "$1" = -o ]; do shift 2; done\n'
        f'echo "$1 $2" >> {tmp_path}/asked\n'
        f'[ -f {tmp_path}/$1.json ] || {{ echo "$1: Permission denied (publickey)." >&2; exit 255; }}\n'
        f"cat {tmp_path}/$1.json\n"
    )
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    cluster = tmp_path / "hosts"
    cluster.write_text("node1\nnode2\n")
    code, out, _ = whet(monkeypatch, capsys, "--hosts", cluster, "--rdzv", "node1:29500")
    assert code == 0 and "equal on 2 nodes" in out
    asked = (tmp_path / "asked").read_text()
    assert "--distributed --json --several --rdzv node1:29500" in asked
    cluster.write_text("node1\nnode3\n")
    code, out, _ = whet(monkeypatch, capsys, "--distributed", "--hosts", cluster, "--json")
    told = json.loads(out)
    assert code == 1 and told["nodes"].keys() == {"node1"}
    assert "Permission denied (publickey)" in told["findings"][0]["text"]
