"""A model that scores answers: the base with one number at its end instead of the next token's logits."""

from __future__ import annotations

import logging
from typing import Any

import torch

from whet.config import Config
from whet.errors import InputError
from whet.model import CausalLM, Tokenizer
from whet.model.load import device, resolve
from whet.model.lora import decoder_layers

SCORE = "score"  # what transformers calls that layer, in every family


def load_reward_model(config: Config, dtype: torch.dtype, tokenizer: Tokenizer) -> CausalLM:
    """Load a base model with a new scoring layer, and freeze and adapt it as the config says.

    Args:
        config: The whole config.
        dtype: Type of the weights.
        tokenizer: Tells the padding token, by which the model finds an answer's last token.

    Raises:
        InputError: transformers has no scoring form of this family, or an adapter starts otherwise than
            by default.
    """
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(
        logging.ERROR
    )  # it warns that the layer is new, which it should be
    try:
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            resolve(config.model.name),
            num_labels=1,
            dtype=dtype,
            revision=config.model.revision,
            trust_remote_code=config.model.trust_remote_code,
        )
    except ValueError as error:
        raise InputError(
            f"'{config.model.name}' has no form that scores answers: {str(error).splitlines()[0]}",
            fix="use a model of another family for method reward",
        ) from error
    finally:
        transformers_logging.set_verbosity(before)
    model.to(device())
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if config.train.parameters == "last_layers":
        model.requires_grad_(False)
        for layer in [*decoder_layers(model)[-config.train.last_layers :], getattr(model, SCORE)]:
            layer.requires_grad_(True)
    if config.train.parameters != "lora":
        return model
    return _add_adapter(model, config)


def _add_adapter(model: Any, config: Config) -> CausalLM:
    from peft import LoraConfig, get_peft_model

    lora = config.lora
    if lora.init not in ("default", "gaussian"):
        raise InputError(
            "method 'reward' starts adapters by default or gaussian", f"lora.init {lora.init}",
            "leave lora.init at default",
        )  # fmt: skip
    targets = [lora.targets] if isinstance(lora.targets, str) else lora.targets
    settings: dict[str, Any] = {
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "bias": lora.bias,
        "target_modules": "all-linear" if targets == ["all-linear"] else targets,
        "init_lora_weights": True if lora.init == "default" else "gaussian",
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "modules_to_save": [*lora.modules_to_save, SCORE],
    }
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **settings))  # type: ignore[return-value]
