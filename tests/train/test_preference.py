"""Methods dpo, orpo and kto: their losses are trl's, a shared prompt changes nothing, runs learn."""

import copy
import json

import numpy as np
import pytest
import torch
from tests.engine.families import adapted, build, in_float64
from tests.train.test_recipe import Heard, losses

from whet.config_file import load_config
from whet.data.packing import Packing
from whet.data.pairs import make_judged, make_pair, mismatched, units_of
from whet.data.prepare import prepare
from whet.data.tokenize import IGNORED, Tokens, collate
from whet.engine import swap
from whet.engine.memory import Policy
from whet.engine.parity import judge
from whet.engine.passes import num_common, pack_pass, pack_shared
from whet.errors import InputError
from whet.model.load import load_model, load_tokenizer
from whet.model.lora import add_adapter
from whet.model.loss import label_log_probs
from whet.runs import RunFolder
from whet.train.preference import PreferenceTrainer
from whet.train.recipe import fit
from whet.train.trainer import StepSettings
from whet.trained import load_trained

WORDS = ["red", "blue", "green", "four", "seven", "nine", "oak", "elm", "ash", "a user", "a number"]


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def pairs(tmp_path):
    return write(tmp_path / "pairs.jsonl", [
        {"prompt": f"say {word}" + " again" * (n % 3), "chosen": word, "rejected": f"{word} not at all"}
        for n, word in enumerate(WORDS)
    ])  # fmt: skip


@pytest.fixture
def judged(tmp_path):
    return write(tmp_path / "judged.jsonl", [
        {"prompt": f"say {word}", "completion": word if good else f"no {word}", "label": good}
        for word in WORDS for good in (True, False)
    ])  # fmt: skip


@pytest.fixture
def make(config, pairs, judged):
    """Return the config of a method, changed by assignments."""

    def made(method, *assignments):
        return load_config(config, [
            f"method={method}", f"data.train={judged if method == 'kto' else pairs}",
            "data.heldout_fraction=0", "lora.dropout=0", "train.max_steps=6", *assignments,
        ])  # fmt: skip

    return made


def trainer_for(config, tokenizer, model, share=True):
    data = prepare(config.data, tokenizer, 256)
    rows = units_of(data.train, share)
    run = RunFolder(config.run.dir)
    settings = StepSettings(Packing(10_000, padded=not swap.takes_packed(model)))
    return PreferenceTrainer(model, tokenizer, config, run, rows, [], [], settings), rows


def with_random_adapter(model):
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def gradients(model):
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {n: g for n, g in grads.items() if ".ref." not in n}


def padded(documents, answers_only=True):
    """The batch that trl's collators make of the same rows."""
    from torch.nn.utils.rnn import pad_sequence

    ids = [torch.tensor(d.input_ids) for d in documents]
    masks = [torch.tensor(d.labels) != IGNORED for d in documents]
    return {
        "input_ids": pad_sequence(ids, True),
        "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], True),
        "completion_mask": pad_sequence([m.long() for m in masks], True),
    }


# What every trainer of trl's is made with; the rows it is made with are not used.
PLAIN = {
    "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True, "bf16": False,
    "gradient_checkpointing": False, "disable_tqdm": True, "save_strategy": "no",
}  # fmt: skip


