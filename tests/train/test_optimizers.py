"""Every optimizer takes steps, learns, and goes on after a resume as if nothing had been."""

import importlib.util
import shutil

import pytest
import torch
from optimizer_table import Row, record, words_of_the_page
from transformers import TrainerCallback

from whet.config_file import load_config
from whet.errors import InputError, WhetError
from whet.train import optimizer_kinds
from whet.train.listen import LogListener
from whet.train.optimizer_kinds import OPTIMIZERS, check_optimizer
from whet.train.optimizers import JoinedOptimizer
from whet.train.recipe import fit

pytestmark = pytest.mark.usefixtures("quick")
STEPS = 8
# Rates at which each learns on the tiny model; 3e-3 for the rest.
RATES = {"sgd": 0.5, "schedule_free_sgd": 0.5, "lomo": 0.5, "lion_8bit": 1e-3, "grokadamw": 1e-3}
SETTINGS = {
    "galore": ["train.optimizer_args={rank: 8, update_proj_gap: 3}"],
    "apollo": ["train.optimizer_args={rank: 8, update_proj_gap: 3}"],
    "sgd": ["train.optimizer_args={momentum: 0.9}"],
}
COMES_WITH = {"torch": "torch", "adafactor": "transformers", "sgd": "torch", "muon": "torch 2.9"}
MEASURED = {}


class Heard(LogListener):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


class Kept(TrainerCallback):
    """Keeps the optimizer, to look at its state."""

    def on_train_end(self, args, state, control, optimizer=None, model=None, **_):
        self.optimizer, self.model = optimizer.optimizer, model


def losses(run):
    return [row["loss"] for row in run.metrics() if "loss" in row]


def comes_with(name):
    kind = OPTIMIZERS[name]
    if kind.extra:
        return f"`whet[{kind.extra}]`"
    if "8bit" in name or "paged" in name:
        return "bitsandbytes"
    return next((where for part, where in COMES_WITH.items() if part in name), "torch")


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from tensors_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from tensors_in(inner)
    elif hasattr(value, "__dict__"):
        yield from tensors_in(vars(value))


def state_bytes(optimizer):
    """Bytes of all tensors of the state, each once; bitsandbytes shares tables of 256 numbers."""
    inside = [group.get("state") for group in optimizer.param_groups]  # grokadamw's place
    tensors = tensors_in([dict(optimizer.state), inside])
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


@pytest.fixture
def full(config):
    return load_config(
        config,
        ["train.parameters=full", f"train.max_steps={STEPS}", "train.checkpoint_steps=4",
         "data.heldout_fraction=0", "plan.probe=off", "train.schedule=constant"],
    )  # fmt: skip


def configured(config, name):
    settings = next((s for part, s in SETTINGS.items() if name.startswith(part)), [])
    rate = RATES.get(name, 3e-3)
    return load_config(
        config, [f"train.optimizer={name}", f"train.learning_rate={rate}", *settings]
    )


def resumed(config, run):
    """Forget what came after step 4, as if the run had been killed there, and go on."""
    shutil.rmtree(run.checkpoints_dir / f"step-{STEPS}")
    shutil.rmtree(run.weights_dir)
    return fit(config, resume=True, listener=Heard())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_takes_several_steps_and_resumes(full, name, record_property):
    row = Row(name, comes_with(name), settings=", ".join(OPTIMIZERS[name].arguments) or "none")
    package = OPTIMIZERS[name].package
    if package and not importlib.util.find_spec(package):
        record(record_property, row)
        pytest.skip(f"{package} is not installed")
    if OPTIMIZERS[name].needs_cuda and not torch.cuda.is_available():
        row.runs = f"no: {OPTIMIZERS[name].needs_cuda}"
        MEASURED[name] = row
        record(record_property, row)
        pytest.skip(f"needs CUDA: {OPTIMIZERS[name].needs_cuda}")
    # The engine's own gradients are tried with stepping in the backward pass, below.
    config = load_config(configured(full, name), ["engine.enabled=false"])
    kept = Kept()
    run = fit(config, listener=Heard(), callbacks=[kept])
    found = losses(run)
    assert len(found) == STEPS and found[-1] < found[0]
    trained = sum(p.numel() for p in kept.model.parameters() if p.requires_grad)
    row.first, row.last = found[0], found[-1]
    row.state = state_bytes(kept.optimizer) / trained
    row.runs = "yes, without paging" if "paged" in name else "yes"
    again = losses(resumed(config, run))
    row.resumes = "yes" if again == found else "no"
    record(record_property, row)
    MEASURED[name] = row
    assert again == found


