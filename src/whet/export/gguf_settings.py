"""What llama.cpp is told of a model besides its tensors: sizes, rope, windows, experts.

`describe` reads a transformers config into the metadata of llama.cpp's loaders. A model that llama.cpp
would compute otherwise than transformers does is refused with the reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from whet.errors import InputError

# transformers' model type -> llama.cpp's architecture.
ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe", "qwen3": "qwen3", "qwen3_moe": "qwen3moe", "gemma": "gemma",
    "gemma2": "gemma2", "gemma3_text": "gemma3", "phi3": "phi3", "gpt2": "gpt2",
    "deepseek_v3": "deepseek2",
}  # fmt: skip
# llama.cpp's CPU code takes GELU from a table in half precision.
HALF_PRECISION_ACTIVATIONS = ("gemma", "gemma2", "gemma3_text", "gpt2")


@dataclass
class Settings:
    """A file's metadata.

    Args:
        values: By key, without the architecture's prefix.
        factors: Tensors that come from the config: what each rotary frequency is divided by.
        notes: What a user of the file should know.
    """

    values: dict[str, Any] = field(default_factory=dict)
    factors: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def describe(config: Any) -> Settings:
    """Read a model's config into llama.cpp's metadata.

    Args:
        config: A transformers config of a family in ARCHITECTURES.

    Raises:
        InputError: llama.cpp computes such a model otherwise.
    """
    settings = Settings()
    _general(settings, config)
    _rope(settings, config)
    return settings


def kv_heads(config: Any) -> int:
    """Return how many key/value heads a model has."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _head_dim(config: Any) -> int:
    own = getattr(config, "head_dim", None)
    return own or config.hidden_size // config.num_attention_heads


def _general(settings: Settings, config: Any) -> None:
    """Set the metadata that every family has, and each family's own."""
    kind, values = config.model_type, settings.values
    values.update({
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        "attention.head_count": config.num_attention_heads,
    })  # fmt: skip
    if kind == "gpt2":
        values["feed_forward_length"] = config.n_inner or 4 * config.hidden_size
        values["attention.layer_norm_epsilon"] = float(config.layer_norm_epsilon)
        _require_plain_gpt2(config)
        return
    values["attention.layer_norm_rms_epsilon"] = float(config.rms_norm_eps)
    values["attention.head_count_kv"] = kv_heads(config)
    if kind != "deepseek_v3":
        values["attention.key_length"] = values["attention.value_length"] = _head_dim(config)
    if kind in ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3"):
        _experts(settings, config)
    if kind == "deepseek_v3":
        _latent(settings, config)
    if kind in ("gemma2", "gemma3_text"):
        _gemma_settings(settings, config)
    elif (window := getattr(config, "sliding_window", None)) and (
        getattr(config, "use_sliding_window", True) and window < config.max_position_embeddings
    ):
        # These architectures have no sliding window in llama.cpp; up to its width there is none to see.
        values["context_length"] = window
        settings.notes.append(
            f"llama.cpp has no sliding window for {kind}: the file's context ends at the window's "
            f"{window} tokens, up to which both compute the same"
        )
    _require_activation(config)


def _require_plain_gpt2(config: Any) -> None:
    if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights:
        raise InputError(
            "llama.cpp has no GPT-2 with an attention scale of its own", fix="use --to merged"
        )
    if config.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
        raise InputError(
            "llama.cpp's GPT-2 has the activation gelu_new",
            config.activation_function,
            "use --to merged",
        )


def _require_activation(config: Any) -> None:
    """Refuse an activation that llama.cpp's architecture does not have; it is not a setting there."""
    if config.model_type.startswith("gemma"):
        name = getattr(config, "hidden_activation", None) or config.hidden_act
        known = ("gelu_pytorch_tanh", "gelu_new", "gelu")
    else:
        name, known = config.hidden_act, ("silu", "swish")
    if name not in known:
        raise InputError(
            f"llama.cpp's {ARCHITECTURES[config.model_type]} has the activation {known[0]}", name,
            "use --to merged",
        )  # fmt: skip


