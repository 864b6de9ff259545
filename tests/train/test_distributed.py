"""Two processes on a CPU (gloo): the same losses as one, whatever shares the work."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from whet.config_file import load_config
from whet.data.packing import StepSampler, fair_shares
from whet.runs import RunFolder
from whet.train.recipe import LogListener, fit

SEVERAL = Path(__file__).with_name("several.py")
# With noise, which must be the same whoever computes an example, and groups of their own for embeddings.
FULL = {
    "train.parameters": "full", "train.learning_rate": 1e-3, "train.neftune_alpha": 5.0,
    "train.embedding_learning_rate": 2e-4,
}  # fmt: skip
# Runs by name: what each changes, and what befalls it.
NF4 = {"model.load_in_4bit": True}
SINGLE = {"lora": {}, "full": FULL, "rows": {"train.batch_size": 1}, "nf4": NF4}


def test_shares_are_fair_and_complete():
    costs = [90, 10, 20, 80, 5, 60, 60, 30]
    for num in (1, 2, 3, 4):
        shares = fair_shares(costs, num)
        assert sorted(i for share in shares for i in share) == list(range(len(costs)))
        loads = [sum(costs[i] for i in share) for share in shares]
        assert max(loads) - min(loads) <= max(costs)
    assert fair_shares([7], 3) == [[0], [], []]


def test_any_number_of_processes_draws_the_same_global_steps():
    lengths = [3, 9, 4, 4, 12, 7, 5, 8, 6, 2, 11]
    for batch in ({"batch_size": 4}, {"batch_size": 1, "batch_tokens": 20}):
        alone = [sorted(rows) for rows in StepSampler(lengths, seed=1, **batch)]
        for num in (2, 4):
            parts = [
                list(StepSampler(lengths, seed=1, shares=num, share=n, **batch)) for n in range(num)
            ]
            assert [sorted(sum(rows, [])) for rows in zip(*parts, strict=True)] == alone


def settings(config, name, changes):
    """A config of a run of six steps, in several passes each, without dropout."""
    base = {
        "run.name": name, "lora.dropout": 0.0, "train.max_steps": 6, "train.checkpoint_steps": 3,
        "plan.tokens_per_pass": 40, "plan.probe": "off", "eval.exact_match": False, "eval.samples": 1,
        "eval.max_new_tokens": 2,
    }  # fmt: skip
    assigned = [f"{key}={value}" for key, value in {**base, **changes}.items()]
    return load_config(config, assigned)


def start(folder, jobs, nproc=2):
    """Run jobs in processes that torchrun starts, and return what each said."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc),
        str(SEVERAL), str(file),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    # DeepSpeed compiles its way of talking on a CPU when it is first used: once, not in each test run.
    built = Path.home() / ".cache" / "torch_extensions"
    environment.setdefault("TORCH_EXTENSIONS_DIR", str(built))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert not done.returncode, done.stderr[-4000:]
    return {job["name"]: json.loads((folder / f"{job['name']}.json").read_text()) for job in jobs}


@pytest.fixture(scope="module")
def base_config(tiny_model, rows_file, tmp_path_factory):
    return {
        "run": {"dir": str(tmp_path_factory.mktemp("several") / "runs")},
        "model": {"name": str(tiny_model), "dtype": "float32"},
        "lora": {"rank": 4, "alpha": 8},
        "data": {"train": str(rows_file), "heldout_fraction": 0.2},
        "train": {"batch_size": 4, "learning_rate": 5e-3, "warmup_steps": 2},
    }


