"""The weights of a tuned model, one tensor at a time, so that no export needs the model in memory.

A checkpoint's tensors are read lazily from their files; peft's own layer merges an adapter into one
of them when its turn comes, in float32. The names are the checkpoint's own, so what reads the base
reads the export. What is not a plain matrix beside an adapter (experts that the library fuses while
it loads, a checkpoint that is itself in 4 bit) is refused here and merged whole by the caller.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whet.errors import InputError
from whet.model.load import load_model_config, resolve

if TYPE_CHECKING:
    import torch
    from torch import nn

    from whet.sections import ModelSection


class NotStreamable(Exception):
    """The model cannot be merged tensor by tensor; the message says why."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor that can be read.

    Args:
        shape: Its shape.
        dtype: Its type in the file; a merged one is float32 when read.
        file: The checkpoint's file it is in, or None for one of the adapter's own.
        key: Its name there, when it is another one's copy.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path | None
    key: str | None = None


@dataclass
class Weights:
    """A checkpoint's tensors, with an adapter merged in where there is one.

    Args:
        config: The model's transformers config.
        infos: What can be read, by the checkpoint's names, in its order.
        merges: By name, the tuner layer whose merged weight is read, or a tensor of the adapter's.
        rounded: Names of weights that are read as their 4-bit copies, dequantised.
        dtype: What 4-bit copies were made from and their products computed in.
    """

    config: Any
    infos: dict[str, TensorInfo]
    merges: dict[str, Any] = field(default_factory=dict)
    rounded: frozenset[str] = frozenset()
    dtype: torch.dtype | None = None

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor: as stored, or in float32 where an adapter is merged in.

        Args:
            name: A key of `infos`.
        """
        import torch

        tuner = self.merges.get(name)
        if isinstance(tuner, torch.Tensor):
            return tuner.detach()
        info = self.infos[name]
        assert info.file is not None
        value = _read(info.file, info.key or name)
        if name in self.rounded:
            assert self.dtype is not None
            value = nf4_rounded(value, self.dtype)
        return value if tuner is None else _merged(tuner, value)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Give every tensor in turn."""
        for name in self.infos:
            yield name, self.read(name)


