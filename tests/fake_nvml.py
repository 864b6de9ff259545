"""A module with nvidia-ml-py's functions, for machines without a GPU; `cards` says what it shows."""

from types import ModuleType, SimpleNamespace

GIB = 2**30


class NVMLError(Exception):
    pass


def fake_nvml(cards, starts=True):
    """Return a module `pynvml` that shows cards; a figure that a card lacks raises, as NVML does."""
    module = ModuleType("pynvml")

    def figure(name):
        def ask(card, *_):
            if name not in card:
                raise NVMLError("Not Supported")
            return card[name]

        return ask

    def init():
        if not starts:
            raise NVMLError("Driver Not Loaded")

    def by_uuid(uuid):
        for card in cards:
            if card["uuid"] == uuid:
                return card
        raise NVMLError("Not Found")

    module.NVMLError = NVMLError
    module.NVML_TEMPERATURE_GPU = 0
    module.nvmlInit = init
    module.nvmlDeviceGetCount = lambda: len(cards)
    module.nvmlDeviceGetHandleByIndex = lambda index: cards[index]
    module.nvmlDeviceGetHandleByUUID = by_uuid
    module.nvmlDeviceGetIndex = cards.index
    module.nvmlDeviceGetName = figure("name")
    module.nvmlDeviceGetMemoryInfo = figure("memory")
    module.nvmlDeviceGetUtilizationRates = figure("rates")
    module.nvmlDeviceGetTemperature = figure("heat")
    module.nvmlDeviceGetPowerUsage = figure("power")
    module.nvmlDeviceGetEnforcedPowerLimit = figure("limit")
    return module


RTX_4090 = {
    "uuid": "GPU-1", "name": b"NVIDIA GeForce RTX 4090", "heat": 66, "power": 310_500, "limit": 450_000,
    "memory": SimpleNamespace(used=11 * GIB, total=24 * GIB), "rates": SimpleNamespace(gpu=87),
}  # fmt: skip
LAPTOP = {
    "uuid": "GPU-2", "name": "NVIDIA RTX A500 Laptop GPU",
    "memory": SimpleNamespace(used=1 * GIB, total=4 * GIB),
}  # fmt: skip
