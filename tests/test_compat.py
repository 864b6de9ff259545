"""The drop-in API on a tiny model: arguments, adapters, switching, saving."""

import copy
import json
import subprocess
import sys
import textwrap

import pytest
import torch

import whet
from whet import FastLanguageModel, InputError
from whet.compat.arguments import MEANINGLESS, UnknownArgument
from whet.compat.export import upload
from whet.engine import swap
from whet.engine.memory import Policy
from whet.plan.memory import LEAST

PLAIN = {"load_in_4bit": False, "dtype": "float32", "use_gradient_checkpointing": False}


def load(tiny_model, **more):
    return FastLanguageModel.from_pretrained(str(tiny_model), **{**PLAIN, **more})


def adapt(model, **more):
    return FastLanguageModel.get_peft_model(model, **{"r": 4, "lora_alpha": 8, **more})


def moved(model):
    """Give the adapter of a model an update that is not zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model


def logits(model, ids=((5, 6, 7, 8, 9),)):
    model.eval()
    with torch.no_grad():
        return model(torch.tensor(ids), use_cache=False).logits.float()


def test_a_model_comes_with_the_engine_in_it_and_a_tokenizer_that_pads(tiny_model):
    model, tokenizer = load(tiny_model, max_seq_length=128)
    assert type(model).__module__.startswith("transformers.")
    assert swap.report_of(model).layers_fused == 2
    assert model.max_seq_length == 128 and tokenizer.model_max_length == 128
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.dtype == torch.float32


def test_padding_gets_a_token_of_its_own_and_it_is_said(tiny_model, tokenizer, tmp_path, caplog):
    other = copy.deepcopy(tokenizer)
    other.pad_token = None
    other.save_pretrained(tmp_path)
    _, found = load(tiny_model, tokenizer_name=str(tmp_path))
    assert found.pad_token == "<|endoftext|>" and "pads with <|endoftext|>" in caplog.text


@pytest.mark.parametrize(("wish", "dtype", "bits"), [
    ({"load_in_4bit": True}, torch.uint8, 4),
    ({"load_in_4bit": True, "dtype": torch.bfloat16}, torch.uint8, 4),
    ({"load_in_8bit": True, "load_in_4bit": True}, torch.int8, 8),
    ({"load_in_16bit": True, "load_in_4bit": True}, torch.bfloat16, 0),
    ({"full_finetuning": True, "load_in_4bit": True}, torch.float32, 0),
    ({"full_finetuning": True, "dtype": "bfloat16"}, torch.bfloat16, 0),
], ids=str)  # fmt: skip
def test_the_weights_are_of_the_kind_that_was_asked_for(tiny_model, wish, dtype, bits):
    model, _ = load(tiny_model, **{"dtype": None, **wish})
    if wish.get("load_in_16bit"):  # or float16 on an old GPU
        assert model.model.layers[0].mlp.up_proj.weight.dtype in (dtype, torch.float16)
    else:
        assert model.model.layers[0].mlp.up_proj.weight.dtype == dtype
    assert bool(getattr(model, "is_loaded_in_4bit", False)) == (bits == 4)
    assert bool(getattr(model, "is_loaded_in_8bit", False)) == (bits == 8)
    if "full_finetuning" in wish:
        assert all(p.requires_grad for p in model.parameters())


def test_an_argument_without_meaning_is_named_once_with_its_reason(tiny_model):
    with pytest.warns(UserWarning, match="fast_inference") as caught:
        load(tiny_model, fast_inference=False, gpu_memory_utilization=0.5)
    ours = [w for w in caught if "nothing to do" in str(w.message)]
    assert len(ours) == 1 and "gpu_memory_utilization" in str(ours[0].message)
    assert ours[0].filename == __file__
    assert all(reason for reason in MEANINGLESS.values())


def test_an_unknown_argument_is_an_error_with_a_guess(tiny_model):
    with pytest.raises(InputError, match="max_seq_lenght.*did you mean 'max_seq_length'"):
        load(tiny_model, max_seq_lenght=7)
    model, _ = load(tiny_model)
    with pytest.raises(TypeError, match="rang"):
        FastLanguageModel.get_peft_model(model, rang=4)
    assert issubclass(UnknownArgument, InputError)


@pytest.mark.parametrize(("wish", "words"), [
    ({"dtype": "int4"}, "dtype"), ({"load_in_8bit": True, "load_in_16bit": True}, "exclude"),
    ({"use_gradient_checkpointing": "maybe"}, "use_gradient_checkpointing"),
])  # fmt: skip
def test_a_wrong_value_is_told_in_words(tiny_model, wish, words):
    with pytest.raises(InputError, match=words):
        load(tiny_model, **wish)


def test_a_longer_text_than_the_models_own_scales_its_rope_and_says_so(tiny_model, caplog):
    short, _ = load(tiny_model)
    model, _ = load(tiny_model, max_seq_length=512)
    assert "scaled linearly by 2" in caplog.text
    assert model.config.max_position_embeddings == 512 and model.max_seq_length == 512
    assert model.config.rope_parameters["rope_type"] == "linear"
    assert model.config.rope_parameters["factor"] == 2.0
    half = short.model.rotary_emb.inv_freq / 2
    assert torch.allclose(model.model.rotary_emb.inv_freq, half)
    assert swap.report_of(model).layers_fused == 2


@pytest.mark.parametrize(("kind", "longest"), [("linear", 1024), ("dynamic", 256), ("yarn", 1024)])
def test_rope_scaling_of_the_users_own_is_taken(tiny_model, kind, longest):
    model, _ = load(tiny_model, max_seq_length=900, rope_scaling={"type": kind, "factor": 4.0})
    rope = model.config.rope_parameters
    assert rope["rope_type"] == kind and rope["factor"] == 4.0
    assert model.config.max_position_embeddings == longest and model.max_seq_length == 900
    assert rope.get("original_max_position_embeddings") == (256 if kind == "yarn" else None)
    assert swap.report_of(model).layers_fused == 2


def test_a_model_that_cannot_be_stretched_is_an_error(tiny_model, tmp_path):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tiny_model)
    config.rope_parameters = {**config.rope_parameters, "rope_type": "dynamic", "factor": 2.0}
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="cannot be stretched.*rope_scaling"):
        load(tmp_path, max_seq_length=100_000)


def test_an_adapter_starts_from_its_seed_and_leaves_the_random_state(tiny_model):
    starts = []
    for seed in (1, 1, 2):
        torch.manual_seed(7)
        state = torch.random.get_rng_state()
        model = adapt(load(tiny_model)[0], random_state=seed)
        assert torch.equal(torch.random.get_rng_state(), state)
        name, start = next((n, p) for n, p in model.named_parameters() if "lora_A" in n)
        starts.append(start)
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


def test_an_adapter_has_what_was_asked_for(tiny_model):
    model = adapt(
        load(tiny_model)[0],
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=[1],
        use_rslora=True,
        modules_to_save=["embed_tokens"],
        bias="none",
        lora_dropout=0.0,
    )
    settings = model.peft_config["default"]
    assert settings.r == 4 and settings.lora_alpha == 8 and settings.use_rslora
    adapted = [n for n, _ in model.named_parameters() if "lora_A" in n]
    assert len(adapted) == 2 and all("layers.1." in name for name in adapted)
    assert any("modules_to_save" in n for n, p in model.named_parameters() if p.requires_grad)


def test_without_targets_every_linear_module_of_the_layers_gets_an_adapter(tiny_model):
    for more in ({}, {"layers_to_transform": [0, 1]}, {"target_modules": r".*\.(\w)+_proj"}):
        model = adapt(load(tiny_model)[0], **more)
        assert len([n for n, _ in model.named_parameters() if "lora_A" in n]) == 14
        assert swap.report_of(model).layers_fused == 2


@pytest.mark.parametrize("init", [True, False, "gaussian", "olora", "pissa"])
def test_adapters_start_as_asked(tiny_model, init):
    model, _ = load(tiny_model)
    before = logits(model)
    adapted = adapt(model, init_lora_weights=init)
    assert torch.allclose(logits(adapted), before, atol=1e-4) is not (init is False)


def test_loftq_needs_four_bits_and_takes_four(tiny_model):
    with pytest.raises(InputError, match="load_in_4bit"):
        adapt(load(tiny_model)[0], init_lora_weights="loftq")
    model, _ = load(tiny_model, load_in_4bit=True)
    adapted = adapt(model, init_lora_weights="loftq", loftq_config={"loftq_bits": 4})
    assert any(p.abs().sum() for n, p in adapted.named_parameters() if "lora_B" in n)


def test_mistakes_of_an_adapter_are_told_at_once(tiny_model):
    model, _ = load(tiny_model)
    with pytest.raises(InputError) as told:
        adapt(model, r=0, lora_dropout=2.0)
    assert "r:" in str(told.value) and "lora_dropout:" in str(told.value)
    with pytest.raises(InputError, match="no module 'q_porj'"):
        adapt(model, target_modules=["q_porj"])
    with pytest.raises(InputError, match="no module for an adapter"):
        adapt(model, target_modules=["lm_head"])
    with pytest.raises(InputError, match="adapter already"):
        adapt(adapt(model))


@pytest.mark.parametrize(("value", "policy"), [
    (False, Policy()), (True, LEAST), ("unsloth", None), ("true", LEAST),
])  # fmt: skip
def test_gradient_checkpointing_is_a_policy_of_the_layers(tiny_model, value, policy):
    model = adapt(load(tiny_model)[0], use_gradient_checkpointing=value)
    if policy is None:  # on a CPU tensors are in host memory already
        policy = LEAST if not torch.cuda.is_available() else swap.current_policies(model)[0]
    assert swap.current_policies(model) == (policy, policy)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def test_inference_generates_as_transformers_does_with_tokens_of_the_engine(tiny_model):
    from transformers import AutoModelForCausalLM

    model, tokenizer = load(tiny_model)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    assert FastLanguageModel.for_inference(model) is model
    assert not model.training and model.config.use_cache and tokenizer.padding_side == "left"
    inputs = tokenizer(["turn red", "a user answers four"], return_tensors="pt", padding=True)
    call = {"max_new_tokens": 6, "do_sample": False, "output_logits": True}
    call |= {"return_dict_in_generate": True, "eos_token_id": None}
    ours, theirs = model.generate(**inputs, **call), plain.generate(**inputs, **call)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(ours.logits[0], theirs.logits[0])  # the prompt is read by the original
    for one, other in zip(ours.logits[1:], theirs.logits[1:], strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    assert not swap.fuses_head(model) and vars(model)["_whet"].decoding.copies
    FastLanguageModel.for_training(model)
    assert vars(model)["_whet"].decoding is None
    assert model.training and swap.fuses_head(model) and tokenizer.padding_side == "right"
    FastLanguageModel.for_training(model, use_gradient_checkpointing=True)
    assert swap.current_policies(model) == (LEAST, LEAST)


@pytest.mark.parametrize("four", [False, True])
def test_merged_weights_are_the_live_model_and_load_in_plain_transformers(
    tiny_model, tmp_path, four
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = load(tiny_model, load_in_4bit=four)
    model = moved(adapt(model))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.save_pretrained_merged(tmp_path / "merged", tokenizer, save_method="merged_16bit")
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert found.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == tokenizer.eos_token
    # W + s B A of the original weights, in float32, rounded once.
    exact, _ = load(tiny_model)
    exact = adapt(exact)
    exact.load_state_dict({k: v for k, v in state.items() if "lora_" in k}, strict=False)
    exact = exact.merge_and_unload().to(torch.bfloat16).state_dict()
    for name, value in found.state_dict().items():
        assert torch.equal(value, exact[name]), name
    assert swap.is_attached(model)


def test_pissa_is_merged_with_the_base_it_changed(tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    model = adapt(load(tiny_model)[0], init_lora_weights="pissa")
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).mul_(1.5)
    model.save_pretrained_merged(str(tmp_path / "merged"))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.allclose(logits(found), logits(model), atol=0.02)


def test_four_bit_saving_and_a_model_published_in_four_bit(tiny_model, tmp_path):
    model, tokenizer = load(tiny_model, load_in_4bit=True)
    model = moved(adapt(model))
    model.save_pretrained_merged(tmp_path / "nf4", tokenizer, save_method="merged_4bit_forced")
    assert json.loads((tmp_path / "nf4" / "config.json").read_text())["quantization_config"]
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path / "nf4"), dtype="float32")
    assert again.is_loaded_in_4bit and swap.report_of(again).kept == swap.report_of(model).kept
    again = moved(adapt(again))
    again.save_pretrained_merged(tmp_path / "plain", tokenizer)
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())


def test_an_adapters_folder_is_loaded_with_its_base(tiny_model, tmp_path):
    model, tokenizer = load(tiny_model)
    model = moved(adapt(model))
    model.save_pretrained_merged(tmp_path / "lora", tokenizer, save_method="lora")
    again, found = load(tmp_path / "lora")
    assert torch.allclose(logits(again), logits(model), atol=1e-5)
    assert any(p.requires_grad for p in again.parameters())
    assert found.chat_template == tokenizer.chat_template
    again.save_pretrained_merged(str(tmp_path / "merged"), found)
    with pytest.raises(InputError, match="holds an adapter"):
        model.save_pretrained_merged(tmp_path / "lora", tokenizer)


def test_saving_leaves_other_files_of_the_folder_alone(tiny_model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    model, tokenizer = load(tiny_model)
    model.save_pretrained_merged(tmp_path, tokenizer)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "model.safetensors").is_file()


def test_wrong_ways_to_save_are_told(tiny_model, tmp_path):
    model, tokenizer = load(tiny_model)
    with pytest.raises(InputError, match="merged_16bit, merged_4bit, lora"):
        model.save_pretrained_merged(tmp_path / "x", tokenizer, save_method="merged_2bit")
    with pytest.raises(InputError, match="needs a model with an adapter"):
        model.save_pretrained_merged(tmp_path / "x", tokenizer, save_method="lora")
    with pytest.raises(InputError, match="did you mean 'q4_k_m'"):
        model.save_pretrained_gguf(tmp_path / "x", tokenizer, quantization_method="q4_km")
    with pytest.warns(UserWarning, match="safe_serialization"):
        model.save_pretrained_merged(tmp_path / "x", safe_serialization=None)


class StandIn:
    """What HfApi is called with."""

    def create_repo(self, repo_id, **more):
        self.made = (repo_id, more)

    def upload_folder(self, folder_path, repo_id, **more):
        from pathlib import Path

        self.files = sorted(p.name for p in Path(folder_path).iterdir())
        self.sent = (repo_id, more)
        return f"https://hub/{repo_id}"


def test_pushing_uploads_the_merged_folder(tiny_model):
    model, tokenizer = load(tiny_model)
    api = StandIn()
    where = moved(adapt(model)).push_to_hub_merged(
        "me/it", tokenizer, private=True, commit_message="hello", api=api
    )
    assert where == "https://hub/me/it" and api.made == (
        "me/it",
        {"private": True, "exist_ok": True},
    )
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(api.files)
    assert api.sent[1]["commit_message"] == "hello"
    assert upload.__doc__


GGUF_METHODS = [
    ("not_quantized", ["bf16"]), ("fast_quantized", ["q8_0"]), (["f16", "Q5_0"], ["f16", "q5_0"]),
]  # fmt: skip


@pytest.mark.parametrize(("method", "kinds"), GGUF_METHODS, ids=str)
def test_gguf_files_are_written_and_are_the_model(method, kinds, tiny_model, tmp_path):
    pytest.importorskip("cyllama")
    from whet.export.llama_cpp import GGUFModel

    model, tokenizer = load(tiny_model)
    model = moved(adapt(model))
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes.txt").write_text("mine")
    files = model.save_pretrained_gguf(tmp_path / "m", tokenizer, quantization_method=method)
    assert files == [str(tmp_path / "m" / f"m-{kind}.gguf") for kind in kinds]
    assert {p.name for p in (tmp_path / "m").iterdir()} == {
        "notes.txt", *(f"m-{kind}.gguf" for kind in kinds)
    }  # fmt: skip
    truth = logits(model)[0].numpy()
    with GGUFModel(files[0]) as exported:
        (found,) = exported.logits([[5, 6, 7, 8, 9]])
    assert 0 < abs(found - truth).max() < 0.1 * abs(truth).max()


def test_gguf_files_that_are_not_the_model_are_not_left(tiny_model, tmp_path, monkeypatch):
    pytest.importorskip("cyllama")
    from whet.errors import WhetError
    from whet.export import gguf_layout

    monkeypatch.setattr(gguf_layout, "_interleave", lambda heads: lambda value: value)
    model, tokenizer = load(tiny_model)
    with pytest.raises(WhetError, match="logits: the weights are not those that were trained"):
        model.save_pretrained_gguf(tmp_path / "m", tokenizer, quantization_method="f16")
    assert not (tmp_path / "m").exists()


def test_pushing_uploads_the_gguf_files(tiny_model):
    pytest.importorskip("cyllama")
    model, tokenizer = load(tiny_model)
    api = StandIn()
    where = model.push_to_hub_gguf("me/it", tokenizer, "f16", private=True, api=api)
    assert where == "https://hub/me/it" and api.files == ["it-f16.gguf"]
    assert api.sent[1]["commit_message"] == "Upload model trained with whet"


def test_a_second_model_and_every_class_stay_as_they_were(tiny_model):
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    second = AutoModelForCausalLM.from_pretrained(tiny_model)
    classes = {type(m) for m in second.modules()}
    forwards = {c: (c.forward, set(vars(c))) for c in classes}
    before = {name: set(vars(m)) for name, m in second.named_modules()}
    answer = logits(second)
    model, _ = load(tiny_model)
    model = adapt(model)
    FastLanguageModel.for_inference(model)
    FastLanguageModel.for_training(model)
    model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    assert {c: (c.forward, set(vars(c))) for c in classes} == forwards
    assert {name: set(vars(m)) for name, m in second.named_modules()} == before
    assert torch.equal(logits(second), answer)
    assert not hasattr(LlamaForCausalLM, "save_pretrained_merged")
    third = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert "forward" not in vars(third) and torch.equal(logits(third), answer)


def test_importing_whet_touches_nothing():
    code = textwrap.dedent("""
        import sys
        import whet
        assert not {"torch", "transformers", "trl", "peft"} & set(sys.modules)
        assert "FastLanguageModel" in dir(whet)
    """)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_without_trl_the_trainer_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "whet.compat.trl", raising=False)
    with pytest.raises(InputError, match=r"pip install 'whet\[trl\]'"):
        whet.SFTTrainer  # noqa: B018
