"""A model with random weights, for training from scratch (`model.init: random`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from whet.errors import InputError
from whet.model import CausalLM, Tokenizer

if TYPE_CHECKING:
    import torch


def random_model(
    settings: Any, dtype: torch.dtype, seed: int, trust_remote_code: bool = False
) -> CausalLM:
    """Make a model on the CPU with the weights its family starts training from.

    They are drawn in float32 on the CPU, so that they are the same for every device and type.

    Args:
        settings: A config of transformers.
        dtype: Type of the weights.
        seed: Of the draw; the process's own random state is left as it was.
        trust_remote_code: Whether code that comes with the config may run.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        made = AutoModelForCausalLM.from_config(
            settings, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    return made.to(dtype)


def require_room(settings: Any, tokenizer: Tokenizer, name: str) -> None:
    """Refuse a config with fewer embeddings than its tokenizer has tokens.

    Args:
        settings: A config of transformers.
        tokenizer: The tokenizer beside it.
        name: How the error calls the model.

    Raises:
        InputError: There are fewer.
    """
    num = settings.get_text_config().vocab_size
    if num < len(tokenizer):
        raise InputError(
            f"the config of '{name}' has fewer embeddings than its tokenizer has tokens",
            f"vocab_size {num}, {len(tokenizer)} tokens",
            "raise vocab_size in its config.json",
        )
