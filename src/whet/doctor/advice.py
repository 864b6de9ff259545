"""What each fault means and what helps: one table for the doctor's checks and for errors at run time.

docs/doctor.md explains every key of it; a test holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from whet.doctor.finding import Finding


@dataclass(frozen=True, slots=True)
class Advice:
    """Why a fault matters, and the command or change that helps."""

    why: str
    fix: str


_WHEELS = "pip install --force-reinstall torch from PyTorch's CUDA wheels (see pytorch.org)"

ADVICE: dict[str, Advice] = {
    "no driver": Advice(
        "without the kernel's driver no program can use the GPU",
        "install the driver (Ubuntu: sudo ubuntu-drivers install), then reboot",
    ),
    "driver not loaded": Advice(
        "the driver is installed, but its kernel module does not run",
        "sudo modprobe nvidia; when that fails: sudo apt install linux-headers-$(uname -r) && sudo dkms "
        "autoinstall, then reboot",
    ),
    "secure boot": Advice(
        "Secure Boot loads only signed modules, and the driver's is not signed with a key that it knows",
        "sudo mokutil --import /var/lib/shim-signed/mok/MOK.der, reboot and choose 'Enroll MOK'; or turn "
        "Secure Boot off in the firmware",
    ),
    "driver mismatch": Advice(
        "the driver was updated while the old module was in use",
        "reboot; or stop what uses the GPU, then sudo rmmod nvidia_uvm nvidia_drm nvidia_modeset nvidia "
        "&& sudo modprobe nvidia",
    ),
    "no GPU seen": Advice(
        "the driver runs, but it sees no card",
        "in a container, start it with --gpus all; on the host, look at power and seat of the card and "
        "at sudo dmesg | grep -i nvrm",
    ),
    "GPU lost": Advice(
        "the card has stopped answering: power, heat or hardware",
        "sudo dmesg | grep Xid, then reboot; lower the power limit (sudo nvidia-smi -pl WATTS) if it "
        "comes again",
    ),
    "GPU lost in the container": Advice(
        "the host has taken the card's device files from the container, as a reload of systemd does",
        "restart the container; for good, give it the devices by CDI (nvidia-ctk cdi generate) or use "
        "the cgroupfs driver",
    ),
    "container without GPU": Advice(
        "the container was given no card, or not the driver's libraries",
        "install nvidia-container-toolkit on the host, sudo nvidia-ctk runtime configure "
        "--runtime=docker && sudo systemctl restart docker, and start with --gpus all",
    ),
    "WSL": Advice(
        "WSL uses the driver of Windows, and Windows does not let it through",
        "update the NVIDIA driver in Windows, then wsl --update && wsl --shutdown; install no driver "
        "in WSL",
    ),
    "GPU forbidden": Advice(
        "this user may not open the card's device files",
        "sudo usermod -aG video,render $USER, and log in again",
    ),
    "driver too old": Advice(
        "torch's CUDA is of a newer major version than the driver runs",
        "update the driver and reboot; or take an older CUDA: " + _WHEELS,
    ),
    "CPU torch": Advice("this torch has no CUDA in it, so that the GPU stands idle", _WHEELS),
    "wrong wheels": Advice(
        "this torch was built for other hardware than the card in this machine",
        "pip uninstall torch, then " + _WHEELS,
    ),
    "mixed wheels": Advice(
        "they are loaded into one process and must be of one build",
        "pip install --force-reinstall torch torchvision torchaudio, all from the same of PyTorch's "
        "wheels",
    ),
    "no kernel image": Advice(
        "this torch has no code for the card's compute capability",
        "take a torch that has: the newest for a new card, an older one for an old card. "
        + _WHEELS,
    ),
    "CUDA does not start": Advice(
        "driver and torch fit by their numbers, and yet CUDA fails",
        "sudo modprobe nvidia_uvm; nvidia-smi; on servers with NVSwitch also sudo systemctl restart "
        "nvidia-fabricmanager; then reboot",
    ),
    "GPU busy": Advice(
        "another process holds the card, or its compute mode lets only one in",
        "end it (nvidia-smi shows its number), or sudo nvidia-smi -c DEFAULT",
    ),
    "no such GPU": Advice(
        "a device number was asked for that is not there",
        "compare CUDA_VISIBLE_DEVICES and --nproc with nvidia-smi -L",
    ),
    "out of GPU memory": Advice(
        "the GPU's memory is full",
        "see `whet plan CONFIG`; lower model.max_length, set model.load_in_4bit: true or "
        "train.optimizer: adamw_8bit, and end what else holds the GPU",
    ),
    "out of memory": Advice(
        "the machine's memory, or what its container may use, is full",
        "close other programs or raise the limit; lower model.max_length or the rows at once "
        "(eval.batch_size)",
    ),
    "memory limit": Advice(
        "the container or job may use less memory than the machine has; beyond it the kernel kills it",
        "raise it (docker run --memory, resources.limits.memory, sbatch --mem)",
    ),
    "small shm": Advice(
        "processes of one machine exchange tensors through /dev/shm",
        "docker run --shm-size=8g (or --ipc=host); in Kubernetes an emptyDir with medium: Memory there",
    ),
    "device mismatch": Advice(
        "one tensor of an operation is on the GPU and another on the CPU",
        "with code of your own: move inputs to model.device; otherwise run with --debug and report it",
    ),
    "device assert": Advice(
        "a kernel met an index out of range: mostly a token id or label beyond the vocabulary",
        "run again with CUDA_LAUNCH_BLOCKING=1 and --debug; check that model and tokenizer belong "
        "together",
    ),
    "illegal access": Advice(
        "a kernel read or wrote beyond its tensors",
        "run again with CUDA_LAUNCH_BLOCKING=1 and --debug, and with --set engine.enabled=false; report "
        "what changes",
    ),
    "no NCCL": Advice(
        "several GPUs talk to each other through NCCL, and this torch was built without it",
        _WHEELS + " on Linux; on CPUs and on Windows use gloo",
    ),
    "NCCL timeout": Advice(
        "one process waited for the others too long: one of them died, hangs or got other work",
        "look for the first error of any rank; with TORCH_NCCL_TRACE_BUFFER_SIZE=2000 it says where each "
        "was",
    ),
    "NCCL error": Advice(
        "NCCL could not connect the GPUs or lost them",
        "run again with NCCL_DEBUG=INFO; name the network with NCCL_SOCKET_IFNAME; NCCL_P2P_DISABLE=1 "
        "tells whether peer access is the cause",
    ),
    "duplicate GPU": Advice(
        "two processes were given the same card",
        "start with torchrun or whet's --nproc, at most one process a GPU (nvidia-smi -L)",
    ),
    "port in use": Advice(
        "the processes meet at a port that another program holds",
        "end the earlier run, or give another one (--rdzv HOST:PORT, MASTER_PORT)",
    ),
    "rendezvous": Advice(
        "the processes did not meet: address, port or firewall",
        "MASTER_ADDR must be an address of rank 0 that every node reaches, its MASTER_PORT open in the "
        "firewall, and each node started",
    ),
    "interface": Advice(
        "the processes listen on a network interface that the others do not reach",
        "set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to the interface of the cluster's "
        "network (ip -br a)",
    ),
    "unequal nodes": Advice(
        "nodes with different software compute different numbers, or hang",
        "use one image or environment on all nodes (pip install -c constraints.txt)",
    ),
    "no shared folder": Advice(
        "rank 0 writes checkpoints, and every node must read them to resume",
        "put run.dir on a file system that all nodes mount (NFS, Lustre, ...)",
    ),
    "no compiler": Advice(
        "Triton compiles a small launcher for each kernel with the system's C compiler",
        "sudo apt install gcc python3-dev, or set CC",
    ),
    "Triton": Advice(
        "whet's kernels are Triton's; without them layers keep their original code",
        "pip install --force-reinstall triton in the version that torch asks for (pip show torch)",
    ),
    "missing package": Advice("whet needs it", "pip install -c constraints.txt"),
}


def report(
    name: str, key: str, text: str, status: Literal["warn", "fault"] = "fault", fix: str = ""
) -> Finding:
    """Return a finding with the advice of a key.

    Args:
        name: What was looked at.
        key: Of ADVICE.
        text: What was found.
        status: warn or fault.
        fix: A closer fix than the table's, where one is known.
    """
    advice = ADVICE[key]
    return Finding(name, status, text, fix or advice.fix, advice.why)
