"""What is planned fits, is the fastest or the leanest that does, and says what would help."""

import json

import pytest
import torch
from typer.testing import CliRunner

from whet.cli import app
from whet.config_file import load_config
from whet.engine.memory import Policy
from whet.errors import InputError, WhetError
from whet.plan.memory import LEAST
from whet.plan.plan import longest_that_fits, make_plan, require_fit, workload_of
from whet.plan.policy import Target, describe, policy_of_gradient_checkpointing
from whet.plan.speed import CARDS, Speed, Work, card_speed, card_with
from whet.plan.target import target_of
from whet.train.listen import LogListener
from whet.train.recipe import fit

SPEED = Speed("a card", 20e12, 400e9, 12e9, 0.5, measured=False)
LENGTHS = [(37 * n) % 200 + 20 for n in range(64)]


def target(budget, device="cuda", host=2**34):
    return Target(device, "a card", int(budget), 0, host if device == "cuda" else 0, SPEED)


def plan_for(config, budget, *settings, lengths=LENGTHS, device="cuda", **more):
    config = load_config(config, ["train.batch_size=16", "lora.dropout=0", *settings])
    workload = workload_of(config, lengths, sum(lengths) // 2, 256)
    return make_plan(config, workload, target(budget, device, **more), torch.float32)


def test_with_memory_to_spare_everything_is_kept_and_a_step_is_one_pass(config):
    plan = plan_for(config, 2**34)
    assert plan.fits and plan.choice.passes_per_step == 1
    assert set(plan.choice.policies) == {Policy()}
    largest = max(sum(step) for step in plan.workload.steps())
    assert largest <= plan.choice.tokens_per_pass < largest + 64


def test_less_memory_never_makes_a_plan_that_does_not_fit_and_costs_time(config):
    roomy = plan_for(config, 2**34)
    budgets = [roomy.choice.peak_bytes * share for share in (1.0, 0.8, 0.6, 0.45)]
    seconds = []
    for budget in budgets:
        plan = plan_for(config, budget)
        assert plan.fits and plan.choice.peak_bytes <= budget
        seconds.append(plan.choice.step_seconds)
    assert seconds == sorted(seconds) and seconds[-1] > seconds[0]


def test_items_add_up_to_no_less_than_the_peak_and_are_told_in_json(config):
    plan = plan_for(config, 2**34)
    found = json.loads(json.dumps(plan.to_dict()))
    on_device = sum(item["bytes"] for item in found["items"] if item["where"] == "device")
    head = plan.choice.memory.head
    assert found["peak_bytes"] <= on_device <= found["peak_bytes"] + head
    assert {"peak_bytes", "tokens_per_pass", "passes_per_step", "policy", "items"} <= set(found)
    names = {item["name"] for item in found["items"]}
    assert {"weights", "embeddings and head", "adapters", "gradients", "optimizer states",
            "saved tensors", "one layer's working set", "loss chunk"} <= names  # fmt: skip


def test_lean_needs_the_least_and_fast_is_the_fastest(config):
    fast, lean = plan_for(config, 2**34), plan_for(config, 2**34, "plan.preset=lean")
    assert lean.choice.peak_bytes < fast.choice.peak_bytes
    assert lean.choice.step_seconds > fast.choice.step_seconds
    assert lean.choice.tokens_per_pass == max(LENGTHS)


@pytest.mark.parametrize("policy", ["keep", "recompute", "offload"])
def test_a_policy_that_is_asked_for_is_taken(config, policy):
    plan = plan_for(config, 2**34, f"plan.policy={policy}", "plan.tokens_per_pass=500")
    ways = describe(plan.choice.policies)
    assert plan.choice.tokens_per_pass == 500
    assert ways["gate_up"] == {"keep": "keep"}.get(policy, "recompute")
    assert ways["hidden"] == ("offload" if policy == "offload" else "keep")
    away = sum(plan.choice.memory.away.values())
    assert (away > 0) == (policy == "offload")


def test_nothing_goes_to_a_scratch_file_by_itself(config):
    roomy = plan_for(config, 2**34, device="cpu")
    tight = plan_for(config, 0.6 * roomy.choice.peak_bytes, device="cpu")
    assert all(p.hidden == p.attention == "keep" for p in tight.choice.policies)
    assert tight.fits


def test_host_memory_is_not_planned_beyond_what_there_is(config):
    asked = plan_for(config, 2**34, "plan.policy=offload", host=1000)
    assert not asked.fits


def test_when_nothing_fits_the_smallest_change_is_told(config):
    wide = "lora.rank=64"  # moments that are worth their 8 bits
    needs = plan_for(config, 2**34, "plan.preset=lean", wide).choice.peak_bytes
    plan = plan_for(config, 0.97 * needs, wide)
    assert not plan.fits and plan.changes[0].startswith("it fits with ")
    change = plan.changes[0].removeprefix("it fits with ").replace(": ", "=").split(", ")
    assert plan_for(config, 0.97 * needs, *change, "plan.preset=lean", wide).fits
    with pytest.raises(WhetError, match="does not fit .*(it fits with|it needs a device)") as told:
        require_fit(plan_for(config, 0.7 * needs, wide))
    assert "MiB" in str(told.value)


def test_what_cannot_fit_at_all_says_how_much_it_needs(config):
    plan = plan_for(config, 1000)
    assert "it needs a device with" in plan.changes[0]


def test_the_longest_example_that_fits_really_does(config):
    plan = plan_for(config, 2**27)
    longest = longest_that_fits(plan.chooser)
    assert longest > max(LENGTHS)
    room = plan.target.budget_bytes - sum(i.num_bytes for i in plan.static.items)
    least = plan.chooser.least()
    assert plan.chooser.passes.needs(longest, longest, least).peak <= room
    assert plan.chooser.passes.needs(2 * longest, 2 * longest, least).peak > room


def test_a_workload_without_data_is_as_long_as_the_config_allows(config):
    workload = workload_of(config, None, 0, 256)
    assert workload.longest == 256 and not workload.known and len(workload.lengths) >= 4
    by_tokens = load_config(config, ["train.batch_tokens=2000"])
    steps = workload_of(by_tokens, LENGTHS, 100, 256).steps()
    assert all(sum(step) <= 2000 + max(LENGTHS) for step in steps)


def test_operations_are_two_a_weight_forward_and_as_many_back():
    from tests.engine.families import adapted, build

    model = adapted(build("llama2"))
    work = Work(model)
    layers = [p for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2]
    frozen = sum(p.numel() for p in layers if not p.requires_grad)
    adapters = sum(p.numel() for p in layers if p.requires_grad)
    assert work.per_token == (2 * (frozen + adapters), 4 * frozen + 6 * adapters)
    model_flops, with_repeats = work.of_pass([10, 20], 5, [LEAST] * 2)
    squares = (10**2 + 20**2) / 2
    attention = 2 * squares * 64 * 7 * 2  # seven products over half a square, width 64, two layers
    head = 2 * 5 * 301 * 64 * 2
    assert model_flops == pytest.approx(30 * work.per_token[1] + attention + head)
    assert with_repeats == model_flops  # not fused here: nothing is made again


def test_use_gradient_checkpointing_has_a_policy_for_each_value():
    assert [policy_of_gradient_checkpointing(v) for v in (False, True, "unsloth", "True")] == [
        "keep", "recompute", "offload", "recompute"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="'unsloth', not 'yes'"):
        policy_of_gradient_checkpointing("yes")


def test_cards_are_known_by_their_names_and_memory():
    assert card_speed("NVIDIA GeForce RTX 4090").flops == 165.2e12
    assert card_speed("NVIDIA A100-SXM4-80GB").flops == CARDS["A100"][0] * 1e12
    assert card_speed("a toaster") is None
    assert card_with(12 * 2**30) == "RTX 3060" and card_with(23 * 2**30) in ("RTX 3090", "A10")


@pytest.mark.parametrize(
    ("device", "memory", "words"),
    [
        ("cuda", None, "--vram 12GB"),
        ("a toaster", "8GB", "no data sheet"),
        (None, "much", "--vram"),
    ],
)
def test_a_target_that_is_not_known_is_told_in_a_sentence(device, memory, words):
    if torch.cuda.is_available() and device == "cuda":
        pytest.skip("this machine has one")
    with pytest.raises(InputError, match=words):
        target_of(device, memory, torch.float32, named=memory is not None)


def test_a_budget_in_the_config_is_kept_and_written_down_beside_what_was_measured(config):
    run = fit(
        load_config(
            config, ["train.max_steps=2", "plan.memory=2GB", "plan.probe=on", "lora.dropout=0"]
        ),
        listener=LogListener(),
    )
    plan, before = run.report["plan"], run.report["plan_before_probe"]
    assert plan["budget_bytes"] == 2 * 2**30 and plan["fits"]
    probe = plan["probe"]
    assert probe["estimated_bytes"] == pytest.approx(probe["measured_bytes"], rel=0.3)
    assert probe["estimated_saved_bytes"] == pytest.approx(probe["measured_saved_bytes"], rel=0.1)
    assert before["tokens_per_pass"] == plan["tokens_per_pass"]
    line = next(row for row in run.metrics() if "loss" in row)
    assert line["planned_bytes"] == plan["peak_bytes"] and line["memory_bytes"] > 0
    assert line["labelled_per_second"] < line["tokens_per_second"] == line["entered_per_second"]
    assert 0 < line["mfu"] <= line["hfu"]
    assert set(line["seconds_in"]) == {"data", "forward", "backward", "optimizer"}
    assert all(seconds > 0 for seconds in line["seconds_in"].values())


def test_a_run_beyond_all_memory_does_not_start_and_touches_nothing(config, tmp_path):
    with pytest.raises(WhetError, match="does not fit into the memory"):
        fit(load_config(config, ["plan.memory=1MB"]), listener=LogListener())
    assert not (tmp_path / "runs").exists()


def test_the_command_shows_a_plan_without_weights(tiny_model, tmp_path, rows_file):
    """The folder has a config and a tokenizer, and no weights."""
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    file = tmp_path / "c.yaml"
    file.write_text(
        f"model: {{name: {bare}, dtype: float32}}\n"
        f"data: {{train: {rows_file}}}\ntrain: {{max_steps: 9}}\n"
    )
    shown = CliRunner().invoke(app, ["plan", str(file), "--device", "cpu"])
    assert shown.exit_code == 0, shown.output
    for words in ("saved tensors", "tokens a pass", "9 steps, estimated", "lora.rank 64 adds"):
        assert words in shown.output
    told = CliRunner().invoke(app, ["plan", str(file), "--vram", "8GB", "--json"])
    found = json.loads(told.stdout)
    assert found["device"] == "cuda" and found["fits"] and found["longest_example"] < 100
    small = CliRunner().invoke(app, ["plan", str(file), "--vram", "600MB"])
    assert small.exit_code == 1 and "Does not fit" in small.output


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("rows*.jsonl", "steps, estimated"),  # what a run takes, a plan takes: globs, #N, the Hub
        ("rows.jsonl#5", "steps, estimated"),
        ("", "steps, estimated"),
        ("org/rows-1.5:test", "the data is not here"),
        ("rowz.jsonl", "does not exist"),
        ("rowz*.jsonl", "matches no file"),
    ],
)
def test_the_command_takes_the_sources_that_a_run_takes(
    tiny_model, tmp_path, rows_file, monkeypatch, named, words
):
    import shutil

    shutil.copyfile(rows_file, tmp_path / "rows.jsonl")
    file = tmp_path / "c.yaml"
    file.write_text(
        f"model: {{name: {tiny_model}, dtype: float32}}\ndata: {{train: '{named}'}}\n"
        "train: {max_steps: 9}\n"
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    told = CliRunner().invoke(app, ["plan", str(file), "--device", "cpu"])
    assert words in told.output + str(told.exception)


def test_a_model_that_keeps_its_own_code_is_planned_roughly_and_trains(config):
    off = load_config(config, ["engine.enabled=false", "train.max_steps=2", "lora.dropout=0"])
    run = fit(off, listener=LogListener())
    assert any("rough estimate" in note for note in run.report["plan"]["notes"])
    assert run.report["plan"]["probe"]["measured_bytes"] > 0
