"""`use_liger_kernel=True`: each part of a model is computed by the engine or by Liger, never by both.

Liger's kernels need a GPU, so a stand-in sets forwards on the same modules in the same way (as methods of
instances, from a package named liger_kernel) that compute the same in plain torch.
"""

import copy
import types
from collections import Counter

import pytest
import torch
from torch.nn import functional
from transformers.modeling_outputs import CausalLMOutputWithPast

from tests.compat.runs import assert_same_log, make_model, rows_of, run
from whet.engine import swap

CALLS = Counter()


def norm_forward(self, hidden_states):
    CALLS[self._part] += 1
    return functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def mlp_forward(self, x):
    CALLS[self._part] += 1
    return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


def top_forward(
    self, input_ids=None, attention_mask=None, labels=None, skip_logits=None,
    num_items_in_batch=None, **kwargs,
):  # fmt: skip
    CALLS[self._part] += 1
    hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)[0]
    logits = self.lm_head(hidden)
    if labels is None:
        return CausalLMOutputWithPast(logits=logits)
    loss = self.loss_function(
        logits, labels, vocab_size=self.config.vocab_size, num_items_in_batch=num_items_in_batch
    )
    return CausalLMOutputWithPast(loss=loss, logits=None if skip_logits else logits)


def put_liger(model, config=None):
    """Set forwards where Liger sets them on a Llama."""
    base = swap.base_of(model)
    parts = [(base, "top", top_forward), (base.model.norm, "last norm", norm_forward)]
    for layer in base.model.layers:
        parts += [(layer.input_layernorm, "norm", norm_forward), (layer.mlp, "mlp", mlp_forward)]
        parts += [(layer.post_attention_layernorm, "norm", norm_forward)]
    for module, part, forward in parts:
        own = types.FunctionType(
            forward.__code__, forward.__globals__, argdefs=forward.__defaults__
        )
        own.__module__ = "liger_kernel.transformers.stand_in"
        vars(module).update(_part=part, forward=types.MethodType(own, module))


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    CALLS.clear()
    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", put_liger)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_an_engine_that_was_there_first_keeps_the_layers_and_says_who_has_the_rest(
    kind, tokenizer, tmp_path, caplog
):
    plain = make_model(kind)
    fused = copy.deepcopy(plain)
    swap.attach(fused)
    settings = {"use_liger_kernel": True, "eval_strategy": "steps", "eval_steps": 3}
    ours = run(fused, tokenizer, tmp_path / "ours", settings=settings)
    assert CALLS["top"] > 0 and CALLS["last norm"] > 0
    assert not CALLS["norm"] and not CALLS["mlp"]  # inside the layers, which are the engine's
    said = [line for line in caplog.messages if "liger_kernel" in line]
    assert len(said) == 1 and "LlamaForCausalLM, LlamaRMSNorm compute as it says" in said[0]
    assert swap.met(fused)["notes"] == {"others": said[0]}
    assert not swap.met(fused)["fallbacks"]
    settings.pop("use_liger_kernel")
    assert_same_log(ours, run(plain, tokenizer, tmp_path / "theirs", settings=settings))


def test_an_engine_that_comes_later_stands_aside(tokenizer, tmp_path):
    plain = make_model()
    both = copy.deepcopy(plain)
    put_liger(both)
    report = swap.attach(both)
    kept = [part for part in report.parts if not part.fused]
    assert report.layers_fused == 0 and {part.part for part in kept} == {"attention", "mlp"}
    assert all("has a forward of its own, of liger_kernel" in part.reason for part in kept)
    ours = run(both, tokenizer, tmp_path / "ours")
    assert CALLS["norm"] > 0 and CALLS["mlp"] > 0
    assert_same_log(ours, run(plain, tokenizer, tmp_path / "theirs"))


def test_another_forward_inside_a_layer_takes_its_half_from_the_engine(tokenizer, tmp_path):
    model = make_model("full")
    swap.attach(model)
    mlp = model.model.layers[0].mlp
    vars(mlp).update(_part="mlp", forward=types.MethodType(mlp_forward, mlp))
    run(model, tokenizer, tmp_path)
    assert CALLS["mlp"] == 3
    assert swap.met(model)["fallbacks"] == ["mlp: LlamaMLP has a forward of its own"]


def test_taken_out_below_liger_the_model_is_ligers(tokenizer):
    model = make_model("full")
    swap.attach(model)
    put_liger(model)
    batch = {"input_ids": torch.tensor([rows_of(tokenizer)[0]["input_ids"]])}
    swap.detach(model)
    CALLS.clear()
    assert model(**batch, labels=batch["input_ids"]).loss.isfinite()
    assert CALLS == {"top": 1, "norm": 4, "mlp": 2, "last norm": 1}
