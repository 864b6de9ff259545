"""Errors of torch, CUDA, NCCL and Triton, as they were met, and what whet makes of them."""

import sys

import pytest

from whet.doctor.advice import ADVICE
from whet.doctor.explain import _SIGNS, explain

RECORDED = [
    ("out of GPU memory",
     "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 11.76 GiB of which "
     "512.00 MiB is free. Including non-PyTorch memory, this process has 11.20 GiB memory in use."),
    ("out of GPU memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ("out of memory",
     "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to "
     "allocate 4398046511104 bytes. Error code 12 (Cannot allocate memory)"),
    ("device mismatch",
     "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
     "(when checking argument for argument mat1 in method wrapper_CUDA_addmm)"),
    ("device mismatch",
     "Input type (torch.cuda.FloatTensor) and weight type (torch.FloatTensor) should be the same"),
    ("device mismatch", "Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)"),
    ("no kernel image", "CUDA error: no kernel image is available for execution on the device"),
    ("driver too old",
     "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver"),
    ("driver too old",
     "Unexpected error from cudaGetDeviceCount(). Error 804: forward compatibility was attempted on non "
     "supported HW"),
    ("driver too old", "CUDA driver version is insufficient for CUDA runtime version"),
    ("CPU torch", "Torch not compiled with CUDA enabled"),
    ("no driver", "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU"),
    ("no such GPU", "CUDA error: invalid device ordinal"),
    ("GPU busy", "CUDA error: all CUDA-capable devices are busy or unavailable"),
    ("GPU busy", "CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
    ("CUDA does not start",
     "Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized"),
    ("device assert", "CUDA error: device-side assert triggered"),
    ("illegal access", "CUDA error: an illegal memory access was encountered"),
    ("GPU lost", "CUDA error: unspecified launch failure"),
    ("small shm",
     "DataLoader worker (pid 4711) is killed by signal: Bus error. It is possible that dataloader's "
     "workers are out of shared memory. Please try to raise your shared memory limit."),
    ("no NCCL", "Distributed package doesn't have NCCL built in"),
    ("duplicate GPU",
     "NCCL error in: ProcessGroupNCCL.cpp:3356, invalid usage, NCCL version 2.26.2\nDuplicate GPU "
     "detected : rank 1 and rank 0 both on CUDA device 1000"),
    ("NCCL timeout",
     "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=8, OpType=ALLREDUCE, "
     "NumelIn=1, NumelOut=1, Timeout(ms)=600000) ran for 600042 milliseconds before timing out."),
    ("NCCL error",
     "NCCL error in: ProcessGroupNCCL.cpp:2356, unhandled system error (run with NCCL_DEBUG=INFO for "
     "details), NCCL version 2.21.5\nncclSystemError: System call (e.g. socket, malloc) failed."),
    ("out of GPU memory",
     "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error\nLast error:\nCuda failure 2 "
     "'out of memory'"),
    ("port in use",
     "The server socket has failed to listen on any local network address. port: 29500, useIpv6: false, "
     "code: -98, name: EADDRINUSE, message: address already in use"),
    ("rendezvous",
     "The client socket has timed out after 60000ms while trying to connect to (10.0.0.9, 29500)."),
    ("rendezvous", "[../gloo/transport/tcp/pair.cc:544] Connection closed by peer [10.0.0.2]:51234"),
    ("interface", "Bootstrap : no socket interface found"),
    ("no compiler", "Failed to find C compiler. Please specify via CC environment variable"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "words"), RECORDED)
def test_recorded_errors_get_their_advice(key, words):
    finding = explain(RuntimeError(words))
    assert finding is not None and finding.status == "fault"
    assert (finding.fix, finding.why) == (ADVICE[key].fix, ADVICE[key].why)
    assert words.split("\n")[0][:40] in finding.text


def test_every_sign_has_an_error_that_was_met():
    assert {key for _sign, key, _text in _SIGNS} == {key for key, _words in RECORDED}


@pytest.mark.parametrize(
    "words",
    [
        "[Errno 104] Connection reset by peer",  # of a download, say
        "[Errno 98] Address already in use",  # of a server of the user's
        "Input type (float) and bias type (c10::BFloat16) should be the same",
        "The size of tensor a (3) must match the size of tensor b (4)",
        "the loss is no number",
        "",
    ],
)  # fmt: skip
def test_other_errors_are_left_alone(words):
    assert explain(RuntimeError(words)) is None
    assert explain(KeyError("devices")) is None


def test_torch_raises_what_is_recorded():
    import torch

    if not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError)) as caught:
            torch.zeros(1, device="cuda")
        assert explain(caught.value) is not None
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert explain(caught.value).fix == ADVICE["out of memory"].fix
    if not torch.distributed.is_nccl_available():
        with pytest.raises(RuntimeError) as caught:
            torch.distributed.init_process_group(
                "nccl", init_method="tcp://127.0.0.1:0", rank=0, world_size=1
            )
        assert "your torch has no NCCL" in explain(caught.value).text


def test_causes_are_asked_too():
    try:
        try:
            raise RuntimeError(
                "CUDA error: no kernel image is available for execution on the device"
            )
        except RuntimeError as error:
            raise ValueError("the layer failed") from error
    except ValueError as error:
        assert "no code for this GPU" in explain(error).text
    assert explain(MemoryError()).fix == ADVICE["out of memory"].fix


def test_a_long_error_is_cut_to_its_first_line():
    finding = explain(RuntimeError("\nCUDA out of memory. " + "x" * 500 + "\nsecond line"))
    assert len(finding.text) < 220 and "second line" not in finding.text


def test_the_command_line_prints_one_sentence_and_the_doctor(monkeypatch, capsys):
    from whet import cli

    def fails(*_args, **_kwargs):
        raise RuntimeError("Distributed package doesn't have NCCL built in")

    monkeypatch.setattr(cli, "app", fails)
    monkeypatch.setattr(sys, "argv", ["whet", "train", "x.yaml"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr().err
    assert ended.value.code == 1 and "your torch has no NCCL" in told and "`whet doctor`" in told
    assert "Traceback" not in told and told.count("\n") == 1
    monkeypatch.setattr(sys, "argv", ["whet", "train", "x.yaml", "--debug"])
    with pytest.raises(RuntimeError):
        cli.main()


def test_an_error_that_nobody_knows_keeps_its_traceback(monkeypatch):
    from whet import cli

    def fails(*_args, **_kwargs):
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(cli, "app", fails)
    monkeypatch.setattr(sys, "argv", ["whet", "train", "x.yaml"])
    with pytest.raises(RuntimeError, match="a bug of ours"):
        cli.main()
