"""The harness itself: whatever is wrong in a half, a head or a spec must be found."""

from dataclasses import replace

import pytest
import torch

from tests.engine.families import (
    adapted,
    batch,
    build,
    gradients,
    in_nf4,
    true_gradients,
)
from whet.engine import attention_half, group, head, layer, mlp_half, parity, swap, verify
from whet.engine.model import decoder_of
from whet.engine.parity import compare_half, judge
from whet.engine.spec import read_layer
from whet.engine.swap import EngineSettings

MODELS = {
    "llama": lambda: adapted(build("llama3")),
    "full": lambda: build("llama3"),
    "qwen3": lambda: build("qwen3"),
    "gemma2": lambda: build("gemma2"),
    "nf4": lambda: adapted(in_nf4(build("llama2"))),
    "gpt2": lambda: build("gpt2"),
}


def observed(model):
    base = swap.base_of(model)
    blocks = swap.decoder_layers(decoder_of(base))
    return blocks, parity.observe(base, blocks)


def failures(model, part, change=lambda spec: spec):
    """Names of what fails in one half of the first layer."""
    blocks, seen = observed(model)
    spec = change(read_layer(blocks[0]))
    angles = seen.layers[0].position_embeddings
    compared = compare_half(blocks[0], spec, part, angles, torch.float32)
    assert not isinstance(compared, str), compared
    return {one.name for one in compared if not one.passed}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_an_honest_half_passes(name, part):
    assert not failures(MODELS[name](), part)


def zeros(x):
    x.zero_()


def wrong_sign(x):
    x.neg_()


def dropped_last_row(x):
    x[-1:] = 0


def not_a_number(x):
    x[-1:] = float("nan")


def returned(number):
    return lambda result, kwargs, args: result[number] if isinstance(result, tuple) else result


def given(name):
    return lambda result, kwargs, args: kwargs[name]


def argument(number):
    return lambda result, kwargs, args: args[number]


# Where a kernel is called, which of its outputs is sabotaged, in whose half.
KERNELS = {
    "attention": (attention_half, "varlen_forward", returned(0), "full", "attention"),
    "dq": (attention_half, "varlen_backward", argument(8), "full", "attention"),
    "dk": (attention_half, "varlen_backward", argument(9), "full", "attention"),
    "dv": (attention_half, "varlen_backward", argument(10), "full", "attention"),
    "norm": (attention_half, "norm_forward", returned(0), "full", "attention"),
    "norm before the mlp": (attention_half, "norm_forward", returned(0), "full", "mlp"),
    "norm of GPT-2": (attention_half, "norm_forward", returned(0), "gpt2", "mlp"),
    "gradient of the norm": (attention_half, "norm_backward", given("out_TD"), "full", "attention"),
    "gradient of the norm's weight": (
        attention_half, "norm_backward", given("dweight_D"), "full", "mlp",
    ),
    "gradient of the norm's bias": (
        attention_half, "norm_backward", given("dbias_D"), "gpt2", "mlp",
    ),
    "rotated q": (attention_half, "rope_forward", given("q_out_THK"), "full", "attention"),
    "rotated k": (attention_half, "rope_forward", given("k_out_TGK"), "full", "attention"),
    "normed q": (attention_half, "rope_forward", given("q_out_THK"), "qwen3", "attention"),
    "gradient of q": (attention_half, "rope_backward", given("dq_out_THK"), "full", "attention"),
    "gradient of k": (attention_half, "rope_backward", given("dk_out_TGK"), "full", "attention"),
    "gradient of the norm of q": (
        attention_half, "rope_backward", given("dq_norm_K"), "qwen3", "attention",
    ),
    "gradient of the norm of k": (
        attention_half, "rope_backward", given("dk_norm_K"), "qwen3", "attention",
    ),
    "activation": (mlp_half, "glu_forward", returned(0), "full", "mlp"),
    "activation of GPT-2": (mlp_half, "glu_forward", returned(0), "gpt2", "mlp"),
    "gradient of the gate": (mlp_half, "glu_backward", argument(4), "full", "mlp"),
    "gradient of up": (mlp_half, "glu_backward", argument(5), "full", "mlp"),
    "activation made again": (mlp_half, "glu_backward", argument(6), "full", "mlp"),
    "P": (group, "lora_backward", given("p_TR"), "llama", "mlp"),
    "gradient of B": (group, "lora_backward", given("db_NR"), "llama", "attention"),
    "NF4 weight": (group, "nf4_dequantize", returned(0), "nf4", "mlp"),
}  # fmt: skip
SABOTAGES = (zeros, wrong_sign, dropped_last_row, not_a_number)