def _experts(settings: Settings, config: Any) -> None:
    kind, values = config.model_type, settings.values
    count = next(
        getattr(config, name) for name in ("n_routed_experts", "num_local_experts", "num_experts")
        if getattr(config, name, None)
    )  # fmt: skip
    values["expert_count"] = count
    values["expert_used_count"] = config.num_experts_per_tok
    if kind == "mixtral":
        return
    values["expert_feed_forward_length"] = config.moe_intermediate_size
    if kind == "deepseek_v3":
        return
    # qwen3moe divides the chosen experts' weights by their sum, qwen2moe never does; no setting says so.
    if bool(config.norm_topk_prob) != (kind == "qwen3_moe"):
        raise InputError(
            f"llama.cpp {'always' if kind == 'qwen3_moe' else 'never'} normalises the chosen experts' "
            f"weights of {kind}", f"norm_topk_prob: {config.norm_topk_prob}", "use --to merged",
        )  # fmt: skip
    if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
        raise InputError(
            f"llama.cpp's {ARCHITECTURES[kind]} has experts in every layer", fix="use --to merged"
        )
    if kind == "qwen2_moe":
        values["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size


def _latent(settings: Settings, config: Any) -> None:
    """DeepSeek's attention over a latent, which llama.cpp runs with one key/value head."""
    values = settings.values
    values["attention.head_count_kv"] = 1
    if not config.q_lora_rank:
        raise InputError("llama.cpp's deepseek2 needs a q_lora_rank", fix="use --to merged")
    values["attention.q_lora_rank"] = config.q_lora_rank
    values["attention.kv_lora_rank"] = config.kv_lora_rank
    values["attention.key_length"] = config.kv_lora_rank + config.qk_rope_head_dim
    values["attention.value_length"] = config.kv_lora_rank
    values["attention.key_length_mla"] = config.qk_nope_head_dim + config.qk_rope_head_dim
    values["attention.value_length_mla"] = config.v_head_dim
    values["leading_dense_block_count"] = config.first_k_dense_replace
    values["expert_shared_count"] = config.n_shared_experts
    values["expert_group_count"] = config.n_group
    values["expert_group_used_count"] = config.topk_group
    values["expert_weights_scale"] = float(config.routed_scaling_factor)
    values["expert_weights_norm"] = bool(config.norm_topk_prob)
    values["expert_gating_func"] = 2  # sigmoid
    if not getattr(config, "rope_interleave", True):
        raise InputError("llama.cpp's deepseek2 rotates neighbours", fix="use --to merged")


def _gemma_settings(settings: Settings, config: Any) -> None:
    values = settings.values
    for key, name in (
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
    ):
        if getattr(config, name, None):
            values[key] = float(getattr(config, name))
    values["attention.sliding_window"] = config.sliding_window
    local = [kind == "sliding_attention" for kind in config.layer_types]
    period = next(
        (
            p
            for p in range(1, len(local) + 2)
            if local == [n % p < p - 1 for n in range(len(local))]
        ),
        None,
    )
    if period is None:
        raise InputError(
            "llama.cpp knows Gemma's windows as 'every n-th layer has none'",
            str(config.layer_types), "use --to merged",
        )  # fmt: skip
    values["attention.sliding_window_pattern"] = period


def _rope(settings: Settings, config: Any) -> None:
    """Set the rotary metadata, and the factors that stand in a tensor."""
    if config.model_type == "gpt2":
        return
    parameters = dict(config.rope_parameters or {})
    values = settings.values
    if "full_attention" in parameters:  # Gemma 3: one for local layers, one for the others
        local = parameters.get("sliding_attention") or {}
        if local.get("rope_type", "default") != "default":
            raise InputError(
                "llama.cpp scales no rope of Gemma's local layers", fix="use --to merged"
            )
        values["rope.freq_base_swa"] = float(local.get("rope_theta", 10000.0))
        parameters = dict(parameters["full_attention"])
    values["rope.freq_base"] = float(parameters.get("rope_theta", 10000.0))
    width = getattr(config, "qk_rope_head_dim", None) or _head_dim(config)
    if config.model_type != "deepseek_v3":
        width = int(width * float(parameters.get("partial_rotary_factor") or 1))
    values["rope.dimension_count"] = width
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return
    if kind == "linear":
        values["rope.scaling.type"] = "linear"
        values["rope.scaling.factor"] = float(parameters["factor"])
    elif kind == "yarn":
        _yarn(settings, config, parameters)
    elif kind == "llama3":
        base = values["rope.freq_base"]
        settings.factors["rope_freqs.weight"] = _llama3_factors(base, width, parameters)
    elif kind == "longrope":
        _longrope(settings, config, parameters)
    else:
        raise InputError(f"llama.cpp has no rope of the kind '{kind}'", fix="use --to merged")


def _yarn(settings: Settings, config: Any, parameters: dict[str, Any]) -> None:
    values, factor = settings.values, float(parameters["factor"])
    original = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
    values["rope.scaling.type"] = "yarn"
    values["rope.scaling.factor"] = factor
    values["rope.scaling.original_context_length"] = original
    if config.model_type == "deepseek_v3" and parameters.get("mscale_all_dim"):
        values["rope.scaling.yarn_log_multiplier"] = 0.1 * float(parameters["mscale_all_dim"])
    for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        if float(parameters.get(key) or default) != default:
            values[f"rope.scaling.yarn_{key}"] = float(parameters[key])
    usual = 0.1 * math.log(factor) + 1
    if (own := parameters.get("attention_factor")) and not math.isclose(own, usual, rel_tol=1e-6):
        values["rope.scaling.attn_factor"] = float(own) / usual


def _longrope(settings: Settings, config: Any, parameters: dict[str, Any]) -> None:
    original = (
        parameters.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
    )
    scale = config.max_position_embeddings / original
    own = parameters.get("attention_factor")
    usual = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    settings.values["rope.scaling.attn_factor"] = float(own or usual)
    settings.values["rope.scaling.original_context_length"] = original
    for which in ("long", "short"):
        settings.factors[f"rope_factors_{which}.weight"] = parameters[f"{which}_factor"]


def _llama3_factors(base: float, width: int, parameters: dict[str, Any]) -> list[float]:
    """Return what each frequency is divided by (Llama 3.1's rule, as transformers computes it).

    Long waves are stretched by the whole factor, short ones not at all, those between by degrees.
    """
    factor = float(parameters["factor"])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    original = parameters["original_max_position_embeddings"]
    found = []
    for pair in range(0, width, 2):
        wave = 2 * math.pi * base ** (pair / width)
        if wave < original / high:
            found.append(1.0)
        elif wave > original / low:
            found.append(factor)
        else:
            smooth = (original / wave - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return found
