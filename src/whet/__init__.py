"""whet sharpens language models: fine-tuning on one GPU or a CPU, with the numbers proven.

Importing whet touches nothing; the names below are loaded when they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whet.compat.arguments import TrainingArguments
    from whet.compat.chat import get_chat_template, train_on_responses_only
    from whet.compat.models import (
        FastLanguageModel,
        FastModel,
        is_bf16_supported,
        is_bfloat16_supported,
    )
    from whet.compat.notebooks import (
        PatchDPOTrainer,
        standardize_data_formats,
        standardize_sharegpt,
        unsloth_train,
    )
    from whet.compat.trl import SFTConfig as SFTConfig
    from whet.compat.trl import SFTTrainer as SFTTrainer
    from whet.compat.trl import UnslothTrainer as UnslothTrainer
    from whet.compat.trl import UnslothTrainingArguments as UnslothTrainingArguments
    from whet.config import Config
    from whet.config_file import load_config
    from whet.errors import InputError, WhetError
    from whet.train.recipe import fit
    from whet.trained import load_trained

__version__ = "0.1.0"
# Names that need an extra (those of compat/trl.py) are not among them, for `from whet import *`.
__all__ = [
    "Config", "FastLanguageModel", "FastModel", "InputError", "PatchDPOTrainer", "TrainingArguments",
    "WhetError", "fit", "get_chat_template", "is_bf16_supported", "is_bfloat16_supported", "load_config",
    "load_trained", "standardize_data_formats", "standardize_sharegpt", "train_on_responses_only",
    "unsloth_train",
]  # fmt: skip

_HOMES = {
    "Config": "whet.config",
    "load_config": "whet.config_file",
    "InputError": "whet.errors",
    "WhetError": "whet.errors",
    "fit": "whet.train.recipe",
    "load_trained": "whet.trained",
    "FastLanguageModel": "whet.compat.models",
    "FastModel": "whet.compat.models",
    "is_bf16_supported": "whet.compat.models",
    "is_bfloat16_supported": "whet.compat.models",
    "TrainingArguments": "whet.compat.arguments",
    "get_chat_template": "whet.compat.chat",
    "train_on_responses_only": "whet.compat.chat",
    "PatchDPOTrainer": "whet.compat.notebooks",
    "standardize_data_formats": "whet.compat.notebooks",
    "standardize_sharegpt": "whet.compat.notebooks",
    "unsloth_train": "whet.compat.notebooks",
    "SFTTrainer": "whet.compat.trl",
    "SFTConfig": "whet.compat.trl",
    "UnslothTrainer": "whet.compat.trl",
    "UnslothTrainingArguments": "whet.compat.trl",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'whet' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