def sabotage(monkeypatch, module, name, pick, spoil):
    kernel = getattr(module, name)

    def spoiled(*args, **kwargs):
        result = kernel(*args, **kwargs)
        spoil(pick(result, kwargs, args))
        return result

    monkeypatch.setattr(module, name, spoiled)


@pytest.mark.parametrize("spoil", SABOTAGES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_sabotaged_kernel_is_found(kernel, spoil, monkeypatch):
    module, name, pick, model, part = KERNELS[kernel]
    model = MODELS[model]()
    sabotage(monkeypatch, module, name, pick, spoil)
    assert failures(model, part)


@pytest.mark.parametrize("function", ["rope_forward", "rope_backward"])
def test_rope_shifted_by_a_position_is_found(function, monkeypatch):
    kernel = getattr(attention_half, function)

    def shifted(q, k, cos, sin, **more):
        return kernel(q, k, cos.roll(1, 0), sin.roll(1, 0), **more)

    monkeypatch.setattr(attention_half, function, shifted)
    assert failures(MODELS["full"](), "attention")


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_an_adapter_whose_scale_is_left_out_is_found(part, monkeypatch):
    read = layer.read_projection

    def unscaled(module):
        found = read(module)
        return replace(found, adapter=replace(found.adapter, scale=1.0))

    monkeypatch.setattr(layer, "read_projection", unscaled)
    found = failures(MODELS["llama"](), part)
    assert "output" in found and any("lora_A" in name for name in found)


def test_a_bias_that_is_left_out_is_found(monkeypatch):
    read = layer.read_projection
    monkeypatch.setattr(layer, "read_projection", lambda m: replace(read(m), bias_N=None))
    model = MODELS["llama"]()
    assert "output" in failures(model, "attention")


def test_documents_cut_in_the_wrong_place_are_found(monkeypatch):
    from whet.engine.unpad import from_lengths

    forward = attention_half.varlen_forward

    def shifted(q, k, v, packed, mask):
        lengths = [packed.lengths[0] + 1, *packed.lengths[2:]]
        return forward(q, k, v, from_lengths(lengths), mask)

    monkeypatch.setattr(attention_half, "varlen_forward", shifted)
    assert "output" in failures(MODELS["full"](), "attention")


def attention(**changes):
    return lambda spec: replace(spec, attention=replace(spec.attention, **changes))


@pytest.mark.parametrize("changes", [
    {"window": 5}, {"window": 7}, {"window": None}, {"softcap": None}, {"softcap": 5.5},
    {"scale": 0.25}, {"rope": "interleaved"}, {"softcap": None, "window": None},
], ids=str)  # fmt: skip
def test_an_attention_that_is_misread_is_found(changes):
    model = MODELS["gemma2"]()
    spec = read_layer(swap.decoder_layers(decoder_of(model))[0]).attention
    assert spec.window == 6 and spec.softcap == 5.0
    # Judged against the layer as it is, whose mask the original half is given from its true spec.
    assert "output" in against_the_truth(model, attention(**changes))


def against_the_truth(model, change):
    """Failures of a changed spec, the original computed from the true one."""
    blocks, seen = observed(model)
    true = read_layer(blocks[0])
    original = parity.original_half
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            parity,
            "original_half",
            lambda b, spec, part, x, angles: original(b, true, part, x, angles),
        )
        patch.setattr(
            parity,
            "attend_plainly_",
            lambda b, spec, plainly=parity.attend_plainly_: plainly(b, true),
        )
        return failures(model, "attention", change)


@pytest.mark.parametrize(
    "changes", [{"eps": 1e-2}, {"unit_offset": False}, {"centered": True}], ids=str
)
def test_a_norm_that_is_misread_is_found(changes):
    def change(spec):
        half = spec.mlp_half
        return replace(spec, mlp_half=replace(half, norm=replace(half.norm, **changes)))

    assert "output" in failures(MODELS["gemma2"](), "mlp", change)


@pytest.mark.parametrize("changes", [{"activation": "silu"}, {"activation": "gelu_erf"}], ids=str)
def test_an_activation_that_is_misread_is_found(changes):
    def change(spec):
        return replace(spec, mlp=replace(spec.mlp, **changes))

    assert "output" in failures(MODELS["gemma2"](), "mlp", change)


