"""trl's SFTTrainer with whet's engine, taking the argument names of all its versions.

`SFTTrainer` is a subclass that does three things and leaves the rest to trl: it gives old arguments
their new places, puts the engine into the model and above trl's own head, and lets the engine's
policies do what gradient checkpointing does, which would compute fused layers twice. It is imported
when it is asked for, because trl is an optional part (`pip install 'whet[trl]'`).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from whet.compat.arguments import OLD_TRL, sort_out, translated, without_mixed_precision
from whet.compat.engine import put_engine
from whet.compat.export import bind, is_quantised
from whet.engine import swap
from whet.errors import InputError
from whet.plan.memory import LEAST
from whet.train.optimizers import let_embeddings_learn_at_

try:
    import trl as installed  # type: ignore[import-not-found]
except ImportError as error:
    raise InputError("whet.SFTTrainer needs trl", fix="pip install 'whet[trl]'") from error

if TYPE_CHECKING:
    import torch

trl: Any = installed  # its names are lazy, and pyright sees none of them

logger = logging.getLogger(__name__)

# What earlier trainers took themselves and the config takes today.
_MOVED = (
    "dataset_text_field", "packing", "max_length", "max_seq_length", "dataset_num_proc",
    "dataset_kwargs", "eval_packing", "neftune_noise_alpha", "model_init_kwargs", "padding_free",
    "assistant_only_loss", "completion_only_loss", "packing_strategy",
)  # fmt: skip


def SFTConfig(*args: Any, **kwargs: Any) -> Any:
    """Make trl's SFTConfig from names of this and of earlier versions.

    Args:
        *args: As trl takes them.
        **kwargs: As trl takes them, or as it did. Without CUDA mixed precision is left out, which trl
            would turn on.

    Returns:
        An object of trl's own class.

    Raises:
        InputError: An argument is unknown to every version.
    """
    found = translated("SFTConfig", trl.SFTConfig, kwargs)
    if not (found.get("fp16") or found.get("use_cpu")):
        found = {"bf16": _has_bf16(), **found}
    return trl.SFTConfig(*args, **found)


def _has_bf16() -> bool:
    from whet.compat.models import is_bfloat16_supported

    return is_bfloat16_supported()


class SFTTrainer(trl.SFTTrainer):
    """trl's SFTTrainer with whet's engine in the model.

    Args:
        model: A model of `FastLanguageModel`, or any that trl takes; the engine is put into it.
        args: trl's SFTConfig, or transformers' TrainingArguments; it is not changed.
        data_collator: As in trl.
        train_dataset: As in trl.
        eval_dataset: As in trl.
        processing_class: The tokenizer; `tokenizer` is its earlier name.
        formatting_func: Makes the text of one row, or as it was, of a dict of lists.
        **given: More arguments of trl's trainer, and those that have moved to the config since:
            dataset_text_field, max_seq_length, dataset_num_proc, packing, neftune_noise_alpha, ...

    Raises:
        InputError: An argument is unknown to every version, or given under two names.
    """

    def __init__(
        self,
        model: Any,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        formatting_func: Callable[..., Any] | None = None,
        **given: Any,
    ) -> None:
        moved = {name: given.pop(name) for name in _MOVED if name in given}
        tokenizer = given.pop("tokenizer", None)
        if tokenizer is not None and processing_class not in (None, tokenizer):
            raise InputError(
                "SFTTrainer: tokenizer is the earlier name of processing_class", fix="give one"
            )
        kept = {name: given.pop(name) for name in _own_arguments() if name in given}
        sort_out(
            "SFTTrainer", {k: v for k, v in given.items() if v is not None},
            {*_own_arguments(), *_MOVED, "tokenizer", "formatting_func"}, OLD_TRL,
        )  # fmt: skip
        config = settle_config(args, moved, model)
        if formatting_func is not None:
            formatting_func = one_by_one(formatting_func, train_dataset)
            config.dataset_text_field = "text"  # trl writes there what the function makes
        if not isinstance(model, str):
            _attach(model, config)
        exact = [] if isinstance(model, str) else _float32_parameters(model)
        # One process drives one GPU; left alone, transformers puts DataParallel over all it sees.
        config._n_gpu = min(1, config.n_gpu)
        super().__init__(
            model,
            config,
            data_collator,
            train_dataset,
            eval_dataset,
            tokenizer if processing_class is None else processing_class,
            formatting_func=formatting_func,
            **kept,
        )
        if isinstance(model, str):
            _attach(self.model, self.args)
        swap.stay_on_top(self.model)
        if self.model is not model and hasattr(self.model, "peft_config"):
            bind(self.model)  # the adapter is the trainer's
        _keep_adapters_in_float32(self.model, exact)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, with the engine even where `for_inference` has set it aside before."""
        swap.set_paused(self.model, False)
        return super().train(*args, **kwargs)


def UnslothTrainingArguments(
    *args: Any, embedding_learning_rate: float | None = None, **kwargs: Any
) -> Any:
    """Make trl's SFTConfig, with a learning rate of their own for embeddings and head.

    Args:
        *args: As `SFTConfig` takes them.
        embedding_learning_rate: Of what `modules_to_save` trains of them; None: `learning_rate`.
        **kwargs: As `SFTConfig` takes them.
    """
    config = SFTConfig(*args, **kwargs)
    config.embedding_learning_rate = embedding_learning_rate
    return config


