"""A model family that no library knows, once with an attention of its own and once with a backend."""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class UnheardConfig(PretrainedConfig):
    model_type = "unheard_of"

    def __init__(self, vocab_size=301, hidden_size=48, num_heads=4, num_hidden_layers=2, **more):
        self.vocab_size, self.hidden_size, self.num_heads = vocab_size, hidden_size, num_heads
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**{"tie_word_embeddings": False, **more})


class Mixer(nn.Module):
    """Attention under names of its own, all heads from one interleaved projection."""

    def __init__(self, config):
        super().__init__()
        self.config, width = config, config.hidden_size
        self.blend = nn.Linear(width, 3 * width)
        self.back = nn.Linear(width, width)
        self.scaling, self.is_causal = (width // config.num_heads) ** -0.5, True

    def forward(self, x, mask, **kwargs):
        heads = (*x.shape[:2], self.config.num_heads, 3, -1)
        q, k, v = self.blend(x).view(heads).permute(3, 0, 2, 1, 4)
        if self.config._supports_backend:
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
            out, _ = attend(self, q, k, v, mask, scaling=self.scaling, dropout=0.0, **kwargs)
        else:
            out = nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
        return self.back(out.reshape(x.shape))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.calm = nn.LayerNorm(config.hidden_size)
        self.mixer = Mixer(config)
        self.wide = nn.Linear(config.hidden_size, 96)
        self.narrow = nn.Linear(96, config.hidden_size)

    def forward(self, x, mask, **kwargs):
        n = self.calm(x)  # attention and MLP side by side, from one norm
        return x + self.mixer(n, mask, **kwargs) + self.narrow(torch.tanh(self.wide(n)))


class Unheard(PreTrainedModel):
    config_class = UnheardConfig
    base_model_prefix = "core"

    def __init__(self, config):
        super().__init__(config)
        config._supports_backend = self._supports_attention_backend


class UnheardCore(Unheard):
    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.places = nn.Embedding(128, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, **kwargs
    ):
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if self._supports_attention_backend:
            mask = create_causal_mask(
                self.config, x, attention_mask, None, position_ids=position_ids
            )
        else:
            seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            mask = seen if attention_mask is None else seen & attention_mask[:, None, None].bool()
            mask = mask | torch.eye(x.shape[1], dtype=torch.bool)
        if position_ids is None:
            position_ids = torch.arange(x.shape[1])[None]
        x = x + self.places(position_ids)
        kwargs.pop("use_cache", None)
        for block in self.blocks:
            x = block(x, mask, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x))


class UnheardForCausalLM(Unheard):
    def __init__(self, config):
        super().__init__(config)
        self.core = type(self).core_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    core_class = UnheardCore

    def get_input_embeddings(self):
        return self.core.embedding

    def get_output_embeddings(self):
        return self.lm_head

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        **kwargs,
    ):
        count = kwargs.pop("num_items_in_batch", None)
        hidden = self.core(input_ids, attention_mask, position_ids, inputs_embeds, **kwargs)[0]
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            more = {} if count is None else {"num_items_in_batch": count}
            loss = self.loss_function(logits, labels, self.config.vocab_size, **more)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


class BackedCore(UnheardCore):
    _supports_attention_backend = True
    _supports_sdpa = True


class BackedForCausalLM(UnheardForCausalLM):
    _supports_attention_backend = True
    _supports_sdpa = True
    core_class = BackedCore


def build_unheard(backed: bool, **more) -> nn.Module:
    """Make one with random weights."""
    torch.manual_seed(0)
    model = (BackedForCausalLM if backed else UnheardForCausalLM)(UnheardConfig(**more))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter) * 0.1
            parameter.add_(noise) if parameter.ndim == 1 else parameter.mul_(5)
    return model