@pytest.mark.parametrize("changes", [{"post_norm": None}, {"multiplier": 0.99}], ids=str)
@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_a_frame_that_is_misread_is_found(part, changes):
    model = MODELS["gemma2"]()
    blocks, seen = observed(model)
    true = read_layer(blocks[0])
    half = f"{part}_half"
    original = parity.original_half
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            parity,
            "original_half",
            lambda b, spec, part, x, angles: original(b, true, part, x, angles),
        )
        changed = replace(true, **{half: replace(getattr(true, half), **changes)})
        assert "output" in failures(model, part, lambda spec: changed)


@pytest.mark.parametrize(("module", "name", "part"), [
    (attention_half, "varlen_backward", "attention"), (mlp_half, "glu_backward", "mlp"),
])  # fmt: skip
def test_a_half_that_fails_its_check_keeps_its_own_code_and_computes_what_it_should(
    module, name, part, monkeypatch
):
    model, inputs = MODELS["full"](), batch()
    truth, original = true_gradients(model, inputs), gradients(model, inputs)
    sabotage(monkeypatch, module, name, argument(5 if part == "mlp" else 8), zeros)
    report = swap.attach(model)
    kept = [p for p in report.parts if not p.fused]
    assert {p.part for p in kept} == {part} and len(kept) == 2
    assert all("differs from the original" in p.reason and p.failed for p in kept)
    ours = gradients(model, inputs)
    for key, grad in ours[1].items():
        assert judge(key, grad, original[1][key], truth[1][key]).passed, key


def test_every_layer_is_checked_when_asked_for(monkeypatch):
    model = build("llama2")
    checked = []
    monkeypatch.setattr(
        parity, "_check_layer",
        lambda block, spec, seen, number: checked.append(number) or spec,
    )  # fmt: skip
    swap.attach(model)
    assert checked == [0]  # the layers are alike
    swap.attach(model, EngineSettings(check="full"))
    assert checked == [0, 0, 1]
    swap.attach(model, EngineSettings(check="off"))
    assert checked == [0, 0, 1]


def test_layers_that_differ_in_shape_or_window_are_each_checked(monkeypatch):
    model = build("gemma2")  # a sliding and a full layer
    checked = []
    monkeypatch.setattr(
        parity, "_check_layer",
        lambda block, spec, seen, number: checked.append(number) or spec,
    )  # fmt: skip
    swap.attach(model)
    assert checked == [0, 1]


ROWS = [[5, 9, 200, 31, 7, 8, 12, 40], [3, 77, 8], [11, 12, 13, 14, 15, 16, 90, 250, 4]]


def verified(model):
    found = verify.verify(model, ROWS, EngineSettings())
    return {part.name for part in found.parts if part.verdict == "fail"}


def test_an_honest_model_is_verified():
    for name in ("llama", "gemma2"):
        assert not verified(MODELS[name]())


@pytest.mark.parametrize("spoil", [zeros, wrong_sign, dropped_last_row])
@pytest.mark.parametrize("name", ["full", "llama"])
def test_a_sabotaged_gradient_of_the_head_is_found(name, spoil, monkeypatch):
    model = MODELS[name]()
    sabotage(monkeypatch, head, "cross_entropy_", argument(0), spoil)
    assert verified(model)


@pytest.mark.parametrize("spoil", [zeros, wrong_sign, dropped_last_row])
def test_a_sabotaged_loss_is_found_by_the_first_real_pass(spoil, monkeypatch):
    model, inputs = MODELS["llama"](), batch()
    swap.attach(model)
    model.train()
    assert not verify.compare_pass(model, inputs["input_ids"], inputs["labels"])
    sabotage(monkeypatch, head, "cross_entropy_", returned(0), spoil)
    assert verify.compare_pass(model, inputs["input_ids"], inputs["labels"])


def test_the_bound_is_the_originals_error_twice_and_a_rounding():
    truth = torch.ones(4, dtype=torch.float64)
    original = truth + 1e-3
    assert judge("x", truth + 1.9e-3, original, truth).passed
    assert not judge("x", truth + 2.1e-3, original, truth).passed
    assert judge("x", truth + 0.9e-5, truth, truth).passed
    assert not judge("x", truth * float("nan"), original, truth).passed
    assert not judge("x", torch.zeros(4), truth, truth).passed
    assert judge("nothing", *[torch.empty(0)] * 3).passed
