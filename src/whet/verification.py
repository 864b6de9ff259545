"""`whet verify RUN|MODEL`: load what is named, as it would be trained, and prove the engine on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from whet.data.prepare import prepare
from whet.engine.verify import Verification, verify
from whet.model.load import engine_settings, max_length
from whet.model.lora import prepare_parameters

if TYPE_CHECKING:
    from whet.trained import Loaded

# What a model is compared on when no file is named: prose, code and figures, of different lengths.
TEXTS = (
    "A river does not hurry, and yet by evening it has carried every leaf of the morning to the sea.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "In 1969 two people walked on the Moon for 2 hours and 31 minutes.",
    "Yes.",
)
# Rows of a file, and tokens of a row, that are compared; the truth is computed in double precision.
NUM_ROWS, NUM_TOKENS = 4, 128


def verify_loaded(loaded: Loaded, data: str | None = None) -> Verification:
    """Compare the engine with the original code on a loaded model.

    Args:
        loaded: A run's tuned model, or a plain one, which gets the adapter its config describes.
        data: A file whose rows are used; None takes a few sentences.

    Raises:
        InputError: The file cannot be read.
        WhetError: `engine.strict` is set, and not everything is fused.
    """
    config, model = loaded.config, loaded.model
    if loaded.run is None:
        model = prepare_parameters(model, config)
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name or config.train.parameters != "lora")
    return verify(model, _rows(loaded, data), engine_settings(config))


def _rows(loaded: Loaded, data: str | None) -> list[list[int]]:
    if data is None:
        return [list(loaded.tokenizer(text)["input_ids"]) for text in TEXTS]
    section = loaded.config.data.model_copy(
        update={"train": data, "heldout": None, "heldout_fraction": 0.0, "max_rows": NUM_ROWS}
    )
    prepared = prepare(section, loaded.tokenizer, max_length(loaded.config.model), "as trained")
    return [tokens.input_ids[:NUM_TOKENS] for tokens in prepared.train[:NUM_ROWS]]