def trl_loss(config, model, tokenizer, units, folder):
    """The loss and gradients of trl's own trainer on the same rows."""
    pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset

    preference, method = config.preference, config.method
    rows = {"prompt": ["red"] * 4, "chosen": [" blue"] * 4, "rejected": [" four"] * 4}
    tokenizer = copy.deepcopy(tokenizer)
    if method == "kto":
        from trl import KTOConfig as Arguments
        from trl import KTOTrainer as Trainer

        rows = {"prompt": rows["prompt"], "completion": rows["chosen"], "label": [True, False] * 2}
        more = {
            "desirable_weight": preference.desirable_weight,
            "undesirable_weight": preference.undesirable_weight,
        }
    elif method == "orpo":
        from trl.experimental.orpo import ORPOConfig as Arguments
        from trl.experimental.orpo import ORPOTrainer as Trainer

        more = {}
    else:
        from trl import DPOConfig as Arguments
        from trl import DPOTrainer as Trainer

        more = {"loss_type": preference.loss_type}
    arguments = Arguments(str(folder), beta=preference.beta, **PLAIN, **more)
    trainer = Trainer(
        model, args=arguments, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer
    )
    with_random_adapter_of_policy(trainer.model)
    trainer.model.train()
    if method == "orpo":
        batch = {}
        for number, side in enumerate(("chosen", "rejected")):
            part = padded([u.documents[number] for u in units])
            mask = part.pop("completion_mask") == 1
            batch[f"{side}_labels"] = part["input_ids"].masked_fill(~mask, IGNORED)
            batch |= {f"{side}_{key}": value for key, value in part.items()}
        loss = trainer.get_batch_loss_metrics(trainer.model, batch)[0]
    elif method == "kto":
        wrong = padded([u.documents[0] for u in mismatched(units, 256)])
        batch = padded([u.documents[0] for u in units])
        batch |= {f"KL_{key}": value for key, value in wrong.items()}
        batch["label"] = torch.tensor([u.desirable for u in units])
        loss = trainer._compute_loss(trainer.model, batch, False)
    else:
        documents = [u.documents[n] for n in (0, 1) for u in units]
        loss = trainer._compute_loss(trainer.model, padded(documents), False)
    loss.backward()
    return loss.detach(), gradients(trainer.model)


def with_random_adapter_of_policy(model):
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B.default" in name:
            torch.nn.init.normal_(parameter, std=0.2)


