"""The engine goes into one model and comes out without a trace; what it does not know stays as it was."""

import copy
import json

import pytest
import torch
from torch import nn

from tests.engine.families import (
    adapted,
    batch,
    build,
    gradients,
    in_float64,
    in_nf4,
    judge_norm,
    packed_batch,
    true_gradients,
)
from tests.engine.unheard_of import build_unheard
from whet.engine import swap
from whet.engine.parity import judge
from whet.engine.swap import EngineSettings, PartReport, SwapReport
from whet.errors import WhetError


def attributes(model):
    """Every module's own attributes, by identity."""
    return {name: {k: id(v) for k, v in vars(m).items()} for name, m in model.named_modules()}


def fallbacks(model):
    """Reasons for which halves ran their own code, over all layers."""
    found = {}
    for module in swap.base_of(model).modules():
        record = vars(module).get("_whet")
        for reason, count in getattr(record, "fallbacks", {}).items():
            found[reason] = found.get(reason, 0) + count
    return found


def check(model, inputs, bound=judge):
    """Compare loss and every gradient with the original's; return the report."""
    truth, original = true_gradients(model, inputs), gradients(model, inputs)
    report = swap.attach(model)
    ours = gradients(model, inputs)
    assert ours[1].keys() == original[1].keys()
    judged = [judge("loss", ours[0], original[0], truth[0])]
    judged += [bound(n, g, original[1][n], truth[1][n]) for n, g in ours[1].items()]
    assert not [one for one in judged if not one.passed]
    return report


@pytest.mark.parametrize("make", [
    lambda: build("llama3"), lambda: adapted(build("gemma2")), lambda: build("mixtral"),
    lambda: adapted(build("gpt2")), lambda: build_unheard(backed=True),
], ids=["llama", "gemma2 lora", "mixtral", "gpt2 lora", "unheard of"])  # fmt: skip
def test_attached_and_detached_leaves_no_trace(make):
    model, inputs = make().train(), batch()
    before = attributes(model)
    classes = {type(m): dict(vars(type(m))) for m in model.modules()}
    weights = {name: (id(w), w.data_ptr(), w.clone()) for name, w in model.named_parameters()}
    keys, implementation = list(model.state_dict()), model.config._attn_implementation
    original = gradients(model, inputs)
    model.zero_grad()
    swap.attach(model)
    assert swap.is_attached(model)
    assert list(model.state_dict()) == keys
    gradients(model, inputs)
    assert model.config._attn_implementation == implementation
    swap.detach(model)
    assert not swap.is_attached(model) and swap.report_of(model) is None
    assert attributes(model) == before
    assert {type(m): dict(vars(type(m))) for m in model.modules()} == classes
    for name, parameter in model.named_parameters():
        assert (id(parameter), parameter.data_ptr()) == weights[name][:2]
        assert torch.equal(parameter, weights[name][2])
    again = gradients(model, inputs)
    assert torch.equal(again[0], original[0])
    assert all(torch.equal(again[1][name], grad) for name, grad in original[1].items())


def test_only_forwards_of_this_instance_change():
    model, other = build("llama2"), build("llama2")
    before = attributes(other)
    swap.attach(model)
    changed = {
        name for name, m in model.named_modules() if any(k.startswith("_whet") for k in vars(m))
    }
    assert changed == {"", "model", "model.layers.0", "model.layers.1", "model.norm"}
    assert attributes(other) == before and not swap.is_attached(other)


def test_a_model_without_the_engine_is_detached_as_it_is():
    model = build("llama2")
    before = attributes(model)
    swap.detach(model)
    assert attributes(model) == before


def test_the_engine_goes_in_twice_as_once():
    model, inputs = adapted(build("qwen3")), batch()
    swap.attach(model)
    once = gradients(model, inputs)
    report = swap.attach(model)
    twice = gradients(model, inputs)
    assert torch.equal(once[0], twice[0]) and report.layers_fused == 2
    swap.detach(model)
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_forward_that_was_there_before_is_there_after():
    model = build("llama2")
    calls, original = [], model.forward
    model.forward = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    mine = model.forward
    swap.attach(model)
    calls.clear()
    model(input_ids=torch.tensor([[1, 2]]), use_cache=False)
    assert calls == [1]
    swap.detach(model)
    assert model.forward is mine


