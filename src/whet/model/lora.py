"""Choose what is trained: an adapter through peft, the last layers, or everything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from whet.config import Config
from whet.errors import InputError, did_you_mean
from whet.model import CausalLM
from whet.model.load import load_model, load_model_config
from whet.sections import LoraSection, ModelSection

if TYPE_CHECKING:
    from torch import nn


def prepare_parameters(model: CausalLM, config: Config) -> CausalLM:
    """Freeze and adapt a loaded model as the config says.

    Args:
        model: The base model; it is changed in place.
        config: The whole config.

    Returns:
        The model to train: the same one, or a peft model around it.

    Raises:
        InputError: A target module or layer the config names is not in the model.
    """
    if config.train.parameters == "lora":
        return add_adapter(model, config.lora, config.model)
    if config.train.parameters == "last_layers":
        freeze_all_but_last(model, config.train.last_layers)
    return model


def check_parameters(config: Config) -> None:
    """Check the names and numbers that depend on the model's structure, before its weights are read.

    Args:
        config: The whole config.

    Raises:
        InputError: A target module or layer is not in the model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            load_model_config(config.model), trust_remote_code=config.model.trust_remote_code
        )
    if config.train.parameters == "lora":
        _check_targets(model, config.lora)
    elif config.train.parameters == "last_layers":
        freeze_all_but_last(model, config.train.last_layers)


def _check_targets(model: nn.Module, lora: LoraSection) -> None:
    _check_names(model, [n for n in _target_names(lora) if n != "all-linear"], "lora.targets")
    _check_names(model, lora.modules_to_save, "lora.modules_to_save")


def _target_names(lora: LoraSection) -> list[str]:
    return [lora.targets] if isinstance(lora.targets, str) else lora.targets


def add_adapter(
    model: CausalLM,
    lora: LoraSection,
    base: ModelSection,
    more: Mapping[str, Any] | None = None,
) -> CausalLM:
    """Put a LoRA adapter on a model.

    Args:
        model: The base model.
        lora: The config's lora section.
        base: Where the base came from; LoftQ reads the weights again, unquantised.
        more: More arguments of peft's LoraConfig, such as layers_to_transform.

    Raises:
        InputError: A target does not exist.
    """
    from peft import LoraConfig, get_peft_model

    _check_targets(model, lora)
    names = _target_names(lora)
    settings: dict[str, Any] = {
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "bias": lora.bias,
        "target_modules": "all-linear" if names == ["all-linear"] else names,
        # LoftQ's start is set below, because peft would change the base for it.
        "init_lora_weights": True if lora.init in ("default", "loftq") else lora.init,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "modules_to_save": lora.modules_to_save or None,
        **(more or {}),
    }
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    if lora.init == "loftq":
        _start_at_quantisation_error(adapted, base)
    return adapted


def _start_at_quantisation_error(adapted: CausalLM, base: ModelSection) -> None:
    """Set each adapter to the best rank-r part of W - dequantise(NF4(W)) (LoftQ, arXiv 2310.08659).

    One step of the paper's alternation: the 4-bit base stays what it is, so that the saved adapter
    fits the plain quantised model. peft 0.21's own `replace_lora_weights_loftq` needs CUDA and
    leaves out the factor alpha / rank; this can go when it does neither.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora import Linear4bit

    exact = load_model(base.model_copy(update={"load_in_4bit": False}), torch.float32)
    weights = dict(exact.named_parameters())
    with torch.no_grad():
        for path, module in adapted.named_modules():
            if not isinstance(module, Linear4bit):
                continue
            quantised: Any = module.get_base_layer().weight
            kept = dequantize_4bit(quantised.data, quantised.quant_state)
            weight = weights[path.removeprefix("base_model.model.") + ".weight"]
            residual = weight.float() - kept.float()
            rank, scale = module.r["default"], module.scaling["default"]
            left, values, right = torch.linalg.svd(residual, full_matrices=False)
            root = values[:rank].sqrt()
            adapter: Any = module
            adapter.lora_A["default"].weight.copy_(root[:, None] * right[:rank])
            adapter.lora_B["default"].weight.copy_(left[:, :rank] * root / scale)


def _check_names(model: nn.Module, names: list[str], key: str) -> None:
    """Check that each name is a module of the model, by its whole path or its last part."""
    paths = {path for path, _ in model.named_modules() if path}
    for name in names:
        if any(path == name or path.endswith(f".{name}") for path in paths):
            continue
        linear = Counter(
            path.rsplit(".", 1)[-1]
            for path, module in model.named_modules()
            if type(module).__name__
            in ("Linear", "Conv1D", "Linear4bit", "Linear8bitLt", "Embedding")
        )
        guess = did_you_mean(name, linear)
        raise InputError(
            f"{key}: the model has no module '{name}'",
            fix=(f"did you mean '{guess}'? " if guess else "") + f"it has {', '.join(linear)}",
        )


def freeze_all_but_last(model: CausalLM, num_layers: int) -> None:
    """Freeze everything but the last decoder layers, in place.

    Args:
        model: The model.
        num_layers: How many layers stay trainable.

    Raises:
        InputError: The model has fewer layers.
    """
    layers = decoder_layers(model)
    if num_layers > len(layers):
        raise InputError(
            f"train.last_layers is more than the model has ({len(layers)} layers)", num_layers,
            f"set it to {len(layers)} or less, or train.parameters: full",
        )  # fmt: skip
    model.requires_grad_(False)
    for layer in layers[-num_layers:]:
        layer.requires_grad_(True)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return a model's decoder layers: its largest list of modules.

    Args:
        model: Any causal language model.
    """
    from torch import nn

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    assert lists, "a causal language model without a list of layers"
    return list(max(lists, key=lambda m: sum(p.numel() for p in m.parameters())))


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Count trainable and all parameters; a 4-bit weight counts by its elements, not its bytes.

    Returns:
        (trainable, all).
    """
    trainable = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        num = state.shape.numel() if state is not None else parameter.numel()
        total += num
        trainable += num if parameter.requires_grad else 0
    return trainable, total
