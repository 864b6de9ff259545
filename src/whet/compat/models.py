"""`FastLanguageModel`, as scripts written for Unsloth call it.

What comes back are a transformers model and tokenizer (or peft's model around it) with whet's engine
in that one instance; nothing of a foreign class or module is changed, and imports may come in any
order. The names and arguments are Unsloth's, from its public documentation; what they do is whet's
own code. docs/compat.md says what each argument does here.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from whet.compat.arguments import sort_out
from whet.compat.engine import (
    checkpoint,
    is_checkpointing,
    policies_of,
    put_engine,
    seeded,
    set_aside,
    set_checkpointing,
)
from whet.compat.export import Source, bind, is_quantised, source_of
from whet.compat.load import Wish, load_both
from whet.engine.ready import decode_for_generate
from whet.engine.swap import base_of, is_attached, report_of
from whet.errors import InputError
from whet.model import CausalLM, Tokenizer
from whet.model.lora import add_adapter, decoder_layers
from whet.sections import LoraSection, ModelSection

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class FastLanguageModel:
    """Loads, adapts and switches models; all methods are static."""

    @staticmethod
    def from_pretrained(
        model_name: str = "smollm2-135m",
        max_seq_length: int | None = None,
        dtype: torch.dtype | str | None = None,
        load_in_4bit: bool = True,
        load_in_8bit: bool = False,
        load_in_16bit: bool = False,
        full_finetuning: bool = False,
        token: str | None = None,
        device_map: Any = "sequential",
        rope_scaling: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
        use_gradient_checkpointing: bool | str = "unsloth",
        revision: str | None = None,
        random_state: int = 3407,
        *,
        tokenizer_name: str | None = None,
        attn_implementation: str | None = None,
        local_files_only: bool = False,
        cache_dir: str | None = None,
        **kwargs: Any,
    ) -> tuple[CausalLM, Tokenizer]:
        """Load a model with the engine in it, and its tokenizer.

        Args:
            model_name: A Hub id, a folder, a `.gguf` file, `smollm2-135m`, a folder with an adapter, or
                a run of `whet train`.
            max_seq_length: Longest text in tokens; None is the model's own limit, at most 2048. More
                than the model's own scales its rotary embedding.
            dtype: Type of the weights, or of the products with 4-bit weights; None takes what the device
                computes fastest, and float32 where the weights themselves are trained.
            load_in_4bit: Keep the weights in NF4 with double quantisation.
            load_in_8bit: Keep them in 8 bit (bitsandbytes' LLM.int8) instead.
            load_in_16bit: Keep them in 16 bit instead.
            full_finetuning: Train the weights themselves; none of the three above then.
            token: Of the Hub.
            device_map: "sequential", "auto" and None put the model on whet's device; anything else goes
                to transformers.
            rope_scaling: The rotary embedding's parameters, as in a model's config.
            trust_remote_code: Run Python code that comes with the model.
            use_gradient_checkpointing: What a full fine-tune keeps until the backward pass: all (False),
                what is dear to compute again (True), or also that in host memory ("unsloth").
            revision: Branch, tag or commit of a Hub model.
            random_state: Seed of weights that are missing in the checkpoint.
            tokenizer_name: Where the tokenizer is, if not with the model.
            attn_implementation: As in transformers, for layers that keep their own code.
            local_files_only: Do not ask the Hub.
            cache_dir: Where transformers keeps what it downloads.
            **kwargs: Arguments that have nothing to do here are named in a warning.

        Returns:
            The model and its tokenizer.

        Raises:
            InputError: There is no such model, or an argument is wrong or unknown.
        """
        sort_out("FastLanguageModel.from_pretrained", kwargs, [f.name for f in fields(Wish)])
        policies_of(
            use_gradient_checkpointing, 0
        )  # a wrong value is told before anything is loaded
        more = {
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only or None,
        }
        wish = Wish(
            model_name, max_seq_length, dtype, load_in_4bit, load_in_8bit, load_in_16bit,
            full_finetuning, device_map, rope_scaling, trust_remote_code, revision, tokenizer_name,
            attn_implementation, {k: v for k, v in more.items() if v is not None},
        )  # fmt: skip
        with seeded(random_state):
            model, tokenizer, section, options = load_both(wish)
        source = Source(section, options, tokenizer, use_gradient_checkpointing)
        vars(base_of(model))["_whet_source"] = source
        put_engine(model, use_gradient_checkpointing)
        bind(model)
        return model, tokenizer

    @staticmethod
    def get_peft_model(
        model: CausalLM,
        r: int = 16,
        target_modules: str | Sequence[str] | None = None,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        layers_to_transform: int | Sequence[int] | None = None,
        layers_pattern: str | Sequence[str] | None = None,
        use_gradient_checkpointing: bool | str = "unsloth",
        random_state: int = 3407,
        max_seq_length: int | None = None,
        use_rslora: bool = False,
        modules_to_save: Sequence[str] | None = None,
        init_lora_weights: bool | str = True,
        loftq_config: Any = None,
        **kwargs: Any,
    ) -> CausalLM:
        """Put a LoRA adapter on a model.

        Args:
            model: What `from_pretrained` gave, or any transformers model.
            r: Rank of the update.
            target_modules: Names of linear modules, a pattern, or "all-linear"; None is all linear
                modules but the head, which for Llama's kin are the seven that tutorials list. The
                names embed_tokens and lm_head are taken as `modules_to_save`, as Unsloth takes them.
            lora_alpha: Scale of the update: it is multiplied by alpha / r.
            lora_dropout: Dropout in front of the adapter; above 0 adapters take peft's own path.
            bias: none, all or lora_only.
            layers_to_transform: Numbers of the layers that get an adapter; None is all.
            layers_pattern: Name of the list of layers, where peft does not know it.
            use_gradient_checkpointing: What is kept until the backward pass: all (False), what is dear
                to compute again (True), or also that in host memory ("unsloth"; on a CPU like True).
            random_state: Seed of the adapter's start; nothing else is drawn from it.
            max_seq_length: Another longest text than `from_pretrained` was told.
            use_rslora: Scale by alpha / sqrt(r).
            modules_to_save: Modules trained in full beside the adapter.
            init_lora_weights: True, False, gaussian, loftq, pissa, or another of peft's.
            loftq_config: Of `init_lora_weights="loftq"`; whet takes one step at 4 bit.
            **kwargs: More arguments of peft's LoraConfig; arguments that have nothing to do here are
                named in a warning.

        Returns:
            A peft model around the model, with the engine in it.

        Raises:
            InputError: An argument is wrong or unknown, or the model has an adapter.
        """
        from peft import LoraConfig

        if hasattr(model, "peft_config"):
            raise InputError(
                "the model has an adapter already", fix="go on training it, or load the model anew"
            )
        policies_of(use_gradient_checkpointing, 0)
        known = {field.name for field in fields(LoraConfig) if field.init}
        more = {name: kwargs.pop(name) for name in list(kwargs) if name in known}
        sort_out("FastLanguageModel.get_peft_model", kwargs, {*known, "random_state"})
        source = source_of(model)
        if layers_to_transform is not None:
            more.update(layers_to_transform=layers_to_transform, layers_pattern=layers_pattern)
            target_modules = target_modules or linear_names(model)
        if isinstance(target_modules, str) and target_modules != "all-linear":
            more["target_modules"], target_modules = target_modules, None  # a pattern
        if not isinstance(target_modules, str):
            target_modules, tables = _parted(target_modules or ["all-linear"])
            modules_to_save = list(dict.fromkeys([*(modules_to_save or []), *tables]))
        init, extra = _init(init_lora_weights, loftq_config, model, source.section)
        lora = _lora_section(
            rank=r, alpha=lora_alpha, dropout=lora_dropout, bias=bias, rslora=use_rslora,
            targets=target_modules,
            dora=more.pop("use_dora", False), modules_to_save=list(modules_to_save or []), init=init,
        )  # fmt: skip
        with seeded(random_state):
            adapted = add_adapter(model, lora, source.section, {**more, **extra})
        if max_seq_length is not None and getattr(model, "max_seq_length", None) is None:
            model.max_seq_length = max_seq_length
        source.checkpointing = use_gradient_checkpointing
        put_engine(adapted, use_gradient_checkpointing)
        bind(adapted)
        return adapted

    @staticmethod
    def for_inference(model: CausalLM, **kwargs: Any) -> CausalLM:
        """Make a model ready to generate: eval mode, with a cache, new tokens from the engine.

        `model.generate` stays transformers' own, with all it can do; what it calls for each new token is
        whet's, with adapters merged and 4-bit weights unpacked into a copy, if that is proven to answer
        as the model does. Else transformers' code runs, and a warning says why. `for_training` frees
        the copy.

        Args:
            model: The model.
            **kwargs: Arguments that have nothing to do here are named in a warning.

        Returns:
            The same model. Its tokenizer pads on the left, so that several prompts can go in at once.
        """
        sort_out("FastLanguageModel.for_inference", kwargs, ("model",))
        base, source = base_of(model), source_of(model)
        source.was_checkpointing = source.was_checkpointing or is_checkpointing(base)
        set_checkpointing(base, False)
        set_aside(model, True)
        if source.tokenizer is not None:
            source.tokenizer.padding_side = "left"
        model.eval()
        if is_attached(model):
            reason = decode_for_generate(model, True)
            if reason:
                logger.warning("new tokens come from transformers' own code: %s", reason)
        return model

    @staticmethod
    def for_training(
        model: CausalLM, use_gradient_checkpointing: bool | str | None = None, **kwargs: Any
    ) -> CausalLM:
        """Make a model ready to train again: what `for_inference` did is undone.

        Args:
            model: The model.
            use_gradient_checkpointing: As in `get_peft_model`; None leaves what it was.
            **kwargs: Arguments that have nothing to do here are named in a warning.

        Returns:
            The same model.
        """
        sort_out("FastLanguageModel.for_training", kwargs, ("use_gradient_checkpointing",))
        source = source_of(model)
        set_aside(model, False)
        if is_attached(model):
            decode_for_generate(model, False)
        if use_gradient_checkpointing is not None:
            source.checkpointing = use_gradient_checkpointing
            checkpoint(model, report_of(model), use_gradient_checkpointing)
        elif source.was_checkpointing:
            set_checkpointing(base_of(model), True)
        source.was_checkpointing = False
        if source.tokenizer is not None:
            source.tokenizer.padding_side = "right"
        return model.train()


class FastModel(FastLanguageModel):
    """The same under the name that newer scripts use."""


def is_bfloat16_supported() -> bool:
    """Tell whether `bf16=True` may be given to TrainingArguments: a CUDA device that computes it.

    On a CPU it is False even where the CPU has bfloat16 instructions: the model's dtype uses those.
    """
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


is_bf16_supported = is_bfloat16_supported


def linear_names(model: CausalLM) -> list[str]:
    """Return the names of the linear modules inside the decoder layers."""
    kinds = ("Linear", "Conv1D", "Linear4bit", "Linear8bitLt")
    return sorted({
        path.rsplit(".", 1)[-1]
        for layer in decoder_layers(model)
        for path, module in layer.named_modules()
        if type(module).__name__ in kinds
    })  # fmt: skip


def _init(
    wanted: Any, loftq: Any, model: CausalLM, section: ModelSection
) -> tuple[str, dict[str, Any]]:
    """Return whet's name of an adapter's start, and peft's arguments where it is one of peft's own."""
    if wanted == "loftq":
        bits = dict(loftq or {}) if isinstance(loftq, dict | None) else vars(loftq)
        if int(bits.get("loftq_bits", 4)) != 4:
            raise InputError("loftq_config has bits that whet does not know", bits, "use 4")
        if not section.load_in_4bit or not is_quantised(model):
            raise InputError(
                "init_lora_weights 'loftq' corrects 4-bit weights", fix="set load_in_4bit=True"
            )
        return "loftq", {}
    if str(wanted).startswith("pissa") and is_quantised(model):
        raise InputError(
            "init_lora_weights 'pissa' takes the weights apart, which quantised weights do not allow",
            fix="use loftq, or load_in_4bit=False",
        )
    if wanted is True or wanted == "default":
        return "default", {}
    return (
        (wanted, {})
        if wanted in ("gaussian", "pissa")
        else ("default", {"init_lora_weights": wanted})
    )


def _parted(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part the names of modules that get an adapter from those of tables, which are trained in full."""
    tables = [name for name in names if name in ("embed_tokens", "lm_head")]
    if tables and len(tables) == len(names):
        raise InputError(
            "target_modules names no module for an adapter", ", ".join(names),
            "name linear modules too, such as q_proj; or train all with full_finetuning=True",
        )  # fmt: skip
    if tables:
        logger.info("%s: trained in full, beside the adapter", " and ".join(tables))
    return [name for name in names if name not in tables], tables


def _lora_section(**values: Any) -> LoraSection:
    """Check the adapter's numbers; all mistakes are told at once."""
    from pydantic import ValidationError

    names = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "rslora": "use_rslora"}
    names |= {"targets": "target_modules", "dora": "use_dora"}
    try:
        return LoraSection(**values)
    except ValidationError as error:
        raise InputError.listing(
            "get_peft_model:",
            (
                f"{names.get(str(e['loc'][0]), e['loc'][0])}: {e['msg']}; got {e['input']!r}"
                for e in error.errors()
            ),
        ) from error
