"""The model as it will be trained, in shapes alone: every tensor, and no memory for one.

Built on the meta device from the model's config, with transformers, bitsandbytes and peft as a run builds
it, so that a plan sees the modules that the run will see. To be run, its tensors become fake ones of the
CPU (torch's FakeTensorMode): unlike meta tensors they also go through autocast and bitsandbytes.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from whet.config import Config
from whet.engine.layer import BLOCK_TOKENS
from whet.engine.model import decoder_of, packed_attention
from whet.engine.parity import LENGTHS, Seen, SeenLayer
from whet.engine.report import SwapReport
from whet.engine.swap import EngineSettings, attach, base_of, decoder_layers, register_attention
from whet.engine.unpad import from_lengths
from whet.model.load import load_model_config
from whet.model.lora import prepare_parameters
from whet.plan.count import quantisation_tensors

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, eq=False)
class ShapedModel:
    """A model of fake tensors with the engine in it.

    Args:
        model: The model, in a peft model where there is an adapter.
        mode: The mode its tensors belong to.
        report: What became of each part.
        halved: It is bfloat16 where the real one is float32: torch's grouped product of experts has
            shapes for bfloat16 only.
        traced: Whether passes run on it; else what they save is guessed.
    """

    model: Any
    mode: FakeTensorMode
    report: SwapReport
    halved: bool = False
    traced: bool = True

    @property
    def packs(self) -> bool:
        """Whether packed documents can be handed to it."""
        return any(part.part == "unpadding" and part.fused for part in self.report.parts)


def meta_model(config: Config, dtype: torch.dtype) -> Any:
    """Build the model that a config describes, adapted and frozen, on the meta device.

    Args:
        config: A checked config.
        dtype: Type of the weights, or of the products with 4-bit weights.

    Raises:
        InputError: There is no such model, or an adapter's target is not in it.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            load_model_config(config.model),
            dtype=dtype,
            trust_remote_code=config.model.trust_remote_code,
        )
        if config.model.load_in_4bit:
            quantise_shapes_(model, dtype)
        # LoftQ and PiSSA start from the weights' values; their shapes are those of the plain start.
        plain = config.model_copy(
            update={"lora": config.lora.model_copy(update={"init": "default"})}
        )
        return prepare_parameters(model, plain)