@pytest.mark.parametrize(
    "trained",
    [
        ["lora.modules_to_save=[embed_tokens, lm_head]"],
        ["lora.modules_to_save=[embed_tokens]", "train.lora_plus_ratio=4"],
        ["train.parameters=full", "train.weight_decay=0.1", "train.optimizer=adamw_8bit"],
    ],
    ids=["adapter", "LoRA+", "full"],
)
def test_embeddings_learn_at_a_rate_of_their_own_also_after_a_resume(config, trained):
    config = load_config(config, [
        *trained, "train.embedding_learning_rate=1e-4", "train.max_steps=6",
        "train.checkpoint_steps=3", "data.heldout_fraction=0",
    ])  # fmt: skip
    kept = Kept()
    run = fit(config, listener=Heard(), callbacks=[kept])
    names = {id(p): name for name, p in kept.model.named_parameters()}
    ratio = config.train.lora_plus_ratio or 1
    seen = []
    for group in kept.optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            whole = "embed_tokens" in name or "lm_head" in name
            faster = ratio if "lora_B" in name else 1
            rate = 1e-4 if whole else config.train.learning_rate * faster
            assert group["initial_lr"] == pytest.approx(rate), name
            seen.append(name)
    assert len(seen) == len(set(seen)) == sum(p.requires_grad for p in kept.model.parameters())
    assert any("embed_tokens" in name for name in seen)
    before = losses(run)
    shutil.rmtree(run.checkpoints()[-1])
    assert losses(fit(config, resume=True, listener=Heard())) == before


def test_a_rate_for_embeddings_that_are_frozen_is_an_error(config):
    with pytest.raises(InputError, match="neither they nor the head are trained"):
        fit(load_config(config, ["train.embedding_learning_rate=1e-5"]), listener=Heard())


def test_lora_plus_has_b_matrices_learn_faster(config):
    config = load_config(
        config, ["train.max_steps=6", "train.lora_plus_ratio=16", "data.heldout_fraction=0"]
    )
    kept = Kept()
    run = fit(config, listener=Heard(), callbacks=[kept])
    names = {id(p): name for name, p in kept.model.named_parameters()}
    for group in kept.optimizer.param_groups:
        for parameter in group["params"]:
            faster = 16 if "lora_B" in names[id(parameter)] else 1
            rate = config.train.learning_rate * faster
            assert group["initial_lr"] == pytest.approx(rate)
    plain = fit(load_config(config, ["run.name=plain", "train.lora_plus_ratio=null"]))
    assert losses(run)[0] == losses(plain)[0] and losses(run)[-1] < losses(plain)[-1]


def test_muon_takes_the_matrices_of_the_layers_and_adamw_the_rest(full):
    kept = Kept()
    fit(configured(full, "muon"), listener=Heard(), callbacks=[kept])
    assert isinstance(kept.optimizer, JoinedOptimizer)
    muon, adamw = kept.optimizer.parts
    names = {id(p): name for name, p in kept.model.named_parameters()}
    matrices = [names[id(p)] for group in muon.param_groups for p in group["params"]]
    rest = [names[id(p)] for group in adamw.param_groups for p in group["params"]]
    assert matrices and all("proj" in name and "bias" not in name for name in matrices)
    assert any("embed" in name for name in rest) and any("norm" in name for name in rest)
    assert len(matrices) + len(rest) == len(names)


def test_muon_trains_adapters_too(config):
    settings = ["train.optimizer=muon", "data.heldout_fraction=0", "train.max_steps=6",
                "train.learning_rate=3e-2"]  # fmt: skip
    kept = Kept()
    run = fit(load_config(config, settings), listener=Heard(), callbacks=[kept])
    assert len(kept.optimizer.parts) == 1 and losses(run)[-1] < losses(run)[0]


def test_layer_wise_is_the_plain_one_step_by_step(full):
    """Without clipping, stepping inside the backward pass changes when, and nothing else."""
    pytest.importorskip("galore_torch")
    config = load_config(full, ["train.max_grad_norm=0"])
    plain = fit(configured(config, "galore_adamw"), listener=Heard())
    layerwise = load_config(configured(config, "galore_adamw_layerwise"), ["run.name=layerwise"])
    assert losses(fit(layerwise, listener=Heard())) == losses(plain)


