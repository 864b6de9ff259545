"""What a pass saves and needs is known from shapes: within a tenth of what real tensors do."""

import pytest
import torch
from tests.engine.families import FAMILIES, adapted, build, in_nf4

from whet.data.packing import packed_batch
from whet.data.tokenize import Tokens
from whet.engine import swap
from whet.engine.memory import Policy, release_workspaces
from whet.engine.model import decoder_of
from whet.engine.swap import EngineSettings, base_of, decoder_layers
from whet.plan.count import AllocationCounter, saved_bytes
from whet.plan.memory import LEAST, PassModel, static_memory
from whet.plan.shape import quantise_shapes_, shaped

POLICIES = {
    "keep": Policy(),
    "recompute": LEAST,
    "offload": Policy("offload", "recompute", "offload", "recompute"),
}
LENGTHS = [40, 17, 60, 3]


def meta_of(model, kind):
    """Build the same model again from its config, without values."""
    from transformers import AutoModelForCausalLM

    config = base_of(model).config
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if kind == "nf4":
            quantise_shapes_(made, torch.float32)
        return made if kind == "full" else adapted(made)


def real_of(name, kind):
    model = build(name)
    model = in_nf4(model) if kind == "nf4" else model
    return model if kind == "full" else adapted(model)


def forward(model, batch):
    decoder = decoder_of(base_of(model))
    return decoder(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    ).last_hidden_state


@pytest.mark.parametrize("kind", ["lora", "full", "nf4"])
@pytest.mark.parametrize("name", FAMILIES)
def test_saved_bytes_of_a_pass_are_known_from_shapes(name, kind):
    model = real_of(name, kind)
    swap.attach(model, EngineSettings(check="off"))
    model.train()
    made = shaped(meta_of(model, kind))
    assert made.report.to_dict() == swap.report_of(model).to_dict(), "the same parts are fused"
    passes = PassModel(made, "cpu", None, label_share=1.0)
    rows = [Tokens([1] * n, [1] * n, "") for n in LENGTHS]
    batch, num = packed_batch(rows), len(decoder_layers(decoder_of(base_of(model))))
    # As many tokens in documents as long: what is saved does not depend on where they are cut.
    for where, policy in POLICIES.items():
        swap.set_policies(model, [policy] * num)
        found = saved_bytes(base_of(model), lambda: forward(model, batch))
        needs = passes.needs(sum(LENGTHS), max(LENGTHS), [policy] * num)
        assert sum(needs.saved.values()) == pytest.approx(found, rel=0.1), where


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["smollm", "qwen3", "gemma2", "gpt2"])
def test_the_peak_of_a_pass_is_known_from_shapes(name, policy):
    """Counted storage by storage, forward and backward."""
    model = adapted(build(name, num_hidden_layers=4) if name != "gpt2" else build(name))
    swap.attach(model, EngineSettings(check="off"))
    model.train()
    num = len(decoder_layers(decoder_of(base_of(model))))
    policies = [POLICIES[policy]] * num
    swap.set_policies(model, policies)
    passes = PassModel(shaped(meta_of(model, "lora")), "cpu", None, label_share=1.0)
    lengths = [120] * 4  # as long as the tiny models allow
    batch = packed_batch([Tokens([1] * n, [1] * n, "") for n in lengths])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    release_workspaces()
    with AllocationCounter() as counter:
        loss = model(**batch, num_items_in_batch=1, use_cache=False, whet_loss_only=True).loss
        loss.backward()
    needs = passes.needs(sum(lengths), max(lengths), policies)
    # What the last half would send away never leaves, and its buffers are used again.
    assert needs.peak - needs.slack == pytest.approx(
        counter.peak, rel=0.25 if policy == "offload" else 0.15
    )


def test_layers_that_differ_are_each_counted():
    """Gemma 3 alternates windows; freezing the first layers leaves nothing of them to save."""
    model = build(
        "gemma3", num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2
    )
    model.requires_grad_(False)
    decoder_layers(decoder_of(model))[2].requires_grad_(True)
    swap.attach(model, EngineSettings(check="off"))
    model.train()
    meta = meta_of(model, "full").requires_grad_(False)
    decoder_layers(decoder_of(meta))[2].requires_grad_(True)
    passes = PassModel(shaped(meta), "cpu", None, label_share=1.0)
    trace = passes.trace(120, 60, lean=False)
    totals = [sum(layer.values()) for layer in trace.layers]
    assert totals[0] == totals[1] == 0 < totals[3] and totals[2] > 0
    batch = packed_batch([Tokens([1] * 60, [1] * 60, "")] * 2)
    found = saved_bytes(model, lambda: forward(model, batch))
    assert sum(totals) + trace.outside == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("kind", ["lora", "full", "nf4"])
@pytest.mark.parametrize("name", ["llama3", "qwen3", "qwen3_moe"])
def test_weights_and_gradients_are_counted_to_the_byte(name, kind):
    model = real_of(name, kind)
    static = static_memory(meta_of(model, kind), "adamw_torch")
    real = static_memory(model, "adamw_torch")
    assert static == real
    named = dict(model.named_parameters())
    scales = 0
    for parameter in named.values():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            parts = [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
            scales += sum(part.numel() * part.element_size() for part in parts)
    total = sum(p.numel() * p.element_size() for p in named.values())
    counted = static.weights + static.quantised + static.embeddings + static.adapters
    assert counted == total + scales
    trained = sum(4 * p.numel() for p in named.values() if p.requires_grad)
    assert static.gradients == trained and static.states == 2 * trained


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_8bit", "sgd", "lion_32bit"])
def test_optimizer_states_are_those_the_optimizer_makes(optimizer, tmp_path):
    from transformers import Trainer, TrainingArguments

    from whet.plan.memory import state_bytes

    model = torch.nn.Sequential(torch.nn.Linear(70, 90), torch.nn.Linear(90, 70, bias=False))
    arguments = TrainingArguments(output_dir=str(tmp_path), optim=optimizer, use_cpu=True)
    made, options = Trainer.get_optimizer_cls_and_kwargs(arguments, None)
    stepper = made(model.parameters(), **options)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    stepper.step()
    held = 0
    for state in stepper.state.values():
        tensors = [v for v in state.values() if isinstance(v, torch.Tensor) and v.ndim]
        # The 256 codes of bitsandbytes are shared by all parameters.
        held += sum(t.numel() * t.element_size() for t in tensors if t.numel() != 256)
    counted = sum(state_bytes(optimizer, parameter) for parameter in model.parameters())
    assert counted == pytest.approx(held, rel=0.02, abs=1)
