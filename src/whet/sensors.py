"""What the machine is doing now: CPU, RAM, and each GPU's use, memory, heat and power.

NVML is asked through nvidia-ml-py (`pip install "whet[gpu]"`) where it is installed; what a machine
cannot tell is left out.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from typing import Any

REST_SECONDS = 1.0  # between two readings of a run: a short step must not wait for sensors


class Sensors:
    """Reads the machine.

    Args:
        gpus: UUIDs of the GPUs to read; None: all.
        patient: Start `nvidia-smi` where NVML cannot be asked, which takes tens of milliseconds.
    """

    def __init__(self, gpus: Sequence[str] | None = None, patient: bool = False) -> None:
        import psutil

        self._psutil, self._patient = psutil, patient
        self._last = -REST_SECONDS
        self._nvml, self._handles = _open_nvml(gpus)
        psutil.cpu_percent()  # the first call only starts the count

    def read(self) -> dict[str, Any]:
        """Return the figures; shares are 0 to 1, and `gpus` is there when one was read."""
        memory = self._psutil.virtual_memory()
        found: dict[str, Any] = {
            "cpu_utilization": self._psutil.cpu_percent() / 100,
            "ram_used_bytes": memory.total - memory.available,
            "ram_total_bytes": memory.total,
        }
        gpus = [_read_gpu(self._nvml, index, handle) for index, handle in self._handles]
        if not gpus and self._patient and self._nvml is None:
            gpus = _ask_nvidia_smi()
        if gpus:
            found["gpus"] = gpus
        return found

    def sample(self) -> dict[str, Any] | None:
        """Return the figures, or None less than a second after the last ones."""
        now = time.monotonic()
        if now - self._last < REST_SECONDS:
            return None
        self._last = now
        return self.read()


def training_gpus() -> list[str]:
    """Return the UUID of the GPU that this process computes on, or nothing on a CPU."""
    import torch

    if not torch.cuda.is_available():
        return []
    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    return [] if uuid is None else [f"GPU-{uuid}"]


def _open_nvml(gpus: Sequence[str] | None) -> tuple[Any, list[tuple[int, Any]]]:
    """Return the module, or None where NVML does not start, and the GPUs' numbers and handles."""
    if gpus is not None and not gpus:
        return None, []
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None, []
    try:
        nvml.nvmlInit()
        if gpus is None:
            count = nvml.nvmlDeviceGetCount()
            return nvml, [(n, nvml.nvmlDeviceGetHandleByIndex(n)) for n in range(count)]
        handles = [nvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in gpus]
        return nvml, [(nvml.nvmlDeviceGetIndex(handle), handle) for handle in handles]
    except nvml.NVMLError:
        return None, []


def _read_gpu(nvml: Any, index: int, handle: Any) -> dict[str, Any]:
    """Read one GPU; a sensor that it has not (MIG, WSL, laptops) is left out."""
    memory: Callable[[], Any] = lambda: nvml.nvmlDeviceGetMemoryInfo(handle)  # noqa: E731
    ways: dict[str, Callable[[], Any]] = {
        "name": lambda: _text(nvml.nvmlDeviceGetName(handle)),
        "utilization": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
        "used_bytes": lambda: memory().used,
        "total_bytes": lambda: memory().total,
        "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        "power_watts": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "power_limit_watts": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
    }
    found: dict[str, Any] = {"index": index}
    for name, ask in ways.items():
        try:
            found[name] = ask()
        except nvml.NVMLError:
            continue
    return found


def _text(name: str | bytes) -> str:
    """Decode what nvidia-ml-py before 11.5 returned as bytes."""
    return name.decode() if isinstance(name, bytes) else name


def _ask_nvidia_smi() -> list[dict[str, Any]]:
    from whet.doctor.machine import query_cards

    found = []
    for card in query_cards():
        told = {
            "index": card.index, "name": card.name, "utilization": card.utilization,
            "used_bytes": card.used_bytes, "total_bytes": card.total_bytes,
            "temperature_c": card.temperature_c, "power_watts": card.power_watts,
        }  # fmt: skip
        found.append({name: value for name, value in told.items() if value is not None})
    return found
