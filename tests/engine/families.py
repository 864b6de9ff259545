"""One tiny random model of each family, built offline, and what the engine is expected to do with it."""

import copy
from dataclasses import dataclass, field

import torch
from torch import nn

from whet.engine.parity import Comparison, judge

SMALL = {
    "vocab_size": 301,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A config of transformers, and the parts of its layers that keep their own code."""

    model_type: str
    settings: dict = field(default_factory=dict)
    kept: tuple[str, ...] = ()


FAMILIES = {
    "llama2": Family("llama"),
    "llama3": Family(
        "llama", {"rope_parameters": LLAMA3_ROPE, "attention_bias": True, "tie_word_embeddings": True}
    ),
    "smollm": Family("llama", {"tie_word_embeddings": True, "num_attention_heads": 3,
                               "num_key_value_heads": 1, "hidden_size": 192}),  # fmt: skip
    "mistral": Family("mistral", {"sliding_window": 6}),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3", {"head_dim": 32}),
    "gemma2": Family(
        "gemma2",
        {
            "head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": Family(
        "gemma3_text",
        {
            "head_dim": 16, "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi3": Family("phi3"),
    "phi4": Family("phi3", {"partial_rotary_factor": 0.5}),
    "gpt2": Family("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128,
                            "resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}),  # fmt: skip
    "mixtral": Family("mixtral", {"num_local_experts": 4}, ("mlp",)),
    "qwen3_moe": Family(
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
        ("mlp",),
    ),
    "deepseek_v3": Family(
        "deepseek_v3",
        {
            "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16, "v_head_dim": 12, "n_routed_experts": 4, "n_group": 2,
            "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
        },
        ("attention", "mlp"),
    ),
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float32, **more) -> nn.Module:
    """Make a family's model with random weights, every small parameter random too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    family = FAMILIES[name]
    size = {"vocab_size": 301} if family.model_type == "gpt2" else SMALL
    config = AutoConfig.for_model(family.model_type, **{**size, **family.settings, **more})
    # transformers 5.17's sdpa leaves Gemma 2's soft cap out, without a word.
    plain = {"attn_implementation": "eager"} if name == "gemma2" else {}
    model = AutoModelForCausalLM.from_config(config, **plain)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(3)  # weights of 0.02 would make every layer a small correction
    return model.to(dtype)


def adapted(model: nn.Module, rank: int = 4, **more) -> nn.Module:
    """Put a LoRA adapter with a random B on every linear layer."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": rank, "lora_alpha": 8, "target_modules": "all-linear", **more}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def in_nf4(model: nn.Module) -> nn.Module:
    """Quantise every linear layer but the head to NF4, as transformers does when it loads."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or module is head:
            continue
        made = Linear4bit(
            module.in_features, module.out_features, module.bias is not None,
            compute_dtype=module.weight.dtype, compress_statistics=True, quant_type="nf4",
        )  # fmt: skip
        made.weight = Params4bit(
            module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
        ).to("cpu")
        made.bias = module.bias
        made.support_avx512bf16_for_cpu = False
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, made)
    return model


def batch(side: str = "right", rows: int = 3, width: int = 17, vocab: int = 301) -> dict:
    """Make a padded batch with labels on real tokens only."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, vocab, (rows, width), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        cut = 4 * row + 1
        if side == "right":
            mask[row, width - cut :] = 0
        else:
            mask[row, :cut] = 0
    labels = ids.masked_fill(mask == 0, -100)
    first = mask.argmax(1)
    for row in range(rows):  # a prompt that is not learned; nothing predicts a first token
        labels[row, first[row] : first[row] + 3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def packed_batch(lengths=(5, 1, 11, 8), vocab: int = 301) -> dict:
    """Make one row of several documents, marked by position ids that restart."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, vocab, (1, sum(lengths)), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = ids.masked_fill(positions == 0, -100)
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def gradients(
    model: nn.Module, inputs: dict, **more
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss and every gradient of one training pass."""
    model.train()
    model.zero_grad()
    loss = model(**inputs, use_cache=False, **more).loss
    loss.backward()
    return loss.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def judge_norm(
    name: str, ours: torch.Tensor, original: torch.Tensor, truth: torch.Tensor
) -> Comparison:
    """Judge all entries of a tensor together, as sixteen bits need: single ones scatter."""
    truth = truth.double()
    size = truth.norm()
    return judge(name, *(size + (x.double() - truth).norm() for x in (ours, original)), size)


def in_float64(model: nn.Module) -> nn.Module:
    """Return a copy in float64, 4-bit weights dequantised, without the engine."""
    from whet.engine import swap
    from whet.engine.original import in_high_precision

    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    made = in_high_precision(copy.deepcopy(model), dtype)
    swap.detach(made)
    return made


def documents(inputs: dict) -> list[dict]:
    """Cut a batch into its documents, each one unpadded row with its positions."""
    ids, labels = inputs["input_ids"], inputs["labels"]
    width = ids.shape[1]
    positions = inputs.get("position_ids", torch.arange(width).expand(ids.shape))
    mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    found = []
    for row in range(len(ids)):
        places = mask[row].nonzero()[:, 0]
        here = positions[row, places]
        cuts = [0, *((here.diff() != 1).nonzero()[:, 0] + 1).tolist(), len(places)]
        for a, b in zip(cuts, cuts[1:], strict=False):
            take = places[a:b]
            part = {"input_ids": ids, "labels": labels, "position_ids": positions}
            found.append({key: value[row, take][None] for key, value in part.items()})
    return found


def true_gradients(model: nn.Module, inputs: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return loss and gradients of the original in float64, one unpadded document after the other."""
    exact = in_float64(model)
    count = int((inputs["labels"][:, 1:] != -100).sum())
    total, sums = torch.zeros((), dtype=torch.float64), {}
    for document in documents(inputs):
        if (document["labels"][:, 1:] != -100).any():
            loss, grads = gradients(exact, document, num_items_in_batch=count)
            total += loss
            sums = {name: grad + sums.get(name, 0) for name, grad in grads.items()}
    return total, sums
