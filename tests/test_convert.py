"""Configs of other trainers, written after their public documentation, become configs of ours."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from whet.cli import app
from whet.config_file import known_keys, load_config, parse_yaml
from whet.convert import DIALECTS, convert, table
from whet.errors import InputError

ROOT = Path(__file__).resolve().parents[1]

AXOLOTL = """
base_model: NousResearch/Llama-3.2-1B
load_in_8bit: false
load_in_4bit: true
strict: false
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
    split: train
dataset_prepared_path: last_run_prepared
val_set_size: 0.1
output_dir: ./outputs/qlora-out
adapter: qlora
lora_model_dir:
sequence_len: 2048
sample_packing: true
eval_sample_packing: true
pad_to_sequence_len: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
wandb_project: mine
wandb_name:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 2e-4
bf16: auto
tf32: false
gradient_checkpointing: true
logging_steps: 1
flash_attention: true
warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.01
neftune_noise_alpha: 5
special_tokens:
  pad_token: "<|end_of_text|>"
"""

LLAMA_FACTORY = """
### model
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true
### method
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
pref_beta: 0.2
pref_loss: ipo
### dataset
dataset: mine_pairs
dataset_dir: data
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 4
### output
output_dir: saves/llama3-8b/lora/dpo
logging_steps: 10
save_steps: 500
plot_loss: true
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine
max_steps: 200
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
### eval
val_size: 0.1
eval_strategy: steps
eval_steps: 50
"""

UNSLOTH = """
model: unsloth/Qwen2.5-0.5B
data:
  dataset: tatsu-lab/alpaca
  format_type: alpaca
training:
  training_type: lora
  max_seq_length: 1024
  load_in_4bit: true
  output_dir: outputs
  num_epochs: 1
  learning_rate: 0.0002
  batch_size: 2
  gradient_accumulation_steps: 4
  warmup_steps: 5
  max_steps: 0
  save_steps: 0
  weight_decay: 0.01
  random_seed: 3407
  packing: false
  train_on_completions: true
  gradient_checkpointing: unsloth
lora:
  lora_r: 64
  lora_alpha: 16
  lora_dropout: 0.0
  target_modules: "q_proj,k_proj,v_proj"
  use_rslora: true
  use_loftq: false
  finetune_vision_layers: true
logging:
  enable_wandb: false
  wandb_project: unsloth-training
  enable_tensorboard: true
  tensorboard_dir: runs