class UnslothTrainer(SFTTrainer):
    """`SFTTrainer` with a learning rate of their own for embeddings and head.

    Args:
        *args: As `SFTTrainer` takes them; its config is of `UnslothTrainingArguments`.
        **kwargs: As `SFTTrainer` takes them.
    """

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Make the optimizer, with groups of their own for embeddings and head."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        rate = getattr(self.args, "embedding_learning_rate", None)
        if fresh and rate is not None:
            let_embeddings_learn_at_(optimizer, self.model, rate)
        return optimizer


def _own_arguments() -> tuple[str, ...]:
    """Return the arguments of trl's trainer that this one hands on by name."""
    import inspect

    own = inspect.signature(SFTTrainer).parameters
    return tuple(
        name
        for name in inspect.signature(trl.SFTTrainer.__init__).parameters
        if name != "self" and name not in own
    )


def settle_config(args: Any, moved: Mapping[str, Any], model: Any) -> Any:
    """Make the trainer's config of what was given as `args` and beside it.

    Args:
        args: trl's SFTConfig, transformers' TrainingArguments, or None.
        moved: Arguments that were given to the trainer itself.
        model: The model; `max_seq_length` of `from_pretrained` is its longest text.

    Returns:
        A config of its own.

    Raises:
        InputError: It is something else.
    """
    from transformers import TrainingArguments

    found = {
        k: v for k, v in moved.items() if v is not None or k in ("max_length", "max_seq_length")
    }
    if "max_seq_length" in found:
        found.setdefault("max_length", found.pop("max_seq_length"))
    length = getattr(model, "max_seq_length", None)
    if isinstance(args, trl.SFTConfig):
        config = copy.copy(args)
        for name, value in {**found, **_off(args)}.items():
            setattr(config, name, value)
        return config
    if found.get("padding_free") and not found.get("packing"):
        found.setdefault("max_length", None)  # trl does not cut rows that it does not pad
    elif length is not None:
        found.setdefault("max_length", length)
    if args is None:
        name = model if isinstance(model, str) else str(getattr(model, "name_or_path", "model"))
        return SFTConfig(f"{name.rstrip('/').split('/')[-1]}-SFT", **found)
    if not isinstance(args, TrainingArguments):
        raise InputError(
            "SFTTrainer: args must be SFTConfig or TrainingArguments", type(args).__name__
        )
    # As trl does it: `to_dict` hides tokens.
    settings = {**args.to_dict(), "hub_token": args.hub_token, **found}
    known = {field.name for field in fields(trl.SFTConfig) if field.init}
    settings = {name: value for name, value in settings.items() if name in known}
    return trl.SFTConfig(**without_mixed_precision("SFTTrainer", settings))


def _off(args: Any) -> dict[str, bool]:
    """Return the mixed precision that an SFTConfig has and this machine does not."""
    now = {name: getattr(args, name) for name in ("fp16", "bf16", "use_cpu")}
    after = without_mixed_precision("SFTTrainer", now)
    return {name: after[name] for name in ("fp16", "bf16") if after[name] != now[name]}


def _attach(model: Any, config: Any) -> None:
    """Put the engine into a model that has none, and let policies do gradient checkpointing."""
    said = "_whet_source" in vars(swap.base_of(model))
    report = swap.report_of(model) or put_engine(model)
    if not config.gradient_checkpointing or report.layers_fused < report.layers_total:
        return
    if not said:
        swap.set_policies(model, (LEAST,) * report.layers_total)
        logger.info("gradient_checkpointing: the engine computes qkv and gate_up again by itself")
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        if hasattr(config, name):
            setattr(config, name, False)
        if hasattr(config, f"{name}_kwargs"):
            setattr(config, f"{name}_kwargs", None)


def _float32_parameters(model: Any) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Return the trained parameters in float32, each with its values."""
    import torch

    return [
        (parameter, parameter.data)
        for parameter in model.parameters()
        if parameter.requires_grad and parameter.dtype is torch.float32
    ]


def _keep_adapters_in_float32(
    model: Any, exact: list[tuple[torch.nn.Parameter, torch.Tensor]]
) -> None:
    """Undo that trl 1.16 rounds the adapters of a quantised model to bfloat16, values and all.

    An update of 1e-5 of a weight is lost in bfloat16, whose steps are 4e-3 of it; the engine multiplies
    by float32 adapters without rounding them, and the scaler of fp16 refuses bfloat16 gradients.

    Args:
        model: What trl has made of the model.
        exact: `_float32_parameters` before that; adapters that trl made itself are widened as they are.
    """
    import torch

    for parameter, values in exact:
        if parameter.dtype is not torch.float32:
            parameter.data = values.to(parameter.device)
    if not is_quantised(model):
        return
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype is torch.bfloat16:
            parameter.data = parameter.data.float()


def one_by_one(function: Callable[..., Any], rows: Any) -> Callable[[Mapping[str, Any]], Any]:
    """Return a function that makes the text of one row, as trl calls it today.

    Args:
        function: It takes a row and returns a text; or, as trl and the tutorials had it, a dict of lists
            and returns a list of texts.
        rows: The dataset it will be called on.
    """
    first = dict(next(iter(rows)))
    try:
        found = function({name: [value] for name, value in first.items()})
    except Exception:  # a function for one row may do anything to lists
        found = None
    if isinstance(found, dict):
        found = found.get("text")
    if not (isinstance(found, list | tuple) and len(found) == 1 and isinstance(found[0], str)):
        return function

    def one(row: Mapping[str, Any]) -> Any:
        made = function({name: [value] for name, value in row.items()})
        return (made["text"] if isinstance(made, dict) else made)[0]

    return one
