"""whet sharpens language models: fine-tuning on one GPU or a CPU, with the numbers proven.

Importing whet touches nothing; the names below are loaded when they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whet.config import Config
    from whet.config_file import load_config
    from whet.errors import InputError, WhetError
    from whet.train.recipe import fit
    from whet.trained import load_trained

__version__ = "0.1.0"
__all__ = [
    "Config", "InputError", "WhetError", "fit", "load_config", "load_trained",
]  # fmt: skip

_HOMES = {
    "Config": "whet.config",
    "load_config": "whet.config_file",
    "InputError": "whet.errors",
    "WhetError": "whet.errors",
    "fit": "whet.train.recipe",
    "load_trained": "whet.trained",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'whet' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