"""

TRL = """
model_name_or_path: Qwen/Qwen2-0.5B
dataset_name: trl-lib/Capybara
dataset_train_split: train
use_peft: true
lora_r: 32
lora_target_modules: [q_proj, v_proj]
learning_rate: 2.0e-4
num_train_epochs: 1
packing: true
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
max_length: 512
eval_strategy: steps
eval_steps: 100
report_to: none
output_dir: Qwen2-0.5B-SFT
"""


@pytest.fixture
def translated(tmp_path):
    """Write a file and translate it; the result has been through `load_config` as a file, too."""

    def run(text, dialect=None):
        file = tmp_path / "theirs.yaml"
        file.write_text(text)
        found = convert(file, dialect)
        ours = tmp_path / "ours.yaml"
        ours.write_text(found.to_yaml(file.name))
        assert load_config(ours) == load_config(found.tree)
        return found, load_config(ours)

    return run


def test_axolotl_qlora(translated):
    found, config = translated(AXOLOTL)
    assert found.dialect == "Axolotl" and found.unknown == []
    assert config.model.name == "NousResearch/Llama-3.2-1B" and config.model.load_in_4bit
    assert config.model.max_length == 2048 and config.model.dtype is None
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (32, 16, 0.05)
    assert config.lora.targets == "all-linear" and config.train.parameters == "lora"
    assert config.data.train == "teknium/GPT4-LLM-Cleaned:train" and config.data.format == "alpaca"
    assert config.data.heldout_fraction == 0.1
    # A packed row of theirs is full: 2 x 4 rows of 2,048 tokens make a step.
    assert config.train.batch_tokens == 2 * 4 * 2048
    assert (config.train.optimizer, config.train.schedule) == ("adamw_8bit", "cosine")
    assert config.train.learning_rate == 2e-4 and config.train.weight_decay == 0.01
    assert (config.run.dir, config.run.name) == ("outputs", "qlora-out")
    assert config.train.trackers == ["wandb"] and config.train.seed == 42
    assert config.train.neftune_alpha == 5
    lost = {key for key, _ in found.lost}
    assert lost == {
        "warmup_ratio", "evals_per_epoch", "saves_per_epoch", "special_tokens",
    }  # fmt: skip
    assert {"gradient_checkpointing", "flash_attention", "strict"} <= {key for key, _ in found.moot}


def test_llama_factory_dpo_with_its_dataset_info(translated, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(
        json.dumps(
            {
                "mine_pairs": {
                    "file_name": "pairs.json", "ranking": True,
                    "columns": {"prompt": "question", "chosen": "better", "rejected": "worse"},
                }
            }
        )
    )  # fmt: skip
    found, config = translated(LLAMA_FACTORY)
    assert found.dialect == "LLaMA-Factory" and found.unknown == [] and found.lost == []
    assert (config.method, config.preference.loss_type, config.preference.beta) == (
        "dpo",
        "ipo",
        0.2,
    )
    assert config.data.train.endswith("data/pairs.json")
    assert config.data.columns == {"prompt": "question", "chosen": "better", "rejected": "worse"}
    assert (config.lora.rank, config.lora.alpha) == (8, 16), "their alpha is twice the rank"
    assert config.model.chat_template == "llama-3" and config.data.max_rows == 1000
    assert (config.train.batch_size, config.train.warmup_steps) == (8, 20)
    assert (config.eval.steps, config.data.heldout_fraction) == (50, 0.1)
    assert (config.run.dir, config.run.name) == ("saves/llama3-8b/lora", "dpo")


def test_llama_factory_without_its_dataset_info_says_so(translated):
    found, config = translated("model_name_or_path: a/b\nstage: sft\ndataset: identity\n")
    assert "dataset_info.json, which was not found" in dict(found.lost)["dataset"]
    # What their file leaves out is at their defaults, not at ours.
    assert (config.lora.rank, config.lora.alpha, config.train.batch_size) == (8, 16, 8)
    assert config.train.learning_rate == 5e-5 and config.train.warmup_steps == 0


def test_llama_factory_freeze_galore_and_pretraining(translated):
    _, config = translated(
        "model_name_or_path: a/b\nstage: pt\nfinetuning_type: freeze\nfreeze_trainable_layers: 4\n"
        "use_galore: true\ngalore_rank: 64\ngalore_layerwise: true\ngalore_target: mlp,self_attn\n"
        "cutoff_len: 512\nper_device_train_batch_size: 2\n"
    )
    assert config.method == "pretrain" and config.train.batch_tokens == 1024
    assert (config.train.parameters, config.train.last_layers) == ("last_layers", 4)
    assert config.train.optimizer == "galore_adamw_layerwise"
    assert config.train.optimizer_args == {"rank": 64}
    assert config.train.optimizer_targets == ["mlp", "self_attn"]


def test_unsloth_yaml(translated):
    found, config = translated(UNSLOTH)
    assert found.dialect == "Unsloth" and found.unknown == [] and found.lost == []
    assert (config.lora.rank, config.lora.alpha, config.lora.rslora) == (64, 16, True)
    assert config.lora.targets == ["q_proj", "k_proj", "v_proj"]
    assert (config.train.batch_size, config.train.batch_tokens) == (8, None)
    assert config.train.max_steps is None and config.train.epochs == 1
    assert config.data.format == "alpaca" and config.data.loss_on == "assistant"
    assert config.train.trackers == ["tensorboard"] and config.model.load_in_4bit


def test_the_arguments_of_unsloth_s_notebooks(translated):
    found, config = translated(
        "model_name: unsloth/llama-3-8b\nmax_seq_length: 2048\nload_in_4bit: true\nr: 16\n"
        "use_gradient_checkpointing: unsloth\nrandom_state: 7\ngradient_accumulation_steps: 8\n"
        "optim: adamw_8bit\ndataset: rows.jsonl\n"
    )
    assert found.dialect == "Unsloth" and (config.lora.rank, config.train.seed) == (16, 7)
    assert config.train.batch_size == 2 * 8 and config.train.optimizer == "adamw_8bit"
    assert config.data.loss_on == "all" and config.train.epochs == 3, "as theirs, when left out"


def test_warmup_steps_win_over_a_share(translated):
    text = "model: a/b\ntraining:\n  max_steps: 60\n  warmup_ratio: 0.5\n"
    assert translated(text)[1].train.warmup_steps == 30
    assert translated(text + "  warmup_steps: 7\n")[1].train.warmup_steps == 7


def test_axolotl_s_own_warmup_is_taken_or_told(translated):
    text = "base_model: a/b\nsequence_len: 64\nadapter: lora\n"
    assert translated(text + "max_steps: 1000\n")[1].train.warmup_steps == 30
    assert translated(text + "max_steps: 10000\n")[1].train.warmup_steps == 100
    assert "0.03" in dict(translated(text)[0].lost)["warmup_ratio"]


AXOLOTL_SETS = """
base_model: a/b
sequence_len: 64
adapter: lora
datasets:
  - path: org/chats-v1.5
    split: train[:10%]
    type: chat_template
    field_messages: dialogue
    message_property_mappings: {role: speaker, content: value}
    roles: {user: [human], assistant: [gpt, helper]}
    roles_to_train: [assistant]
    train_on_eos: last
    quite_new: 1
  - path: rows.jsonl
    ds_type: json
    split: train
    type: {field_instruction: question, field_output: answer, format: "Q: {instruction}", system_prompt: "Be brief."}