def nf4_rounded(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a weight as a QLoRA run sees it: NF4 with double quantisation, and back.

    Args:
        weight: A linear layer's weight.
        dtype: The type the run loaded it in.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(
        weight.to(dtype).contiguous(), quant_type="nf4", compress_statistics=True
    )
    return dequantize_4bit(packed, state).float()


def open_weights(
    model: ModelSection,
    adapter: Path | None = None,
    folder: Path | None = None,
    dequantised: torch.dtype | None = None,
) -> Weights:
    """Open a model's weights for reading one by one.

    Args:
        model: The base model.
        adapter: Folder of a peft adapter to merge in.
        folder: A folder with the weights when they are not the base's (a full fine-tune).
        dequantised: Read the linear layers as their NF4 copies, made from this type.

    Raises:
        InputError: There is no such model.
        NotStreamable: The adapter cannot be merged one tensor at a time.
    """
    config = load_model_config(model if folder is None else model.model_copy(
        update={"name": str(folder), "revision": None}
    ))  # fmt: skip
    if getattr(config, "quantization_config", None) is not None:
        raise NotStreamable("the base was published in few bits")
    infos = checkpoint_tensors(folder or checkpoint_folder(model))
    weights = Weights(config, infos, dtype=dequantised)
    if adapter is None and dequantised is None:
        return weights
    skeleton = _skeleton(config, model.trust_remote_code)
    names = _checkpoint_names(skeleton, infos)
    if dequantised is not None:
        weights.rounded = frozenset(
            names[name] for name in _quantised_names(skeleton) if name in names
        )
    if adapter is not None:
        _plan_merges(weights, skeleton, adapter, names)
    return weights


def checkpoint_folder(model: ModelSection) -> Path:
    """Return the folder with a model's files; a Hub id is fetched unless it is in the cache.

    Raises:
        InputError: There is no such model.
    """
    source = resolve(model.name)
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.safetensors.index.json", "*.json"]
    try:
        return Path(snapshot_download(source, revision=model.revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise InputError(
            f"the weights of '{model.name}' could not be read: {str(error).splitlines()[0]}"
        ) from error


def checkpoint_tensors(folder: Path) -> dict[str, TensorInfo]:
    """List the tensors in a Hugging Face folder without reading them.

    Args:
        folder: With safetensors, in one file or several, or torch's own files.

    Raises:
        InputError: There are none.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = [folder / name for name in dict.fromkeys(of.values())]
    elif (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    else:
        files = sorted(folder.glob("pytorch_model*.bin"))
    found: dict[str, TensorInfo] = {}
    for file in files:
        found.update(_safetensors(file) if file.suffix == ".safetensors" else _torch_file(file))
    if not found:
        raise InputError(f"folder '{folder}' has no weights", fix="check model.name")
    return found


_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _safetensors(file: Path) -> dict[str, TensorInfo]:
    import torch
    from safetensors import safe_open

    found = {}
    with safe_open(file, framework="pt") as reader:
        for name in reader.keys():  # noqa: SIM118  (not a dict)
            part = reader.get_slice(name)
            kind = _TYPES.get(part.get_dtype())
            dtype = getattr(torch, kind) if kind else reader.get_tensor(name).dtype
            found[name] = TensorInfo(tuple(part.get_shape()), dtype, file)
    return found


def _torch_file(file: Path) -> dict[str, TensorInfo]:
    import torch

    state = torch.load(file, map_location="meta", weights_only=True, mmap=True)
    return {name: TensorInfo(tuple(t.shape), t.dtype, file) for name, t in state.items()}


def _read(file: Path, name: str) -> torch.Tensor:
    import torch
    from safetensors import safe_open

    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as reader:
            return reader.get_tensor(name)
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)[name].clone()


def _skeleton(config: Any, trust_remote_code: bool) -> nn.Module:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def _checkpoint_names(skeleton: Any, infos: dict[str, TensorInfo]) -> dict[str, str]:
    """Map the model's parameter names to the checkpoint's, where one is the other."""
    prefix = f"{skeleton.base_model_prefix}."
    found = {}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        for candidate in (name, name.removeprefix(prefix)):
            if candidate in infos and infos[candidate].shape == tuple(parameter.shape):
                found[name] = candidate
                break
    return found


def _quantised_names(skeleton: Any) -> list[str]:
    """Return the names of the weights that transformers loads in 4 bit."""
    from torch import nn
    from transformers.quantizers.base import get_keys_to_not_convert

    kept = get_keys_to_not_convert(skeleton) or []
    return [
        f"{path}.weight"
        for path, module in skeleton.named_modules()
        if type(module) is nn.Linear and not any(key in path for key in kept)
    ]


def _plan_merges(weights: Weights, skeleton: Any, adapter: Path, names: dict[str, str]) -> None:
    """Note for each tensor what of the adapter goes into it.

    The model and peft's layers stand on the meta device; only the adapter's own tensors are real.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    head, embedding = _tied_head(weights, skeleton, names)
    model = PeftModel.from_pretrained(
        skeleton, str(adapter), low_cpu_mem_usage=True, torch_device="cpu"
    )
    trained = _fill_adapter(model, adapter)
    base = model.get_base_model()
    for path, module in base.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            for name, value in module.modules_to_save[module.active_adapters[0]].named_parameters():
                _note(weights, names, f"{path}.{name}", value)
        elif isinstance(module, BaseTunerLayer):
            if not hasattr(module, "merge") or not hasattr(module.get_base_layer(), "weight"):
                raise NotStreamable(f"{path} holds an adapter that is not beside one matrix")
            _note(weights, names, f"{path}.weight", module)
    for path, value in trained.items():
        weights.merges[names[path]] = value
    if not head:
        return
    if weights.merges.keys() & {head, embedding}:
        weights.config.tie_word_embeddings = False
        weights.config.get_text_config().tie_word_embeddings = False
    else:
        del weights.infos[head]


def _fill_adapter(model: Any, adapter: Path) -> dict[str, torch.Tensor]:
    """Read an adapter's tensors into a peft model on the meta device; return its trained biases.

    peft puts an adapter where its base is, which here is nowhere.
    """
    import torch
    from peft import load_peft_weights, set_peft_model_state_dict
    from torch import nn

    state = load_peft_weights(str(adapter), device="cpu")
    biases = {}
    for name in [name for name in state if name.endswith(".bias")]:
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if "lora_" not in plain:
            biases[plain] = state[name]
    for path, parameter in list(model.named_parameters()):
        if ".default" in path:
            parent, _, name = path.rpartition(".")
            value = torch.empty_like(parameter, device="cpu")
            holder = model.get_submodule(parent)
            holder._parameters[name] = nn.Parameter(value, requires_grad=False)
    set_peft_model_state_dict(model, state)
    return biases


def _tied_head(weights: Weights, skeleton: Any, names: dict[str, str]) -> tuple[str, str]:
    """Give a head that is its model's embedding a name of its own, as the embedding's copy.

    An adapter on one of the two parts them: the other stays what it was.

    Returns:
        The head's and the embedding's name in the checkpoint; two empty ones when they are not tied.
    """
    tied = getattr(weights.config.get_text_config(), "tie_word_embeddings", False)
    parameters = {id(m): path for path, m in skeleton.named_modules()}
    path = parameters.get(id(skeleton.get_output_embeddings()))
    source = f"{parameters.get(id(skeleton.get_input_embeddings()))}.weight"
    if not tied or path is None or f"{path}.weight" in weights.infos or source not in names:
        return "", ""
    head = f"{path}.weight"
    weights.infos[head] = replace(weights.infos[names[source]], key=names[source])
    names[head] = head
    return head, names[source]


def _note(weights: Weights, names: dict[str, str], name: str, source: Any) -> None:
    if name not in names:
        raise NotStreamable(f"{name} is not one tensor of the checkpoint")
    weights.merges[names[name]] = source


def _merged(tuner: Any, value: torch.Tensor) -> torch.Tensor:
    """Return one weight with its adapter merged in by peft, in float32."""
    import torch
    from torch import nn

    layer = tuner.get_base_layer()
    before = layer.weight
    layer.weight = nn.Parameter(value.float(), requires_grad=False)
    try:
        with torch.no_grad():
            tuner.merge(safe_merge=True)
        merged = layer.weight.detach()
    finally:
        tuner.merged_adapters.clear()
        layer.weight = before
    return merged
