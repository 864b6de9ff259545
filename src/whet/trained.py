"""Load what a run has trained, or any plain model, ready to be used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from whet.config import Config
from whet.config_file import load_config
from whet.data.template import set_chat_template
from whet.model import CausalLM, Tokenizer
from whet.model.load import choose_dtype, load_model, load_tokenizer
from whet.runs import RunFolder
from whet.sections import ModelSection

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model with its tokenizer, and the run it came from if it came from one.

    Args:
        model: In eval mode, on the device.
        tokenizer: With the chat template it was trained with.
        config: The run's config, or the defaults with the model's name.
        run: The run's folder, or None for a plain model.
    """

    model: CausalLM
    tokenizer: Tokenizer
    config: Config
    run: RunFolder | None

    @contextlib.contextmanager
    def base(self) -> Iterator[CausalLM]:
        """Give the body the model as it was before training."""
        # A trained bias stays in the base when the adapter is turned off.
        if hasattr(self.model, "disable_adapter") and self.config.lora.bias == "none":
            with self.model.disable_adapter():
                yield self.model
        elif self.run is None:
            yield self.model
        else:
            dtype = next(self.model.parameters()).dtype
            yield load_model(self.config.model, dtype, seed=self.config.train.seed).eval()


def load_trained(name: str, assignments: list[str] | None = None) -> Loaded:
    """Load a run's tuned model, or a model by name.

    Args:
        name: A run's folder, or anything `model.name` takes.
        assignments: Changes of the config, such as `eval.max_rows=10`.

    Raises:
        InputError: There is neither.
    """
    if not RunFolder.is_run(name):
        config = load_config(Config(model=ModelSection(name=name)), assignments or [])
        tokenizer = load_tokenizer(config.model)
        set_chat_template(tokenizer, config.model.chat_template)
        dtype, _ = choose_dtype(config.model.dtype, full=False)
        model = load_model(config.model, dtype, seed=config.train.seed)
        return Loaded(model.eval(), tokenizer, config, None)
    run = RunFolder.open(name)
    config = load_config(run.config, assignments) if assignments else run.config
    tokenizer = load_tokenizer(config.model, run.weights_dir)
    dtype, _ = choose_dtype(config.model.dtype, config.train.parameters != "lora")
    if run.weights_dir == run.model_dir:
        model = load_model(config.model, dtype, run.model_dir)
    else:
        model = load_adapted(config.model, dtype, run)
    return Loaded(model.eval(), tokenizer, config, run)


def load_adapted(base: ModelSection, dtype: torch.dtype, run: RunFolder) -> CausalLM:
    """Load a base model with a run's adapter on it.

    Args:
        base: The base model, which may differ from the run's in `load_in_4bit`.
        dtype: Type of the base's weights.
        run: A run with an adapter.
    """
    from peft import PeftModel

    return PeftModel.from_pretrained(load_model(base, dtype), str(run.adapter_dir))