def test_a_deep_copy_computes_on_its_own_weights():
    model, inputs = adapted(build("llama3")), batch()
    swap.attach(model)
    expected = gradients(model, inputs)
    made = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1.05)
    other = gradients(made, inputs)
    assert not torch.equal(other[0], expected[0])
    again = gradients(model, inputs)
    assert torch.equal(again[0], expected[0])
    swap.detach(model)  # the copy keeps its engine
    assert swap.is_attached(made) and not swap.is_attached(model)
    assert torch.equal(gradients(made, inputs)[0], other[0])
    swap.detach(made)
    assert not any("forward" in vars(m) for m in made.modules())


def test_a_saved_and_loaded_model_has_the_same_weights(tmp_path):
    from transformers import AutoModelForCausalLM

    model = build("llama2")
    swap.attach(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not swap.is_attached(loaded)
    for (name, one), (other_name, other) in zip(
        model.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert name == other_name and torch.equal(one, other)


def test_a_peft_model_and_the_model_inside_are_one():
    model, inputs = adapted(build("llama2")), batch()
    base = model.get_base_model()
    swap.attach(base)
    assert swap.is_attached(model) and swap.report_of(model) is swap.report_of(base)
    inside = gradients(model, inputs)
    swap.detach(model)
    swap.attach(model)
    assert torch.equal(gradients(model, inputs)[0], inside[0])
    assert swap.is_attached(base)


def test_an_adapter_that_is_put_on_later_is_computed():
    model, inputs = build("llama2"), batch()
    swap.attach(model)
    model = adapted(model)
    ours = gradients(model, inputs)
    truth = true_gradients(model, inputs)
    swap.detach(model)
    original = gradients(model, inputs)
    assert ours[1].keys() == original[1].keys()
    for name, grad in ours[1].items():
        assert judge(name, grad, original[1][name], truth[1][name]).passed, name


class Wrapper(nn.Module):
    """What torch's data-parallel wrappers look like from outside."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_a_parallel_wrapper_is_looked_through():
    inside = adapted(build("llama2"))
    model, inputs = Wrapper(inside), batch()
    report = swap.attach(model)
    assert report.layers_fused == 2 and swap.is_attached(inside)
    loss, grads = gradients(model, inputs)
    assert torch.equal(gradients(inside, inputs)[0], loss) and grads
    swap.detach(model)
    assert not swap.is_attached(inside)


def test_strict_raises_and_names_every_reason():
    model = build("mixtral")
    before = attributes(model)
    with pytest.raises(WhetError, match="engine.strict is set.*mlp: experts.*layers 0-1"):
        swap.attach(model, EngineSettings(strict=True))
    assert attributes(model) == before


def test_strict_takes_what_is_fused_throughout():
    assert not swap.attach(build("llama2"), EngineSettings(strict=True)).kept


def test_strict_raises_when_a_layer_would_run_its_own_code_later():
    model, inputs = adapted(build("llama2"), lora_dropout=0.1), batch()
    swap.attach(model, EngineSettings(strict=True))  # checked without dropout, as in evaluation
    with pytest.raises(WhetError, match="adapter dropout 0.1"):
        gradients(model, inputs)


def test_the_report_says_in_words_and_json_what_is_fused():
    report = SwapReport([
        PartReport(0, "attention", True), PartReport(0, "mlp", False, "experts"),
        PartReport(1, "attention", True), PartReport(1, "mlp", True),
        PartReport(2, "attention", False, "odd"), PartReport(2, "mlp", False, "experts"),
        PartReport(3, "attention", True), PartReport(3, "mlp", False, "experts"),
        PartReport(None, "norm", True), PartReport(None, "head", False, "strange"),
        PartReport(None, "unpadding", True),
    ])  # fmt: skip
    assert report.layers_total == 4 and report.layers_fused == 1
    assert report.kept == {"mlp: experts": [0, 2, 3], "attention: odd": [2], "head: strange": []}
    assert report.lines() == [
        "engine: 1 of 4 layers fused, and norm, unpadding",
        "not fused, mlp: experts (layers 0, 2-3)",
        "not fused, attention: odd (layer 2)",
        "not fused, head: strange",
    ]
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert report.to_dict()["parts"][1] == {
        "layer": 0, "part": "mlp", "fused": False, "reason": "experts"
    }  # fmt: skip


# Each puts an adapter in a state, and says why halves run their own code in it; "" when they do not.
STATES = {
    "DoRA": (lambda: adapted(build("llama2"), use_dora=True), "adapter variant"),
    "rsLoRA": (lambda: adapted(build("llama2"), use_rslora=True), ""),
    "biases": (lambda: adapted(build("llama2"), lora_bias=True), "an adapter with biases"),
    "two adapters": (lambda: two_adapters(["default", "second"]), "2 active adapters"),
    "the second of two": (lambda: two_adapters(["second"]), ""),
    "some layers": (lambda: adapted(build("llama2"), target_modules=["k_proj", "up_proj"]), ""),
    "other ranks": (lambda: adapted(build("llama2"), rank_pattern={"v_proj": 3, "gate": 7}), ""),
    "norms in full": (
        lambda: adapted(build("llama2"), modules_to_save=["norm"]), "",
    ),
    "embeddings in full": (
        lambda: adapted(build("llama2"), modules_to_save=["embed_tokens", "lm_head"]), "",
    ),
    "trained biases": (lambda: adapted(build("llama3"), bias="all"), ""),
    "trained head biases": (lambda: adapted(build("gpt2"), bias="lora_only"), ""),
}  # fmt: skip


def two_adapters(active):
    from peft import LoraConfig

    model = adapted(build("llama2"))
    model.add_adapter("second", LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B.second" in name:
            nn.init.normal_(parameter, std=0.1)
    model.base_model.set_adapter(active)
    return model


@pytest.mark.parametrize("state", STATES)
def test_an_adapter_in_any_state_is_computed_or_falls_back_and_is_counted(state):
    make, reason = STATES[state]
    model = make()
    check(model, batch())
    kept = swap.report_of(model).kept
    met = {*fallbacks(model), *kept}
    assert any(reason in one for one in met) if reason else not met


def test_adapter_dropout_runs_its_own_code_while_training_and_not_in_evaluation():
    model = adapted(build("llama2"), lora_dropout=0.3)
    inputs = packed_batch((14,))
    torch.manual_seed(5)
    original = gradients(model, inputs)
    torch.manual_seed(5)
    again = gradients(model, inputs)[1]
    swap.attach(model)
    torch.manual_seed(5)
    ours = gradients(model, inputs)
    assert fallbacks(model) == {"attention: adapter dropout 0.3": 2, "mlp: adapter dropout 0.3": 2}
    # The same random numbers in the same order: one document, row for row.
    assert torch.allclose(ours[0], original[0], rtol=1e-5, atol=0)
    assert ours[1].keys() == again.keys()
    for name, grad in ours[1].items():
        assert (grad - again[name]).norm() <= 1e-4 * again[name].norm(), name
    model.eval()
    model(**inputs, use_cache=False)
    assert sum(fallbacks(model).values()) == 4


def losses(model, inputs):
    """The loss in evaluation: the engine's, the original's and the truth."""
    model.eval()
    truth = in_float64(model)
    with torch.no_grad():
        exact, original = (m(**inputs, use_cache=False).loss for m in (truth, model))
        swap.attach(model)
        return model(**inputs, use_cache=False).loss, original, exact


def test_a_disabled_adapter_computes_the_model_without_it():
    model, inputs = adapted(build("llama2")), packed_batch((9,))
    on = losses(model, inputs)
    assert judge("loss", *on).passed
    with model.disable_adapter(), torch.no_grad():
        off = model(**inputs, use_cache=False).loss
        swap.detach(model)
        assert judge("loss", off, *losses(model, inputs)[1:]).passed
    assert abs(off - on[0]) > 1e-3 and not fallbacks(model)


def test_a_merged_adapter_is_in_the_weights():
    model, inputs = adapted(build("llama2")), packed_batch((9,))
    before = losses(model, inputs)[0]
    model.merge_adapter()
    with torch.no_grad():
        merged = model(**inputs, use_cache=False).loss
    swap.detach(model)
    assert judge("loss", merged, *losses(model, inputs)[1:]).passed
    assert torch.allclose(merged, before, rtol=1e-5, atol=0) and not fallbacks(model)
    model.unmerge_adapter()
    check(model, inputs)


@pytest.mark.parametrize("backed", [False, True], ids=["own attention", "attention backend"])
def test_a_family_nobody_has_heard_of_trains_and_the_report_says_so(backed):
    model = build_unheard(backed)
    report = check(model, batch())
    fused = {p.part for p in report.parts if p.fused}
    assert report.layers_total == 2 and report.layers_fused == 0
    assert fused == ({"norm", "head", "unpadding"} if backed else {"norm", "head"})
    assert all(p.reason for p in report.parts if not p.fused)
    assert any("under any name the engine knows" in line for line in report.lines())
    assert ("an attention that is not fused" in " ".join(report.lines())) is not backed


def test_a_family_nobody_has_heard_of_takes_packs_where_its_attention_can():
    check(build_unheard(backed=True), packed_batch())


def lying_layer(model):
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    class Lying(LlamaDecoderLayer):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs) * 1.25

    model.model.layers[0].__class__ = Lying


def lying_mlp(model):
    from transformers.models.llama.modeling_llama import LlamaMLP

    class Lying(LlamaMLP):
        def forward(self, x):
            return self.down_proj(torch.tanh(self.gate_proj(x)) * self.up_proj(x))

    model.model.layers[1].mlp.__class__ = Lying


def lying_attention(model):
    from transformers.models.llama.modeling_llama import LlamaAttention

    class Lying(LlamaAttention):
        def forward(self, *args, **kwargs):
            out, weights = super().forward(*args, **kwargs)
            return out * 0.9, weights

    model.model.layers[1].self_attn.__class__ = Lying


@pytest.mark.parametrize(("lie", "part"), [
    (lying_layer, None), (lying_mlp, "mlp"), (lying_attention, "attention"),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["quick", "full"])
def test_a_layer_that_does_not_compute_what_it_looks_like_is_refused(lie, part, kind):
    model, inputs = build("llama2"), batch()
    lie(model)
    truth, original = true_gradients(model, inputs), gradients(model, inputs)
    report = swap.attach(model, EngineSettings(check=kind))
    refused = {p.part for p in report.parts if p.layer == 1 and p.failed}
    # One check stands for layers that are alike; the check of the whole model sees the odd one out.
    assert refused == ({part} if part and kind == "full" else {"attention", "mlp"})
    ours = gradients(model, inputs)
    for name, grad in ours[1].items():
        assert judge(name, grad, original[1][name], truth[1][name]).passed, name


def test_an_activation_swapped_behind_the_config_is_read_from_the_layer():
    model = build("llama2")
    for block in model.model.layers:
        block.mlp.act_fn = nn.GELU(approximate="tanh")
    report = check(model, batch())
    assert report.layers_fused == 2


def test_an_activation_nobody_knows_keeps_the_mlp():
    model = build("llama2")
    model.model.layers[0].mlp.act_fn = nn.Softsign()
    report = check(model, batch())
    assert [(p.layer, p.part) for p in report.parts if not p.fused] == [(0, "mlp")]
    assert report.kept == {"mlp: an activation the engine does not know": [0]}


WHERE = ["self_attn.q_proj", "mlp", "self_attn", "input_layernorm", "post_feedforward_layernorm"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("where", WHERE)
def test_a_hook_inside_a_layer_is_still_called(where, when):
    model, inputs = build("gemma2"), batch()
    truth, original, calls = true_gradients(model, inputs), gradients(model, inputs), []
    if when == "after":
        swap.attach(model)
    model.model.layers[0].get_submodule(where).register_forward_hook(lambda *_: calls.append(1))
    if when == "before":
        swap.attach(model)
    calls.clear()
    ours = gradients(model, inputs)
    assert calls == [1]
    for name, grad in ours[1].items():
        assert judge(name, grad, original[1][name], truth[1][name]).passed, name


def test_which_parts_train_and_which_evaluate_stays_as_it_was():
    model = adapted(build("llama2")).train()
    model.base_model.model.model.layers[0].mlp.eval()
    before = [module.training for module in model.modules()]
    swap.attach(model)
    assert [module.training for module in model.modules()] == before


def test_gpt2_with_its_dropout_trains_through_its_own_code_and_is_fused_in_evaluation():
    dropout = {"resid_pdrop": 0.1, "attn_pdrop": 0.1, "embd_pdrop": 0.1}
    model, inputs = build("gpt2", **dropout), batch()
    report = swap.attach(model)
    assert report.layers_fused == 2
    torch.manual_seed(1)
    one, other = gradients(model, inputs), gradients(model, inputs)
    assert not torch.equal(one[0], other[0])  # dropout is at work
    assert set(fallbacks(model)) == {
        "attention: dropout 0.1 while training", "mlp: dropout 0.1 while training"
    }  # fmt: skip
    count = sum(fallbacks(model).values())
    swap.detach(model)
    assert judge("loss", *losses(model, packed_batch((9,)))).passed
    assert not fallbacks(model) and count == 8
    # Dropout leaves the expected loss about where it is; none at all leaves it exactly there.
    swap.detach(model)
    plain = gradients(build("gpt2"), inputs)[0]
    assert abs(one[0] - plain) < 0.2 * plain


@pytest.mark.parametrize("family", ["mistral", "gemma2", "llama2"])
def test_attention_dropout_trains_under_windows_and_soft_caps(family):
    model, inputs = build(family, attention_dropout=0.1), batch()
    swap.attach(model)
    torch.manual_seed(1)
    one, other = gradients(model, inputs), gradients(model, inputs)
    assert one[0].isfinite() and not torch.equal(one[0], other[0])
    assert fallbacks(model) == {"attention: dropout 0.1 while training": 4}


@pytest.mark.parametrize("method", ["lora", "full", "nf4", "mixtral"])
def test_gradient_checkpointing_changes_no_gradient(method):
    model = build("mixtral" if method == "mixtral" else "llama3")
    model = in_nf4(model) if method == "nf4" else model
    model = model if method in ("full", "mixtral") else adapted(model)
    inputs = batch()
    swap.attach(model)
    plain = gradients(model, inputs)
    base = swap.base_of(model)
    base.gradient_checkpointing_enable()
    if method in ("lora", "nf4"):
        base.enable_input_require_grads()
    again = gradients(model, inputs)
    assert torch.equal(plain[0], again[0])
    for name, grad in plain[1].items():
        assert torch.equal(again[1][name], grad), name


def test_gradient_checkpointing_works_where_an_attention_keeps_its_own_code():
    model, inputs = build("deepseek_v3"), batch()
    model.gradient_checkpointing_enable()
    check(model, inputs)


@pytest.mark.parametrize("family", ["llama3", "gemma2", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_under_autocast_loss_and_gradients_are_as_good_as_the_originals(family, method):
    model, inputs = build(family), batch()
    model = adapted(model) if method == "lora" else model
    truth = true_gradients(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        original = gradients(model, inputs)
        swap.attach(model)
        ours = gradients(model, inputs)
    # A loss is one number, whose error is chance: within a rounding to bfloat16 of the truth.
    assert abs(ours[0] - truth[0]) <= 2**-8 * truth[0]
    assert ours[1].keys() == original[1].keys()
    assert all(grad.dtype == torch.float32 for grad in ours[1].values())
    together = (
        torch.cat([g[n].flatten() for n in truth[1]]) for g in (ours[1], original[1], truth[1])
    )
    assert judge_norm("gradients", *together).passed