def test_settings_reach_the_optimizer(full):
    config = load_config(
        full,
        ["train.optimizer_args={beta1: 0.5, beta2: 0.6, epsilon: 1.0e-4}", "train.max_steps=1"],
    )
    kept = Kept()
    fit(config, listener=Heard(), callbacks=[kept])
    assert kept.optimizer.defaults["betas"] == (0.5, 0.6)
    assert kept.optimizer.defaults["eps"] == 1e-4


def test_only_the_targets_are_projected(full):
    pytest.importorskip("galore_torch")
    config = load_config(
        configured(full, "galore_adamw"), ["train.optimizer_targets=[mlp]", "train.max_steps=1"]
    )
    kept = Kept()
    fit(config, listener=Heard(), callbacks=[kept])
    names = {id(p): name for name, p in kept.model.named_parameters()}
    groups = [group for group in kept.optimizer.param_groups if "rank" in group]
    projected = [names[id(p)] for group in groups for p in group["params"]]
    assert len(projected) == 6 and all(".mlp." in name for name in projected)
    with pytest.raises(InputError, match=r"no linear layer .*\['nowhere'\].* down_proj"):
        fit(load_config(config, ["train.optimizer_targets=[nowhere]"]), listener=Heard())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["train.optimizer=adam_torch"], "did you mean 'adamw_torch'"),
        (["train.optimizer_args={beta_1: 0.5}"], "did you mean 'beta1'"),
        (["train.optimizer=adafactor", "train.optimizer_args={beta1: 0.5}"], "it has none"),
        (["train.optimizer_args={beta1: high}"], "is a number"),
        (["train.optimizer=muon", "train.optimizer_args={adjust_lr_fn: 'a,b'}"], "one word"),
        (["train.optimizer_targets=[mlp]"], "project gradients"),
        (["train.optimizer=muon", "train.lora_plus_ratio=4"], "does not go with"),
        (["train.optimizer=muon", "train.embedding_learning_rate=1e-5"], "does not go with"),
    ],
    ids=str,
)
def test_what_does_not_suit_the_optimizer_is_told_before_the_run(config, settings, words):
    with pytest.raises(InputError, match=words):
        check_optimizer(load_config(config, settings))


def test_projecting_needs_whole_weights(config, monkeypatch):
    monkeypatch.setattr(optimizer_kinds, "_check_package", lambda *_: None)
    with pytest.raises(InputError, match="train.parameters: full"):
        check_optimizer(load_config(config, ["train.optimizer=galore_adamw"]))


def test_stepping_in_the_backward_pass_needs_a_type_without_loss_scaling(full, monkeypatch):
    monkeypatch.setattr(optimizer_kinds, "_check_package", lambda *_: None)
    float16 = load_config(full, ["train.optimizer=lomo", "model.dtype=float16"])
    with pytest.raises(InputError, match="bfloat16 or float32"):
        check_optimizer(float16)


@pytest.mark.parametrize("name", [name for name, kind in OPTIMIZERS.items() if kind.extra])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(full, monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    extra = OPTIMIZERS[name].extra
    with pytest.raises(InputError, match=rf"pip install 'whet\[{extra}\]'"):
        check_optimizer(load_config(full, [f"train.optimizer={name}"]))


def test_what_an_optimizer_does_not_use_is_said(full, monkeypatch):
    monkeypatch.setattr(optimizer_kinds, "_check_package", lambda *_: None)
    lomo = load_config(full, ["train.optimizer=lomo", "train.weight_decay=0.1"])
    assert check_optimizer(lomo) == [
        "train.max_grad_norm is not used by lomo", "train.weight_decay is not used by lomo",
    ]  # fmt: skip
    free = ["train.optimizer=schedule_free_adamw", "train.schedule=cosine"]
    assert "needs none" in check_optimizer(load_config(full, free))[0]


def test_steps_inside_the_backward_pass_must_be_one_pass(full):
    pytest.importorskip("galore_torch")
    config = configured(full, "galore_adamw_layerwise")
    with pytest.raises(WhetError, match="a step must be one pass"):
        fit(load_config(config, ["plan.tokens_per_pass=40"]), listener=Heard())


def test_the_page_says_what_the_tests_found():
    """Its words, not its numbers; `python -m tests.train.optimizer_table --write` writes it anew."""
    if not MEASURED:
        pytest.skip("the optimizers were not measured in this session")
    page = words_of_the_page()
    assert list(page) == list(OPTIMIZERS)
    for name, row in MEASURED.items():
        assert page[name] == row.words