@pytest.mark.parametrize("engine", [True, False], ids=["engine", "plain"])
@pytest.mark.parametrize(
    "settings",
    [
        ["dpo"], ["dpo", "preference.loss_type=ipo"], ["dpo", "preference.loss_type=hinge"],
        ["dpo", "preference.reference=start"], ["orpo"], ["kto"],
        ["kto", "preference.beta=0.5", "preference.undesirable_weight=0.4"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_the_first_step_has_the_loss_and_gradients_of_trls_trainer(
    make, tmp_path, settings, engine
):
    config = make(*settings)
    tokenizer = load_tokenizer(config.model)
    torch.manual_seed(5)
    base = load_model(config.model, torch.float32)
    model = add_adapter(base, config.lora, config.model)
    other = copy.deepcopy(model)
    trainer, rows = trainer_for(config, tokenizer, model)  # takes the reference, before any step
    with_random_adapter(model)
    units = [rows[i] for i in (3, 0, 6, 9)]
    if engine:
        swap.attach(model)
        trainer.packing = Packing(60)  # several passes
    loss = trainer.training_step(model, units)
    theirs, their_grads = trl_loss(config, other, tokenizer, units, tmp_path / "trl")
    assert float(loss) == pytest.approx(float(theirs), rel=1e-5)
    ours = gradients(model)
    assert ours.keys() == their_grads.keys() and any(g.abs().max() > 1e-4 for g in ours.values())
    for name, grad in ours.items():
        scale = float(their_grads[name].abs().max())
        assert torch.allclose(grad, their_grads[name], rtol=1e-4, atol=1e-4 * scale), name


def two_answers():
    """Pairs that share a prompt of odd length, the start of an answer too, or nothing."""
    dice = np.random.default_rng(0)

    def ids(num):
        return dice.integers(1, 300, num).tolist()

    def tokens(prompt, answer):
        return Tokens(prompt + answer, [IGNORED] * len(prompt) + answer, "")

    prompts, start = [ids(17), ids(5), ids(1)], ids(3)
    found = [(tokens(p, ids(7)), tokens(p, ids(4))) for p in prompts]
    found.append((tokens(prompts[0], start + ids(2)), tokens(prompts[0], start + ids(6))))
    found.append((tokens(ids(6), ids(3)), tokens([299, *ids(6)], ids(3))))
    return found


def scored(model, *batches):
    model.zero_grad()
    values = torch.cat([label_log_probs(model, batch) for batch in batches])
    (values * torch.linspace(0.5, 1.5, len(values))).sum().backward()
    return values.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("policy", ["keep", "recompute", "offload"])
@pytest.mark.parametrize("name", ["llama3", "gemma2", "gpt2", "mixtral", "deepseek_v3"])
def test_a_shared_prompt_changes_neither_scores_nor_gradients(name, policy):
    if policy != "keep" and name in ("gpt2", "mixtral", "deepseek_v3"):
        pytest.skip("the policies are tried on two families")
    model = adapted(build(name)).train()
    swap.attach(model)
    assert swap.takes_packed(model)
    middle = {"recompute": "recompute"}.get(policy, "keep")
    kept = "offload" if policy == "offload" else "keep"
    layers = swap.decoder_layers(swap.models.decoder_of(swap.base_of(model)))
    swap.set_policies(model, [Policy(kept, middle, kept, middle)] * len(layers))
    pairs = two_answers()
    documents = [[(t.input_ids, t.labels) for t in pair] for pair in pairs]
    flat = [document for pair in documents for document in pair]
    shared, alone = pack_shared(documents, 0, 3), pack_pass(flat, 0, 3)
    saved = sum(num_common([a.input_ids, b.input_ids]) for a, b in pairs)
    assert alone.num_tokens - shared.num_tokens == saved == 17 + 5 + 1 + 20
    assert shared.num_labels == alone.num_labels
    ours, grads = scored(model, shared)
    theirs, others = scored(model, alone)
    tokens = [document for pair in pairs for document in pair]
    truth, exact = scored(in_float64(model), *(collate([one], 0) for one in tokens))
    assert judge("scores", ours, theirs, truth).passed
    assert grads.keys() == others.keys()
    for key, grad in grads.items():
        assert judge(key, grad, others[key], exact[key]).passed, key


def test_documents_that_share_nothing_are_packed_as_ever():
    documents = [[([1, 2, 3], [IGNORED, 2, 3])], [([4, 5], [IGNORED, 5])]]
    made, plain = (
        pack_shared(documents, 0, 2),
        pack_pass([d for group in documents for d in group], 0, 2),
    )
    assert (
        made.places is None and torch.equal(made.flat, plain.flat) and made.lengths == plain.lengths
    )


def test_a_pair_enters_with_its_prompt_once_and_compares_the_last_answers():
    prompt, labels = (
        [7, 8, 1, 9, 3],
        [IGNORED, IGNORED, 1, IGNORED, IGNORED],
    )  # with an earlier answer
    chosen = Tokens([*prompt, 4, 5], [*labels, 4, 5], "rows:1")
    rejected = Tokens([*prompt, 4, 6, 2], [*labels, 4, 6, 2], "rows:1")
    pair = make_pair(chosen, rejected)
    assert pair.input_ids == [*prompt, 4, 5, 6, 2]
    first, second = pair.documents
    assert first.labels == [IGNORED] * 5 + [4, 5] and second.labels == [IGNORED] * 5 + [4, 6, 2]
    assert pair.num_labels == 4  # the 4 that both begin with is one token
    apart = make_pair(chosen, rejected, share=False)
    assert apart.input_ids == chosen.input_ids + rejected.input_ids and apart.num_labels == 5
    one = make_judged(chosen)
    assert one.documents[0].labels == [IGNORED] * 5 + [4, 5]


def test_pairs_with_one_answer_left_are_left_out(make, tmp_path):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3
    rows.append({"prompt": "say " * 3, "chosen": "b", "rejected": "a user " * 90})
    long = {"prompt": "say " * 90, "chosen": "b", "rejected": "c"}  # neither answer is left
    config = make("dpo", f"data.train={write(tmp_path / 'p.jsonl', [*rows, long])}")
    config.data.allow = ["masked", "truncated"]
    data = prepare(config.data, load_tokenizer(config.model), 64)
    assert len(data.train) == 8 and len(units_of(data.train)) == 4
    doubled = config.data.model_copy(update={"weights": [2.0]})
    assert len(units_of(prepare(doubled, load_tokenizer(config.model), 64).train)) == 8


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("dpo", []), ("dpo", ["engine.enabled=false"]), ("dpo", ["pack.enabled=false"]),
        ("dpo", ["train.parameters=full", "train.learning_rate=1e-3"]),
        ("dpo", ["model.load_in_4bit=true", "preference.loss_type=ipo"]), ("dpo", ["lora.init=pissa"]),
        ("orpo", []), ("orpo", ["preference.nll_on=answer"]),
        ("kto", ["train.parameters=last_layers", "train.last_layers=1"]),
    ],
    ids=str,
)  # fmt: skip
def test_a_run_prefers_the_chosen_answers(make, method, more):
    config = make(method, "train.max_steps=12", "data.heldout_fraction=0.2", "eval.steps=6", *more)
    run = fit(config, listener=Heard())
    rows = [row for row in run.metrics() if "loss" in row]
    assert rows[-1]["loss"] < rows[0]["loss"]
    heldout = [row for row in run.metrics() if "heldout_loss" in row]
    assert len(heldout) == 3 and all("heldout_rewards/margins" in row for row in heldout)
    assert run.report["preference"]["eval_loss"] == heldout[-1]["heldout_loss"]
    if method != "orpo":
        assert rows[-1]["rewards/margins"] > rows[0]["rewards/margins"]
        assert rows[0]["rewards/margins"] == pytest.approx(
            0, abs=1e-4
        )  # it starts at its reference
    else:
        assert rows[0]["loss"] > rows[0]["nll_loss"] > 0
    evaluation = run.report["evaluation"]
    assert evaluation["tuned"]["num_tokens"] == evaluation["base"]["num_tokens"]
    assert "not at all" not in json.dumps([s["reference"] for s in evaluation["base_samples"]])


def test_passes_and_sharing_do_not_change_the_numbers(make):
    """Of a whole step with prompts once, or of a pair with them twice: the same, to rounding."""
    for method in ("orpo", "kto"):
        found = []
        for more in ("plan.tokens_per_pass=900", "plan.tokens_per_pass=1"):
            sharing = ["preference.share_prompts=false"] if found else []
            name = f"run.name=r{len(found)}"
            run = fit(make(method, name, "train.max_steps=3", more, *sharing), listener=Heard())
            found.append(run.metrics())
        for one, two in zip(*found, strict=True):
            for key in ("loss", "grad_norm", "rewards/margins"):
                assert two[key] == pytest.approx(one[key], rel=5e-5, abs=1e-6), (method, key)


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_resumed_run_has_the_same_losses(make, method):
    from whet.errors import Interrupted

    # Trained weights are their own reference as they were before the checkpoint.
    more = ["train.parameters=last_layers", "train.last_layers=1", "train.checkpoint_steps=2"]
    whole = losses(fit(make(method, "run.name=whole", *more), listener=Heard()))
    config = make(method, "run.name=cut", *more)
    import os
    import signal

    with pytest.raises(Interrupted):
        fit(config, listener=Heard({3: lambda: os.kill(os.getpid(), signal.SIGINT)}))
    assert losses(fit(config, resume=True, listener=Heard())) == whole


def test_a_run_of_pairs_is_loaded_and_evaluated_as_any(make):
    from whet.evaluate import compare

    run = fit(make("dpo", "data.heldout_fraction=0.3"), listener=Heard())
    again = compare(load_trained(str(run.path)))
    assert again.tuned.loss == pytest.approx(run.report["evaluation"]["tuned"]["loss"], rel=1e-4)


def test_pretrain_learns_plain_text_and_nothing_else(make, tmp_path):
    text = write(tmp_path / "t.jsonl", [{"text": f"the assistant answers {w}"} for w in WORDS])
    config = make("pretrain", f"data.train={text}")
    found = losses(fit(config, listener=Heard()))
    assert list(found.values())[-1] < found[1]
    with pytest.raises(
        InputError, match="method 'pretrain' does not learn from; give rows with plain"
    ):
        fit(make("pretrain"), listener=Heard())


def test_rows_of_another_kind_stop_the_run_with_the_method_for_them(make, rows_file, pairs, judged):
    for method, file, words in (
        ("dpo", rows_file, "set method: sft"), ("dpo", judged, "set method: kto"),
        ("kto", pairs, "set method: dpo"), ("sft", judged, "set method: kto"),
        ("sft", pairs, "set method: dpo"), ("reward", judged, "pairs of answers"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            fit(make(method, f"data.train={file}"), listener=Heard())


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (["method=dpo", "data.loss_on=all"], "leave data.loss_on at assistant"),
        (["method=dpo", "pack.split=true"], "pack.split: false"),
        (["method=dpo", "preference.reference=adapter_off", "train.parameters=full"], "to start"),
        (["preference.label_smoothing=0.1", "preference.loss_type=ipo"], "loss_type sigmoid"),
        (["method=grpo"], "grpo.reward: file.py:function"),
        (["method=kto", "train.batch_size=1"], "train.batch_size: 2"),
    ],
)
def test_settings_that_cannot_both_hold_are_told(config, assignments, words):
    with pytest.raises(InputError, match=words):
        load_config(config, assignments)