def shaped(
    model: Any, device: str = "cpu", engine: bool = True, block_tokens: int | None = None
) -> ShapedModel:
    """Make a meta model one that can be run on shapes, with the engine in it as it will be.

    Args:
        model: A model on the meta device, which is changed.
        device: Where the real one will run, `cpu` or `cuda`.
        engine: Whether the engine will be in the real one.
        block_tokens: As in EngineSettings.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    base, halved = base_of(model), False
    settings = EngineSettings(check="off", block_tokens=block_tokens or BLOCK_TOKENS[device])
    fake_(model, mode)
    seen = _observe(base, mode) if engine else None
    if engine and seen is None and base.dtype is torch.float32:
        fake_(model, mode, torch.bfloat16)
        seen, halved = _observe(base, mode), True
    if not engine:
        return ShapedModel(model, mode, SwapReport([]), traced=False)
    unseen = "its layers do not run on shapes"
    return ShapedModel(
        model, mode, attach(model, settings, seen or unseen), halved, seen is not None
    )


def fake_(model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None = None) -> None:
    """Make every tensor of a meta model a fake one of the CPU.

    Args:
        model: Its parameters and buffers are replaced; shared ones stay shared.
        mode: The mode they will belong to.
        dtype: Also make float32 tensors this type.
    """
    made: dict[int, Any] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, FakeTensor):
            return FakeTensor(mode, tensor.detach().to("meta"), CPU)
        with mode:
            return tensor.to(dtype) if dtype and tensor.dtype is torch.float32 else tensor

    for module in model.modules():
        if dtype and type(module).__name__ == "Linear4bit":
            module.compute_dtype = dtype  # type: ignore[assignment]
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                made[id(parameter)] = new = nn.Parameter(
                    fake(parameter.data), requires_grad=parameter.requires_grad
                )
                vars(new).update(vars(parameter))  # what bitsandbytes keeps on a 4-bit weight
                for holder, key, scales in quantisation_tensors(new):
                    if not isinstance(scales, FakeTensor):
                        setattr(holder, key, fake(scales))
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)


def _observe(base: Any, mode: FakeTensorMode) -> Seen | None:
    """Run a fake model's own layers once; None when they do not run on shapes alone.

    Under the engine's attention, which needs no mask: making one looks at values.
    """
    register_attention()
    decoder = decoder_of(base)
    blocks = decoder_layers(decoder)
    # DeepSeek's first layers are dense, the rest have experts, all of one class.
    kinds = [tuple(type(module) for module in block.modules()) for block in blocks]
    tuples: dict[Any, bool] = {}

    def note(block: nn.Module, args: Any, output: Any) -> None:
        tuples[tuple(type(module) for module in block.modules())] = isinstance(output, tuple)

    handles = [block.register_forward_hook(note) for block in blocks]
    # What cannot run on shapes is logged by torch with a page of traceback, and handled here.
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        # The first layers, until every kind was there.
        shown = max((kinds.index(kind) for kind in kinds), default=0) + 1
        with mode, torch.no_grad(), first_layers(decoder, shown), packed_attention(decoder):
            ids = torch.zeros((1, sum(LENGTHS)), dtype=torch.long)
            packed = from_lengths(list(LENGTHS))
            hidden = decoder(input_ids=ids, use_cache=False, whet_packed=packed).last_hidden_state
    except (TypeError, ValueError, RuntimeError, NotImplementedError):
        return None
    finally:
        log.setLevel(level)
        for handle in handles:
            handle.remove()
    if set(kinds) != set(tuples):
        return None
    layers = [SeenLayer(None, tuples[kind]) for kind in kinds]
    return Seen(ids, hidden, hidden, layers)


@contextlib.contextmanager
def first_layers(decoder: nn.Module, num: int) -> Iterator[list[nn.Module]]:
    """Let a decoder have its first layers only, in the body.

    Args:
        decoder: A decoder with a list of layers.
        num: How many it keeps.
    """
    everything = decoder_layers(decoder)
    holder = next(
        m for m in decoder.modules() if isinstance(m, nn.ModuleList) and list(m) == everything
    )
    modules = holder._modules
    holder._modules = dict(list(modules.items())[:num])
    try:
        yield everything[:num]
    finally:
        holder._modules = modules


def quantise_shapes_(model: Any, dtype: torch.dtype) -> None:
    """Put bitsandbytes' NF4 layers into a meta model, where transformers puts them when it loads.

    Args:
        model: A transformers model on the meta device.
        dtype: Type of the products.
    """
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn.modules import Params4bit
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    replace_with_bnb_linear(model, get_keys_to_not_convert(model), settings)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for module in model.modules():
        if type(module).__name__ != "Linear4bit":
            continue
        shape = torch.Size((module.out_features, module.in_features))
        num_blocks = -(-shape.numel() // 64)
        double = QuantState(
            absmax=empty(-(-num_blocks // 256)), shape=torch.Size((num_blocks,)), code=empty(256),
            blocksize=256, dtype=torch.float32,
        )  # fmt: skip
        state = QuantState(
            absmax=empty(num_blocks, dtype=torch.uint8), shape=shape, code=empty(16), blocksize=64,
            quant_type="nf4", dtype=dtype, offset=empty(), state2=double,
        )  # fmt: skip
        packed = empty(-(-shape.numel() // 2), 1, dtype=torch.uint8)
        options: dict[str, Any] = {"quant_state": state, "quant_type": "nf4", "bnb_quantized": True}
        module.weight = Params4bit(packed, requires_grad=False, **options)
        module.compute_type_is_set = True
        module.support_avx512bf16_for_cpu = False
    model.is_loaded_in_4bit = True
    model.requires_grad_(False)
