"""What a rank needs and sends: counted by hand, and equal to one process's plan where nothing is cut."""

import json

import pytest
import torch
from typer.testing import CliRunner

from whet.cli import app
from whet.config_file import load_config, to_yaml
from whet.errors import InputError
from whet.plan.parallel import (
    checkpoint_of,
    largest_that_fits,
    parse_strategy,
    plan_of_rank,
    plan_strategy,
    ranks_of,
    simplest_of,
    strategies,
    why_not,
)
from whet.plan.pieces import ZERO_BUCKET, Piece, Pieces, Strategy, rank_static
from whet.plan.plan import make_plan, workload_of
from whet.plan.policy import Target
from whet.plan.speed import Speed
from whet.plan.traffic import Cluster, Transfer, exposed_seconds, transfers

SPEED = Speed("a card", 20e12, 400e9, 12e9, 0.5, measured=False)
LENGTHS = [(37 * n) % 200 + 20 for n in range(64)]
FULL = ("train.parameters=full",)


def ranks(config, num, *settings, nodes=1, budget=2**34, device="cuda"):
    config = load_config(config, ["train.batch_size=16", "lora.dropout=0", *settings])
    workload = workload_of(config, LENGTHS, sum(LENGTHS) // 2, 256)
    target = Target(device, "a card", int(budget), 0, 2**34 if device == "cuda" else 0, SPEED)
    plan = make_plan(config, workload, target, torch.float32, advise=False)
    return ranks_of(config, plan, Cluster(num, nodes))


# Two layers of one 4 x 6 matrix that tensor parallel cuts and a norm of 4; a head and a table of 10 x 4.
BF16_LAYER = (
    Piece((4, 6), 2, "weights", True, cut=0),
    Piece((4,), 2, "weights", True),
)
OUTSIDE = (Piece((10, 4), 2, "table", True), Piece((10, 4), 2, "table", True))
TINY = Pieces(((BF16_LAYER, 2),), OUTSIDE, True, 2, 4, 2, 10)


def items_of(strategy, replicas, pieces=TINY):
    static = rank_static(pieces, strategy, replicas, "adamw_torch")
    return {item.name: item.num_bytes for item in static.items}


def test_ddp_by_hand():
    # 2 (24 + 4) + 80 numbers of 2 bytes; two moments of 2 bytes; gradients once more in the buckets
    assert items_of(Strategy("ddp"), 4) == {
        "weights": 112, "embeddings and head": 160, "gradients": 272, "gradients on their way": 272,
        "optimizer states": 544,
    }  # fmt: skip


def test_fsdp_by_hand():
    # Cut by rows: 4 x 6 in 4 is a row of 6, the norm is 1 number, 10 rows in 4 are 3 rows of 4.
    rows = 2 * (6 + 1) * 2
    tables = 2 * 12 * 2
    assert items_of(Strategy("fsdp"), 4) == {
        "weights": rows,
        "embeddings and head": tables,
        "gathered weights": 2 * 56 + 160,  # this layer, the next one, and what is outside of layers
        "gradients": rows + tables,
        "gradients on their way": 2 * 56 + 160,
        "optimizer states": 2 * (rows + tables),
    }


def test_zero_by_hand():
    # DeepSpeed steps a float32 copy: 4 bytes of weights and 8 of moments for each number of its part.
    part = 2 * (6 + 1) + 2 * 10
    two, three = items_of(Strategy("zero2"), 4), items_of(Strategy("zero3"), 4)
    assert two == {
        "weights": 112, "embeddings and head": 160, "gradients": 2 * part,
        "gradients on their way": 2 * ZERO_BUCKET, "master weights": 4 * part,
        "optimizer states": 8 * part,
    }  # fmt: skip
    assert three == {
        **two, "weights": 2 * 14, "embeddings and head": 2 * 20, "gathered weights": 272
    }  # fmt: skip


def test_tensor_parallel_by_hand():
    # The matrix is cut in 2, norms and tables without a plan are whole.
    assert items_of(Strategy("ddp", tensor=2), 1) == {
        "weights": 2 * (12 + 4) * 2, "embeddings and head": 160, "gradients": 64 + 160,
        "optimizer states": 2 * (64 + 160),
    }  # fmt: skip


def test_offload_moves_what_is_cut_to_the_host():
    static = rank_static(TINY, Strategy("zero3", offload=True), 4, "adamw_torch")
    host = {item.name for item in static.items if item.where == "host"}
    assert host == {
        "weights", "embeddings and head", "gradients", "master weights", "optimizer states"
    }  # fmt: skip
    static = rank_static(TINY, Strategy("zero2", offload=True), 4, "adamw_torch")
    host = {item.name for item in static.items if item.where == "host"}
    assert host == {"gradients", "master weights", "optimizer states"}


def sent(strategy, num, passes=1.0):
    return {t.name: t.num_bytes for t in transfers(TINY, strategy, num, passes, 100, 50)}


def test_what_is_sent_by_hand():
    trained = 272
    assert sent(Strategy("ddp"), 4) == {"gradients": 2 * 3 / 4 * trained}
    assert sent(Strategy("zero2"), 4) == {
        "gradients": 3 / 4 * trained, "new weights": 3 / 4 * trained
    }  # fmt: skip
    assert sent(Strategy("zero3"), 4) == {
        "weights": 2 * 3 / 4 * trained, "gradients": 3 / 4 * trained
    }  # fmt: skip
    # FSDP2 gathers what is outside of the layers once a pass.
    assert sent(Strategy("fsdp"), 4)["weights"] == 3 / 4 * (2 * 112 + 160)
    assert sent(Strategy("fsdp"), 1) == {}
    # 2 layers x 4 all-reduces, and one for the embeddings, of 100 tokens x 4 x 2 bytes.
    assert sent(Strategy("ddp", tensor=2), 2) == {
        "hidden states": 2 * 1 / 2 * 9 * 800, "logits": 1 / 2 * 50 * 10 * 2
    }  # fmt: skip


def test_zero_3_sends_half_as_much_again_as_ddp_and_more_passes_send_more():
    ddp, zero2, zero3 = (sum(sent(Strategy(k), 8).values()) for k in ("ddp", "zero2", "zero3"))
    assert zero2 == pytest.approx(ddp) and zero3 == pytest.approx(1.5 * ddp)
    assert sent(Strategy("ddp"), 8, passes=3) == sent(Strategy("ddp"), 8)
    assert sum(sent(Strategy("zero3"), 8, passes=3).values()) == pytest.approx(3 * zero3)


def test_a_ring_is_as_fast_as_its_slowest_link():
    cluster = Cluster(16, 2, 100.0, 10.0, 1.0, 0.5, 2.0)
    assert Transfer("x", 1000, 1, 7, 8).seconds(cluster) == 10 + 7 * 0.5
    # 16 ranks on two machines: of 15 messages one after the other 15/8 cross.
    assert Transfer("x", 1000, 1, 15, 16).seconds(cluster) == pytest.approx(
        100 + 15 / 8 * 2 + (15 - 15 / 8) * 0.5
    )
    # Ranks 0 and 8, with stride 8: every message crosses.
    assert Transfer("x", 1000, 1, 1, 2, 8).seconds(cluster) == 100 + 2


def test_what_waits_is_what_computing_does_not_hide():
    cluster = Cluster(4, 1, 100.0, 10.0, 1.0, 0.0, 0.0)
    found = [Transfer("gradients", 1000, 1, 3, 4)]
    assert exposed_seconds(found, Strategy("ddp"), cluster, 8.0, 2.0) == 10 - 2
    assert exposed_seconds(found, Strategy("fsdp"), cluster, 8.0, 2.0) == 10 - 8
    assert exposed_seconds(found, Strategy("fsdp"), cluster, 80.0, 2.0) == 0
    waits = [Transfer("hidden states", 1000, 1, 3, 4)]
    assert exposed_seconds(waits, Strategy("ddp", tensor=4), cluster, 80.0, 2.0) == 10


@pytest.mark.parametrize("settings", [(), FULL, ("model.load_in_4bit=true",)])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_one_rank_is_the_plan_for_one_process(config, settings, device):
    one = ranks(config, 1, *settings, device=device)
    [strategy] = strategies(one)
    found = plan_strategy(one, strategy)
    assert found.choice.peak_bytes == one.plan.choice.peak_bytes
    assert found.choice.step_seconds == one.plan.choice.step_seconds
    mine = {(i.name, i.num_bytes, i.where) for i in found.items}
    assert mine == {(i.name, i.num_bytes, i.where) for i in one.plan.items}
    assert found.sent_bytes == found.exposed_seconds == 0


@pytest.mark.parametrize("where", ["8bit", "cpu"])
def test_placed_embeddings_are_those_of_one_process(config, where):
    one = ranks(config, 1, f"plan.embeddings={where}")
    assert plan_strategy(one, Strategy("ddp")).items == one.plan.items


def test_zero_3_falls_as_one_over_the_ranks_plus_a_constant(config):
    def kept(num):
        one = ranks(config, num, *FULL)
        static = rank_static(one.pieces, Strategy("zero3"), num, "adamw_torch")
        return sum(
            i.num_bytes for i in static.items if i.name[:8] not in ("gathered", "gradients"[:8])
        )

    whole, constant = 2 * kept(2), kept(2) - kept(4)
    assert kept(4) == pytest.approx(whole / 4, rel=0.01) and constant > 0
    assert kept(8) == pytest.approx(whole / 8, rel=0.01)


def test_a_layer_more_is_a_model_with_a_layer_more(config, tiny_model, tmp_path):
    shape = json.loads((tiny_model / "config.json").read_text())
    shape["num_hidden_layers"] = 5
    if "layer_types" in shape:
        shape["layer_types"] = shape["layer_types"][:1] * 5
    (tmp_path / "config.json").write_text(json.dumps(shape))
    real = ranks(config, 4, f"model.name={tmp_path}", *FULL)
    deep = ranks(config, 4, *FULL).deepened(5)
    assert deep.pieces.num_parameters == real.pieces.num_parameters
    for strategy in strategies(real):
        one, two = plan_strategy(real, strategy), plan_strategy(deep, strategy)
        assert one.to_dict() == two.to_dict()


def test_the_largest_model_fits_and_one_layer_more_does_not(config):
    one = ranks(config, 4, *FULL, budget=4e6)
    for strategy in (Strategy("ddp"), Strategy("fsdp")):
        most = largest_that_fits(one, strategy)
        layers = [n for n in range(1, 200) if one.pieces.deepened(n).num_parameters == most]
        assert layers, strategy
        found = one.deepened(layers[0]), one.deepened(layers[0] + 1)
        lean = [
            r.chooser(strategy).evaluate(max(LENGTHS), r.chooser(strategy).least()) for r in found
        ]
        assert lean[0].peak_bytes <= 4e6 < lean[1].peak_bytes
    assert largest_that_fits(one, Strategy("fsdp")) > largest_that_fits(one, Strategy("ddp"))


def test_the_simplest_that_fits_is_taken_with_the_reason(config):
    roomy = ranks(config, 4, *FULL)
    candidates = [Strategy("ddp"), Strategy("fsdp")]
    strategy, plan, reason = plan_of_rank(roomy, candidates)
    assert strategy == Strategy("ddp") and reason.startswith("ddp needs")
    least = {
        s: min(
            roomy.chooser(s).evaluate(max(LENGTHS), roomy.chooser(s).least()).peak_bytes
            for _ in (0,)
        )
        for s in (Strategy("ddp"), Strategy("fsdp"))
    }
    assert least[Strategy("fsdp")] < least[Strategy("ddp")]
    tight = ranks(config, 4, *FULL, budget=sum(least.values()) / 2)
    strategy, plan, reason = plan_of_rank(tight, candidates)
    assert strategy == Strategy("fsdp") and "ddp would need" in reason
    assert plan.fits and plan.choice.peak_bytes <= tight.target.budget_bytes
    assert {i.name for i in plan.items} >= {"gathered weights", "optimizer states"}
    none = ranks(config, 4, *FULL, budget=1e5)
    strategy, plan, reason = plan_of_rank(none, candidates)
    assert strategy == candidates[-1] and not plan.fits and reason.startswith("nothing fits")
    assert plan.changes
    with pytest.raises(InputError, match="'tp 4': 2 key and value heads"):
        plan_of_rank(ranks(config, 4), [Strategy("ddp", tensor=4)])
    with pytest.raises(InputError, match="adapters stand beside whole ones"):
        plan_of_rank(ranks(config, 2), [Strategy("ddp", tensor=2)])


def test_processes_of_a_machine_share_its_ram_and_not_their_gpus():
    cpu = Target("cpu", "a cpu", 1000, 200, 0, SPEED).shared_by(4)
    assert (cpu.budget_bytes, cpu.reserve_bytes) == (400, 200)
    card = Target("cuda", "a card", 1000, 200, 800, SPEED)
    assert card.shared_by(4) == card


def test_what_cannot_be_used_says_why(config):
    nf4 = ranks(config, 4, "model.load_in_4bit=true")
    assert why_not(nf4, Strategy("ddp")) == why_not(nf4, Strategy("fsdp")) == ""
    assert "4-bit" in why_not(nf4, Strategy("zero3"))
    eight = ranks(config, 4, "train.optimizer=adamw_8bit")
    assert "whole tensors" in why_not(eight, Strategy("fsdp"))
    assert why_not(ranks(config, 4), Strategy("ddp", tensor=4)).endswith("cannot be cut in 4")
    with pytest.raises(InputError, match="cannot be cut"):
        plan_strategy(ranks(config, 4), Strategy("ddp", tensor=4))
    with pytest.raises(InputError, match="evenly"):
        ranks(config, 3, nodes=2)


def test_strategies_are_read_as_people_write_them(config):
    one = ranks(config, 8)
    assert parse_strategy("zero3+offload", one) == Strategy("zero3", True)
    assert parse_strategy("tp 2 x fsdp", one) == Strategy("fsdp", tensor=2)
    assert parse_strategy("tp", one) == Strategy("ddp", tensor=8)
    for text in ("zero4", "tp2xtp2", "ddp+offload", "tp0"):
        with pytest.raises(InputError, match="there is no strategy"):
            parse_strategy(text, one)


def test_a_checkpoint_is_what_is_trained_and_its_moments(config):
    one = ranks(config, 8, *FULL)
    assert checkpoint_of(one).num_bytes == 3 * 4 * one.pieces.num_parameters
    plans = [plan_strategy(one, s) for s in strategies(one)]
    assert simplest_of(one, plans)[0] is plans[0]


def test_the_command_shows_a_table_and_json(config, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    words = ["plan", str(file), "--ranks", "4", "--nodes", "2", "--device", "RTX 4090"]
    done = CliRunner().invoke(app, [*words, "--json", "--host-memory", "64GB"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout[done.stdout.index("{") :])
    names = [plan["strategy"] for plan in found["strategies"]]
    assert names[:2] == ["ddp", "fsdp"] and "tp 2 x fsdp" in names
    assert found["simplest"] == "ddp" and found["cluster"]["num_nodes"] == 2
    done = CliRunner().invoke(app, [*words, "--strategy", "fsdp"])
    assert done.exit_code == 0 and "Simplest that fits: fsdp" in done.output
    done = CliRunner().invoke(app, [*words, "--strategy", "zero9"])
    assert "there is no strategy 'zero9'" in str(done.exception)
