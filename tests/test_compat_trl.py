"""whet.SFTTrainer beside trl's own: old and new arguments, the same losses, packing, import order."""

import subprocess
import sys
import textwrap

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed")

from datasets import Dataset  # noqa: E402
from transformers import TrainingArguments  # noqa: E402

import whet  # noqa: E402
from whet import FastLanguageModel, InputError, SFTTrainer, train_on_responses_only  # noqa: E402
from whet.engine import swap  # noqa: E402
from whet.plan.memory import LEAST  # noqa: E402

SETTINGS = {
    "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
    "use_cpu": True, "disable_tqdm": True, "seed": 3,
}  # fmt: skip
WORDS = ["turn red", "into a colour", "four", "a number and a user", "the assistant answers"]


@pytest.fixture
def rows():
    return Dataset.from_dict({"text": [f"{a} {b}" for a in WORDS for b in WORDS]})


def make(tiny_model, adapted=True, **more):
    settings = {"load_in_4bit": False, "dtype": "float32", "use_gradient_checkpointing": False}
    model, tokenizer = FastLanguageModel.from_pretrained(str(tiny_model), **{**settings, **more})
    if adapted:
        model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False)
    return model, tokenizer


def plain(tiny_model):
    """The same adapted model without whet."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    torch.manual_seed(3407)
    settings = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, settings)


def losses(trainer):
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs) == 2
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("more", [
    {"max_length": 24}, {"max_length": None, "padding_free": True},
    {"max_length": 24, "packing": True}, {"max_length": 24, "gradient_checkpointing": True},
], ids=str)  # fmt: skip
def test_two_steps_have_the_losses_of_plain_trl(tiny_model, rows, tmp_path, more):
    import trl

    base = {**SETTINGS, "output_dir": str(tmp_path), "bf16": False}
    model, tokenizer = make(tiny_model)
    trainer = SFTTrainer(
        model=model, tokenizer=tokenizer, train_dataset=rows, args=whet.SFTConfig(**base, **more)
    )
    ours = losses(trainer)
    theirs = trl.SFTTrainer(
        plain(tiny_model), trl.SFTConfig(**base, **more), train_dataset=rows,
        processing_class=tokenizer,
    )  # fmt: skip
    assert_same(ours, losses(theirs))
    assert not swap.met(trainer.model)["notes"], "every batch went through the engine"


def test_a_batch_of_every_form_goes_through_the_engines_layers(tiny_model, rows, tmp_path):
    from unittest import mock

    for more in ({}, {"padding_free": True}, {"packing": True, "max_seq_length": 24}):
        model, tokenizer = make(tiny_model)
        trainer = SFTTrainer(
            model=model, tokenizer=tokenizer, train_dataset=rows,
            args=TrainingArguments(str(tmp_path), **SETTINGS), **more,
        )  # fmt: skip
        with mock.patch("whet.engine.model.packed_layer") as layer:
            from whet.engine import layer as original

            layer.side_effect = original.packed_layer
            trainer.train()
        assert layer.call_count == 2 * 2 * 2, more  # steps, batches and layers


def test_the_old_script_runs_with_old_names(tiny_model, rows, tmp_path):
    model, tokenizer = make(tiny_model, load_in_4bit=True, max_seq_length=64)
    before = TrainingArguments(
        str(tmp_path), optim="adamw_8bit", lr_scheduler_type="linear", weight_decay=0.01,
        fp16=not whet.is_bfloat16_supported(), bf16=whet.is_bfloat16_supported(),
        **{k: v for k, v in SETTINGS.items() if k != "use_cpu"},
    )  # fmt: skip
    kept = before.to_dict()
    trainer = SFTTrainer(
        model=model, tokenizer=tokenizer, train_dataset=rows, dataset_text_field="text",
        max_seq_length=16, dataset_num_proc=1, packing=False, neftune_noise_alpha=5, args=before,
    )  # fmt: skip
    assert trainer.args.max_length == 16 and trainer.args.neftune_noise_alpha == 5
    assert before.to_dict() == kept, "what was given stays as it was"
    assert trainer.processing_class is tokenizer
    found = losses(trainer)
    assert len(found) == 2 and all(line["loss"] > 0 for line in found)
    trainer.model.save_pretrained(str(tmp_path / "lora"))
    assert (tmp_path / "lora" / "adapter_config.json").is_file()


def test_the_longest_text_is_the_models_when_nobody_says(tiny_model, rows, tmp_path):
    model, tokenizer = make(tiny_model, max_seq_length=48)
    args = TrainingArguments(str(tmp_path), **SETTINGS)
    trainer = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=rows, args=args)
    assert trainer.args.max_length == 48


def test_unknown_arguments_and_two_names_for_one_are_errors(tiny_model, rows, tmp_path):
    model, tokenizer = make(tiny_model, adapted=False)
    args = TrainingArguments(str(tmp_path), **SETTINGS)
    call = {"model": model, "train_dataset": rows, "args": args}
    with pytest.raises(InputError, match="max_seq_lengt.*did you mean"):
        SFTTrainer(**call, tokenizer=tokenizer, max_seq_lengt=7)
    with pytest.raises(InputError, match="earlier name"):
        SFTTrainer(**call, tokenizer=tokenizer, processing_class=make(tiny_model)[1])
    with pytest.raises(InputError, match="SFTConfig or TrainingArguments"):
        SFTTrainer(model=model, args={"max_steps": 2}, train_dataset=rows, tokenizer=tokenizer)
    with pytest.warns(UserWarning, match="num_of_sequences"):
        SFTTrainer(**call, tokenizer=tokenizer, num_of_sequences=1024)
    old = whet.SFTConfig(str(tmp_path), max_seq_length=32, evaluation_strategy="no")
    assert old.max_length == 32 and not old.fp16


def test_a_plain_model_gets_the_engine_and_policies_for_checkpointing(tiny_model, rows, tmp_path):
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    _, tokenizer = make(tiny_model)
    config = whet.SFTConfig(str(tmp_path), **SETTINGS)
    assert config.gradient_checkpointing
    trainer = SFTTrainer(
        model, config, train_dataset=rows, processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    assert swap.is_attached(trainer.model) and config.gradient_checkpointing
    assert swap.current_policies(trainer.model) == (LEAST, LEAST)
    assert not trainer.args.gradient_checkpointing and not trainer.args.activation_checkpointing
    assert len(losses(trainer)) == 2
    trainer.model.save_pretrained_merged(str(tmp_path / "merged"), tokenizer)
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize("given", [False, True], ids=["the model's", "the trainer's"])
def test_adapters_of_a_4_bit_model_stay_in_float32_as_they_were(tiny_model, rows, tmp_path, given):
    from peft import LoraConfig

    model, tokenizer = make(tiny_model, adapted=not given, load_in_4bit=True)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    own = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if given else None
    trainer = SFTTrainer(
        model, TrainingArguments(str(tmp_path), **SETTINGS), train_dataset=rows,
        processing_class=tokenizer, peft_config=own,
    )  # fmt: skip
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained and all(p.dtype is torch.float32 for p in trained.values())
    for name, values in ({} if given else before).items():
        assert torch.equal(trained[name], values)


def test_training_after_inference_uses_the_engine_again(tiny_model, rows, tmp_path):
    model, tokenizer = make(tiny_model)
    FastLanguageModel.for_inference(model)
    args = TrainingArguments(str(tmp_path), **SETTINGS)
    trainer = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=rows, args=args)
    trainer.train()
    assert swap.fuses_head(model)


@pytest.mark.parametrize("batched", [True, False])
def test_a_formatting_function_takes_rows_or_lists_of_them(tiny_model, tmp_path, batched):
    def many(rows):
        return [f"{a} {b}" for a, b in zip(rows["a"], rows["b"], strict=True)]

    def one(row):
        return f"{row['a']} {row['b']}"

    rows = Dataset.from_dict({"a": ["red", "four"], "b": ["a user", "a number"]})
    model, tokenizer = make(tiny_model)
    trainer = SFTTrainer(
        model=model, tokenizer=tokenizer, train_dataset=rows,
        formatting_func=many if batched else one, args=TrainingArguments(str(tmp_path), **SETTINGS),
    )  # fmt: skip
    texts = [tokenizer.decode(ids) for ids in trainer.train_dataset["input_ids"]]
    assert texts == ["red a user<|im_end|>", "four a number<|im_end|>"]


def test_only_answers_are_learned_in_a_trainer(tiny_model, tmp_path):
    turns = [{"role": "user", "content": "turn red"}, {"role": "assistant", "content": "four"}]
    rows = Dataset.from_dict({"messages": [turns] * 6})
    model, tokenizer = make(tiny_model)
    args = TrainingArguments(str(tmp_path), **SETTINGS)
    trainer = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=rows, args=args)
    train_on_responses_only(trainer, "<|im_start|>user\n", "<|im_start|>assistant\n")
    labels = trainer.train_dataset[0]["labels"]
    assert tokenizer.decode([i for i in labels if i != -100]) == "four<|im_end|>\n"
    assert len(losses(trainer)) == 2


@pytest.mark.parametrize("order", ["whet first", "whet last"])
def test_imports_come_in_any_order_and_change_no_class(tiny_model, order):
    code = textwrap.dedent(f"""
        first = {order == "whet first"}
        if first:
            import whet
            from whet import FastLanguageModel, SFTTrainer
        import torch, transformers, trl, peft
        from transformers import LlamaForCausalLM, Trainer
        classes = [
            LlamaForCausalLM, transformers.LlamaModel, Trainer, trl.SFTTrainer, peft.PeftModel,
            transformers.models.llama.modeling_llama.LlamaDecoderLayer,
        ]
        if not first:
            seen = [dict(vars(c)) for c in classes]
            import whet
            from whet import FastLanguageModel, SFTTrainer
            assert [dict(vars(c)) for c in classes] == seen
        assert all(
            not getattr(v, "__module__", "").startswith("whet") for c in classes for v in vars(c).values()
        )
        model, _ = FastLanguageModel.from_pretrained(
            {str(tiny_model)!r}, load_in_4bit=False, dtype="float32"
        )
        plain = LlamaForCausalLM.from_pretrained({str(tiny_model)!r})
        ids = torch.tensor([[5, 6, 7, 8]])
        a, b = model(ids, labels=ids).loss, plain(ids, labels=ids).loss
        assert abs(a - b) < 1e-5 and "forward" not in vars(plain)
        assert issubclass(SFTTrainer, trl.SFTTrainer)
    """)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_unsloths_trainer_gives_embeddings_a_rate_of_their_own(tiny_model, rows, tmp_path):
    model, tokenizer = make(tiny_model, adapted=False)
    model = FastLanguageModel.get_peft_model(
        model, r=4, target_modules=["q_proj", "v_proj", "embed_tokens", "lm_head"],
        use_gradient_checkpointing="unsloth",
    )  # fmt: skip
    args = whet.UnslothTrainingArguments(
        str(tmp_path), embedding_learning_rate=1e-5, max_length=32, **SETTINGS
    )
    trainer = whet.UnslothTrainer(
        model=model, tokenizer=tokenizer, train_dataset=rows, dataset_text_field="text", args=args
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    stats = whet.unsloth_train(trainer)
    assert stats.global_step == 2
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    rates = {
        names[id(p)]: group["initial_lr"]
        for group in trainer.optimizer.param_groups
        for p in group["params"]
    }
    assert set(rates) == set(before)
    for name, rate in rates.items():
        assert rate == (1e-5 if "modules_to_save" in name else 1e-3), name
    saved = [n for n in rates if "modules_to_save" in n]
    live = dict(trainer.model.named_parameters())
    moved = max(float((live[n].detach() - before[n]).abs().max()) for n in saved)
    assert len(saved) == 2 and 0 < moved <= 2e-5, "two steps of AdamW at that rate"


def test_unsloths_trainer_without_a_rate_is_the_trainer(tiny_model, rows, tmp_path):
    model, tokenizer = make(tiny_model)
    trainer = whet.UnslothTrainer(
        model=model, tokenizer=tokenizer, train_dataset=rows, dataset_text_field="text",
        args=whet.SFTConfig(str(tmp_path / "one"), **SETTINGS),
    )  # fmt: skip
    again, _ = make(tiny_model)
    other = SFTTrainer(
        model=again, tokenizer=tokenizer, train_dataset=rows, dataset_text_field="text",
        args=whet.SFTConfig(str(tmp_path / "two"), **SETTINGS),
    )  # fmt: skip
    assert [line["loss"] for line in losses(trainer)] == [line["loss"] for line in losses(other)]
    frozen = whet.UnslothTrainer(
        model=again, tokenizer=tokenizer, train_dataset=rows, dataset_text_field="text",
        args=whet.UnslothTrainingArguments(
            str(tmp_path / "three"), embedding_learning_rate=1e-5, **SETTINGS
        ),
    )  # fmt: skip
    with pytest.raises(InputError, match="neither they nor the head are trained"):
        frozen.train()