@pytest.fixture(scope="module")
def single(tiny_model, tmp_path_factory):
    """What each run of one process changes, by its name."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(1)
    # Heads and a vocabulary that four processes can share.
    shape = AutoConfig.from_pretrained(tiny_model, num_key_value_heads=4, vocab_size=304)
    folder = tmp_path_factory.mktemp("models") / "wide"
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return {**SINGLE, "wide": {**FULL, "model.name": str(folder)}}


@pytest.fixture(scope="module")
def alone(base_config, single):
    """The runs of one process."""
    from whet.train import callbacks, recipe

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "plot_loss", lambda run: None)
        patch.setattr(callbacks, "forget_peak_memory", lambda: 0)
        return {
            name: fit(settings(base_config, f"alone-{name}", changes), listener=LogListener())
            for name, changes in single.items()
        }


@pytest.fixture(scope="module")
def together(base_config, single, tmp_path_factory):
    """The runs of two processes, one after another in one group."""

    def job(name, changes, **more):
        return {"name": name, "config": settings(base_config, name, changes).model_dump(), **more}

    def last(name):
        return f"{base_config['run']['dir']}/{name}/checkpoints/step-6"

    jobs = [
        job("ddp-lora", {"parallel.strategy": "ddp"}),
        job("ddp-full", {**FULL, "parallel.strategy": "ddp"}),
        job("ddp-rows", {"train.batch_size": 1}),
        job("ddp-memory", {"plan.tokens_per_pass": 400}, out_of_memory=[1, 0]),
        job("ddp-nf4", {**NF4, "parallel.strategy": "ddp"}),
        job("fsdp-lora", {"parallel.strategy": "fsdp"}),
        job("fsdp-nf4", {**NF4, "parallel.strategy": "fsdp"}),
        job("fsdp-full", {**FULL, "parallel.strategy": "fsdp"}),
        job("tp-wide", {**single["wide"], "parallel.strategy": "tp"}),
        # A run of DDP that goes on spread over the processes.
        job("half", {**FULL, "parallel.strategy": "ddp"}),
        job("half", {**FULL, "parallel.strategy": "fsdp"}, resume=True, forget=last("half")),
        job("again", {"parallel.strategy": "ddp"}),
        job("again", {"parallel.strategy": "ddp"}, resume=True, forget=last("again")),
    ]
    return start(tmp_path_factory.mktemp("jobs"), jobs)


@pytest.fixture(scope="module")
def deepspeed(base_config, tmp_path_factory):
    """The runs of two processes with DeepSpeed, which needs a group of its own."""
    pytest.importorskip("deepspeed", reason="pip install 'whet[deepspeed]'")

    def job(name, changes, **more):
        changes = {"parallel.strategy": "deepspeed", **changes}
        return {"name": name, "config": settings(base_config, name, changes).model_dump(), **more}

    def last(name):
        return f"{base_config['run']['dir']}/{name}/checkpoints/step-6"

    jobs = [
        job("zero2-lora", {}),
        job("zero2-full", FULL),
        job("zero3-lora", {"parallel.zero_stage": 3}),
        job("zero3-full", {**FULL, "parallel.zero_stage": 3}),
        job("zero-half", FULL),
        job("zero-half", {**FULL, "parallel.zero_stage": 3}, resume=True, forget=last("zero-half")),
    ]
    return start(tmp_path_factory.mktemp("jobs"), jobs)


@pytest.fixture(scope="module")
def four(base_config, together, single, tmp_path_factory):
    """The runs of four processes, among them one that goes on with what two have saved."""
    runs = Path(base_config["run"]["dir"])
    shutil.copytree(runs / "ddp-full", runs / "two-then-four")
    shutil.rmtree(runs / "two-then-four/checkpoints/step-6")

    def job(name, changes, **more):
        return {"name": name, "config": settings(base_config, name, changes).model_dump(), **more}

    jobs = [
        job("ddp-4", {"parallel.strategy": "ddp"}),
        job("tp-4", {**single["wide"], "parallel.strategy": "tp"}),
        job("two-then-four", {**FULL, "parallel.strategy": "fsdp"}, resume=True),
    ]
    return start(tmp_path_factory.mktemp("jobs"), jobs, nproc=4)


@pytest.mark.slow
def test_losses_of_four_processes_are_those_of_one(alone, four):
    for name, like in (("ddp-4", "lora"), ("tp-4", "wide")):
        assert four[name]["losses"] == pytest.approx(losses(alone[like]), abs=1e-5)
        assert four[name]["report"]["processes"] == 4


@pytest.mark.slow
def test_four_processes_go_on_with_what_two_have_saved(alone, four):
    assert four["two-then-four"]["losses"] == pytest.approx(losses(alone["full"]), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_losses_of_four_processes_with_deepspeed_are_those_of_one(
    alone, base_config, tmp_path, stage
):
    pytest.importorskip("deepspeed", reason="pip install 'whet[deepspeed]'")
    changes = {**FULL, "parallel.strategy": "deepspeed", "parallel.zero_stage": stage}
    config = settings(base_config, f"zero{stage}-4", changes).model_dump()
    found = start(tmp_path, [{"name": "run", "config": config}], nproc=4)
    assert found["run"]["losses"] == pytest.approx(losses(alone["full"]), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2-lora", "zero2-full", "zero3-lora", "zero3-full"])
def test_losses_with_deepspeed_are_those_of_one_process(alone, deepspeed, name):
    like = alone[name.partition("-")[2]]
    assert deepspeed[name]["losses"] == pytest.approx(losses(like), abs=1e-5)
    assert deepspeed[name]["norms"] == pytest.approx(norms(like), rel=1e-4)
    engine = deepspeed[name]["report"]["engine"]
    if name.startswith("zero3"):
        assert "takes the weights away" in engine["stands_aside"]
    else:
        assert engine["layers_fused"] == 2


@pytest.mark.slow
def test_stage_3_goes_on_with_a_checkpoint_of_stage_2(alone, deepspeed):
    assert deepspeed["zero-half"]["losses"] == pytest.approx(losses(alone["full"]), abs=1e-5)


def losses(run):
    return [row["loss"] for row in run.metrics() if "loss" in row]


def norms(run):
    return [row["grad_norm"] for row in run.metrics() if "loss" in row]


@pytest.mark.parametrize(
    ("name", "like"),
    [
        ("ddp-lora", "lora"),
        ("ddp-full", "full"),
        ("ddp-rows", "rows"),  # fewer rows than processes: one of them has none
        ("fsdp-lora", "lora"),
        ("fsdp-full", "full"),
        ("tp-wide", "wide"),
        ("ddp-nf4", "nf4"),
        ("fsdp-nf4", "nf4"),
    ],
)
def test_losses_of_two_processes_are_those_of_one(alone, together, name, like):
    assert together[name]["losses"] == pytest.approx(losses(alone[like]), abs=1e-5)
    assert together[name]["norms"] == pytest.approx(norms(alone[like]), rel=1e-4)


def test_the_tuned_model_of_two_processes_measures_as_that_of_one(alone, together):
    for name in ("ddp-full", "fsdp-full", "tp-wide"):
        found = together[name]["report"]["evaluation"]
        like = alone[name.partition("-")[2]].report["evaluation"]
        for part in ("base", "tuned"):
            assert found[part]["loss"] == pytest.approx(like[part]["loss"], abs=1e-5)


def test_memory_that_runs_out_in_one_process_has_both_step_again(alone, together):
    run = together["ddp-memory"]
    assert run["losses"] == pytest.approx(losses(alone["lora"]), abs=1e-5)
    (event,) = run["events"]
    assert event["ranks"] == [1] and event["step"] == 3
    assert "process 1" in run["notes"][-1] or any("process 1" in note for note in run["notes"])


def test_a_run_of_two_processes_goes_on_as_it_would_have(alone, together):
    assert together["half"]["losses"] == pytest.approx(losses(alone["full"]), abs=1e-5)
    assert together["again"]["losses"] == pytest.approx(losses(alone["lora"]), abs=1e-5)


def test_only_the_first_process_writes_reports_and_each_its_own_figures(alone, together):
    folder = alone["lora"].path.with_name("ddp-lora")
    assert together["ddp-lora"]["report"]["processes"] == 2
    seen = [json.loads(x) for x in (folder / "ranks/rank-1.jsonl").read_text().splitlines()]
    assert [row["step"] for row in seen] == [1, 2, 3, 4, 5, 6]
    own = [
        sum(json.loads(x)["tokens"] for x in (folder / f"ranks/rank-{rank}.jsonl").open())
        for rank in (0, 1)
    ]
    metrics = RunFolder(folder).metrics()
    assert sum(own) == metrics[-1]["tokens_seen"]
    assert max(own) < 1.2 * min(own)  # passes of equal cost


def test_four_bit_weights_are_spread_too(together):
    here, whole = together["fsdp-nf4"]["cut"]["quantised"]
    assert whole > 0 and here * 2 == whole
    here, whole = together["fsdp-full"]["cut"]["float"]
    assert here * 2 == whole


@pytest.mark.parametrize("name", ["ddp-lora", "fsdp-lora", "fsdp-full", "tp-wide"])
def test_one_process_goes_on_with_a_checkpoint_of_two(
    alone, together, single, base_config, name, quick
):
    """Its folder is the one that a single process would have written."""
    like = name.partition("-")[2]
    assert together[name]["losses"]
    folder = alone[like].path.with_name(name)
    alone_files = sorted(f.name for f in (alone[like].path / "checkpoints/step-3").iterdir())
    found = sorted(f.name for f in (folder / "checkpoints/step-3").iterdir())
    assert [f for f in found if f != "rng_state_1.pth"] == [
        f for f in alone_files if f in found or f != "training_args.bin"
    ]
    shutil.rmtree(folder / "checkpoints/step-6")
    changes = {**single[like], "parallel.strategy": "auto"}
    run = fit(settings(base_config, name, changes), resume=True, listener=LogListener())
    assert losses(run) == pytest.approx(losses(alone[like]), abs=1e-5)


def test_the_engine_says_where_it_stands_aside(together):
    assert "cuts each matrix" in together["tp-wide"]["report"]["engine"]["stands_aside"]
    assert together["fsdp-full"]["report"]["engine"]["layers_fused"] == 2