"""  # noqa: E501


def test_every_key_of_an_axolotl_data_set_is_taken_over_or_named(translated):
    found, config = translated(AXOLOTL_SETS)
    assert config.data.train == ["org/chats-v1.5:train[:10%]", "rows.jsonl"]
    assert config.data.columns["instruction"] == "question" and config.data.system == "Be brief."
    lost = dict(found.lost)
    assert {key for key in lost if key.startswith("datasets")} == {
        "datasets", "datasets.message_property_mappings", "datasets.roles", "datasets.train_on_eos",
        "datasets.quite_new", "datasets.type.format",
    }  # fmt: skip
    assert (
        "helper" in lost["datasets.roles"]
        and "speaker" in lost["datasets.message_property_mappings"]
    )
    assert "datasets.ds_type" in dict(found.moot)


def test_axolotl_pairs_with_fields_of_their_own(translated):
    found, config = translated(
        "base_model: a/b\nsequence_len: 64\nadapter: lora\nrl: dpo\ndpo_beta: 0.2\nwarmup_steps: 0\n"
        "datasets:\n  - path: pairs.jsonl\n    type:\n      field_prompt: q\n      field_chosen: good\n"
        "      field_rejected: bad\n      prompt_format: '{prompt}'\n"
    )
    assert config.data.columns == {"prompt": "q", "chosen": "good", "rejected": "bad"}
    assert config.method == "dpo" and config.preference.beta == 0.2 and found.lost == []


def test_every_key_of_dataset_info_is_taken_over_or_named(translated, tmp_path):
    (tmp_path / "dataset_info.json").write_text(
        json.dumps(
            {
                "chats": {
                    "hf_hub_url": "org/chats", "split": "dev", "num_samples": 9, "subset": "small",
                    "formatting": "sharegpt", "columns": {"messages": "dialogue", "images": "images"},
                    "tags": {"role_tag": "role", "content_tag": "text", "user_tag": "user"},
                },
            }
        )
    )  # fmt: skip
    found, config = translated("model_name_or_path: a/b\nstage: sft\ndataset: chats\n")
    assert config.data.train == "org/chats:dev#9" and config.data.columns == {
        "messages": "dialogue"
    }
    lost = {key for key, _ in found.lost}
    assert lost == {"chats.subset", "chats.images", "chats.content_tag"}


def test_plain_text_of_llama_factory_keeps_its_column(translated, tmp_path):
    entry = {"wiki": {"file_name": "wiki.json", "columns": {"prompt": "content"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(entry))
    _, config = translated("model_name_or_path: a/b\nstage: pt\ndataset: wiki\ncutoff_len: 64\n")
    assert config.method == "pretrain" and config.data.columns == {"text": "content"}


def test_trl_sft(translated):
    found, config = translated(TRL)
    assert found.dialect == "trl" and found.unknown == []
    assert [key for key, _ in found.lost] == ["assistant_only_loss"], "all is learned there"
    assert config.data.train == "trl-lib/Capybara:train"
    assert config.data.heldout == "trl-lib/Capybara:test" and config.eval.steps == 100
    assert config.train.batch_tokens == 2 * 8 * 512 and config.lora.rank == 32
    assert config.run.name == "Qwen2-0.5B-SFT" and config.train.trackers == []


def test_unsloths_continued_pretraining_keeps_its_tables_and_their_rate(translated):
    found, config = translated(
        "model_name: unsloth/mistral-7b\nmax_seq_length: 2048\nr: 128\nlearning_rate: 5.0e-5\n"
        "target_modules: [q_proj, gate_proj, embed_tokens, lm_head]\nembedding_learning_rate: 1.0e-5\n"
    )
    assert config.lora.targets == ["q_proj", "gate_proj"] and found.lost == []
    assert config.lora.modules_to_save == ["embed_tokens", "lm_head"]
    assert config.train.embedding_learning_rate == 1e-5


def test_schedules_come_with_their_settings(translated):
    theirs = "model_name_or_path: a/b\nuse_peft: true\nlearning_rate: 1.0e-4\n"
    _, config = translated(
        theirs + "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr_rate: 0.1}\n"
    )
    assert config.train.schedule == "cosine_with_min_lr"
    assert config.train.schedule_args == {"min_lr_rate": 0.1}
    _, config = translated(
        theirs + "lr_scheduler_type: polynomial\nlr_scheduler_kwargs: '{\"power\": 2}'\n"
    )
    assert (config.train.schedule, config.train.schedule_args) == ("polynomial", {"power": 2})
    found, config = translated(
        theirs + "lr_scheduler_type: reduce_lr_on_plateau\nlr_scheduler_kwargs: {patience: 3}\n"
    )
    assert {"lr_scheduler_type", "lr_scheduler_kwargs"} <= dict(found.lost).keys()
    assert config.train.schedule_args == {}
    _, config = translated(AXOLOTL + "cosine_min_lr_ratio: 0.1\n")
    assert config.train.schedule == "cosine_with_min_lr"
    assert config.train.schedule_args == {"min_lr_rate": 0.1}


def test_noise_is_for_methods_that_have_it(translated):
    found, config = translated(
        "base_model: a/b\nsequence_len: 64\nadapter: lora\nrl: orpo\nnoisy_embedding_alpha: 5\n"
    )
    assert "sft and pretrain" in dict(found.lost)["noisy_embedding_alpha"]
    assert config.train.neftune_alpha is None


def test_unknown_keys_are_told_with_the_key_that_was_meant(translated):
    found, _ = translated(AXOLOTL + "\nsequnce_len: 9\nquite_new_thing: 1\n")
    assert found.unknown == ["sequnce_len (did you mean sequence_len?)", "quite_new_thing"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base_model: a/b\nsequence_len: 9\nrl: simpo\n", "rl: simpo cannot be translated"),
        ("base_model: a/b\nsequence_len: 9\nadapter: ia3\n", "whet has lora and qlora"),
        ("model_name_or_path: a\nstage: ppo\ncutoff_len: 9\n", "stage: ppo"),
        ("model_name_or_path: a\nstage: sft\nfinetuning_type: oft\n", "finetuning_type: oft"),
        ("base_model: a/b\nsequence_len: 9\nload_in_4bit: true\n", "model.load_in_4bit freezes them"),
        ("base_model: a/b\nsequence_len: 2\nadapter: lora\n", "model.max_length"),
        ("base_model: a/b\nsequence_len: 9\nmicro_batch_size: two\n", "'two'"),
        ("base_model: a/b\nsequence_len: 9\nlearning_rate: fast\n", "learning_rate has a value that"),
        ("base_model: a/b\nsequence_len: 9\nlora_r: {a: 1}\n", "lora_r has a value that whet cannot"),
        ("base_model: [1]\nsequence_len: 9\nadapter: lora\n", "makes no config that whet takes"),
        ("base_model: a/b\nsequence_len: 9\ndatasets: 5\n", "give each data set a path"),
        ("base_model: a/b\nbase_model: c/d\n", "'base_model' is given twice"),
        ("model: {name: smollm2-135m}\ntrain: {epochs: 1}\n", "whet reads its own configs"),
        ("", "it has no keys"), ("# nothing\n", "it has no keys"), ("5", "it has no keys"),
        ("lines: 1\n", "is no config of Axolotl"),
        ("- a\n", "is no config of another trainer"),
        ("a: [", "is not YAML"),
    ],
)  # fmt: skip
def test_what_would_make_another_run_is_an_error_in_a_sentence(text, words, tmp_path):
    file = tmp_path / "theirs.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        convert(file)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("val_set_size: 200", "val_set_size"), ("lr_scheduler: rex", "lr_scheduler"),
        ("save_steps: 0.1", "save_steps"),
        ("val_set_size: 0.1\neval_strategy: epoch", "eval_strategy"),
        ("chat_template: jamba", "chat_template"),
        ("deepspeed: zero3.json", "deepspeed"), ("early_stopping_patience: 3", "early_stopping_patience"),
        ("plugins: [axolotl.integrations.kd.KDPlugin]", "plugins"),
        ("datasets: [{path: a/b, type: alpaca, name: small}]", "datasets.name"),
        ("datasets: [{path: a/b, type: {format: 'Q: {instruction}'}}]", "datasets.type.format"),
    ],
)  # fmt: skip
def test_a_value_that_has_no_like_here_is_told_and_left_at_the_default(line, key, translated):
    found, _ = translated(f"base_model: a/b\nsequence_len: 64\nadapter: lora\n{line}\n")
    assert key in dict(found.lost)


@pytest.mark.parametrize("name", DIALECTS)
def test_the_tables_name_keys_that_there_are(name):
    dialect = DIALECTS[name]
    for key, rule in dialect.rules.items():
        assert set(filter(None, rule.to.split(", "))) <= {*known_keys(), ""}, key
        assert rule.to or rule.why, key
    assert set(dialect.defaults) <= set(dialect.rules)
    page = (ROOT / "docs" / "migrate.md").read_text(encoding="utf-8")
    assert table(dialect) in page, "run python tests/test_convert.py"


def test_whet_init_from_writes_it_and_tells_what_was_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("axolotl.yml").write_text(AXOLOTL + "quite_new_thing: 1\n")
    told = CliRunner().invoke(app, ["init", "my.yaml", "--from", "axolotl.yml"])
    assert told.exit_code == 0, told.output
    for words in (
        "(Axolotl)",
        "warmup_ratio is not taken over",
        "quite_new_thing is a key that whet",
    ):
        assert words in told.output
    text = Path("my.yaml").read_text()
    assert "#   special_tokens: the tokenizer's own" in text and "quite_new_thing" in text
    assert parse_yaml(text)["lora"]["rank"] == 32
    told = CliRunner().invoke(app, ["init", "my.yaml", "--from", "axolotl.yml"])
    assert "exists already" in str(told.exception) and Path("my.yaml").read_text() == text
    told = CliRunner().invoke(app, ["init", "b.yaml", "--from", "axolotl.yml", "--dialect", "x"])
    assert "there is no dialect 'x'" in str(told.exception) and not Path("b.yaml").exists()
    told = CliRunner().invoke(app, ["init", "b.yaml", "--from", "nowhere.yml"])
    assert "'nowhere.yml' cannot be read" in str(told.exception)


def _write_tables():
    page = ROOT / "docs" / "migrate.md"
    text = page.read_text(encoding="utf-8")
    for name, dialect in DIALECTS.items():
        begin, end = f"<!-- table: {name}, from its rules -->\n", "<!-- end of table -->"
        before, rest = text.split(begin)
        text = before + begin + table(dialect) + end + rest.split(end, 1)[1]
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    _write_tables()
