"""Embeddings and head may be held in host memory, or in 8 bit, and the rest does not notice."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.engine.families import (
    adapted,
    batch,
    build,
    gradients,
    in_float64,
    in_nf4,
    judge_norm,
    packed_batch,
    true_gradients,
)
from tests.engine.unheard_of import build_unheard
from whet.engine import held, swap
from whet.engine.embeddings import HeldEmbedding, HeldHead, place_embeddings
from whet.engine.parity import judge
from whet.engine.swap import EngineSettings
from whet.engine.verify import verify
from whet.errors import InputError

# Tied and untied; a scale of the embeddings in a class of their own (gemma), a soft cap (gemma2), other
# names and biases (gpt2).
NAMES = ["llama2", "llama3", "gemma2", "gemma3", "gpt2", "qwen3"]
families = pytest.mark.parametrize("name", NAMES)
both = pytest.mark.parametrize("where", ["cpu", "8bit"])
engine = pytest.mark.parametrize("inside", [False, True], ids=["original", "engine"])


@pytest.fixture
def small_tiles(monkeypatch):
    """301 classes in five tiles, the last of them small."""
    monkeypatch.setattr(held, "TILE_ROWS", 64)


def frozen(name, dtype=torch.float32, **more):
    return build(name, dtype, **more).requires_grad_(False)


def placed(name, where, dtype=torch.float32, **more):
    model = frozen(name, dtype, **more)
    place_embeddings(model, where)
    return model


def dequantised(name, dtype=torch.float32):
    """The dense model whose embeddings and head have the values that 8 bit leaves of them."""
    model, eight = frozen(name, dtype), placed(name, "8bit", dtype)
    for ours, theirs in zip(ends(model), ends(eight), strict=True):
        ours.weight.data.copy_(theirs.weight.dense())
    return model


def ends(model):
    base = swap.base_of(model)
    return base.get_input_embeddings(), base.get_output_embeddings()


def num_bytes(model):
    """Bytes of all that is registered in a model, shared tensors once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.nbytes for t in tensors.values())


@engine
@families
def test_from_host_memory_loss_and_gradients_are_the_same_to_the_bit(name, inside):
    dense, ours = adapted(frozen(name)), adapted(placed(name, "cpu"))
    assert isinstance(ends(ours)[0], HeldEmbedding) and isinstance(ends(ours)[1], HeldHead)
    found = []
    for model in (dense, ours):
        if inside:
            swap.attach(model, EngineSettings(strict=True))
        found.append([gradients(model, inputs) for inputs in (batch(), packed_batch())])
        model.eval()
        found[-1].append((model(**batch(), use_cache=False).logits, {}))
    for (loss, grads), (same, same_grads) in zip(*found, strict=True):
        assert torch.equal(loss, same) and grads.keys() == same_grads.keys()
        assert all(torch.equal(grad, same_grads[key]) for key, grad in grads.items())


@engine
@families
@pytest.mark.usefixtures("small_tiles")
def test_in_8_bit_the_model_is_the_dense_one_with_dequantised_weights(name, inside):
    dense, ours = adapted(dequantised(name)), adapted(placed(name, "8bit"))
    inputs = batch()
    truth, exact = true_gradients(dense, inputs)
    for model in (dense, ours) if inside else ():
        swap.attach(model, EngineSettings(strict=True))
    original, grads = gradients(dense, inputs)
    loss, found = gradients(ours, inputs)
    assert judge("loss", loss, original, truth).passed
    assert found.keys() == exact.keys()
    for key, grad in found.items():
        assert judge(key, grad, grads[key], exact[key]).passed, key


@families
@pytest.mark.usefixtures("small_tiles")
def test_in_bfloat16_too(name):
    dtype, inputs = torch.bfloat16, batch()
    dense, ours = adapted(dequantised(name, dtype)), adapted(placed(name, "8bit", dtype))
    _, exact = true_gradients(dense, inputs)
    for model in (dense, ours):
        swap.attach(model)
    _, grads = gradients(dense, inputs)
    _, found = gradients(ours, inputs)
    for key, grad in found.items():
        assert judge_norm(key, grad, grads[key], exact[key]).passed, key


@both
@families
def test_the_truth_in_high_precision_has_the_same_weights(name, where):
    dtype = torch.bfloat16
    dense = dequantised(name, dtype) if where == "8bit" else frozen(name, dtype)
    loss, grads = true_gradients(adapted(dense), batch())
    same, same_grads = true_gradients(adapted(placed(name, where, dtype)), batch())
    torch.testing.assert_close(same, loss, rtol=1e-12, atol=0)
    for key, grad in grads.items():
        torch.testing.assert_close(same_grads[key], grad, rtol=1e-9, atol=1e-12)


@both
@families
def test_the_whole_model_is_verified(name, where):
    model = adapted(placed(name, where))
    found = verify(
        model, [[5, 9, 2, 77, 31, 8], [4, 300, 4], [1, 2, 3, 4, 5, 6, 7, 8]], EngineSettings()
    )
    assert found.passed, [part for part in found.parts if part.verdict == "fail"]
    assert any(part.name == "head" and part.verdict == "pass" for part in found.parts)


@both
@pytest.mark.parametrize("name", ["llama2", "gemma3", "gpt2"])
def test_generation_gives_the_dense_models_tokens(name, where):
    dense = dequantised(name) if where == "8bit" else frozen(name)
    ours = placed(name, where)
    swap.attach(ours)
    ids = batch()["input_ids"]
    texts = [
        model.eval().generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=7, do_sample=False
        )
        for model in (dense, ours)
    ]
    assert torch.equal(*texts)


@both
def test_a_4_bit_model_with_held_embeddings_trains_under_gradient_checkpointing(where):
    dense = dequantised("llama3") if where == "8bit" else frozen("llama3")
    dense, ours = adapted(in_nf4(dense)), adapted(in_nf4(placed("llama3", where)))
    for model in (dense, ours):
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    truth, exact = true_gradients(dense, batch())
    original, grads = gradients(dense, batch())
    loss, found = gradients(ours, batch())
    assert judge("loss", loss, original, truth).passed
    for key, grad in found.items():
        assert judge(key, grad, grads[key], exact[key]).passed, key


@families
def test_8_bit_takes_a_byte_an_entry_and_four_a_row_and_tied_weights_once(name):
    model = frozen(name)
    embedding, head = ends(model)
    vocab, width = embedding.weight.shape
    num = 1 if head.weight is embedding.weight else 2
    before = num_bytes(model)
    lines = place_embeddings(model, "8bit")
    assert before - num_bytes(model) == num * (4 * vocab * width - vocab * (width + 4))
    assert len(lines) == num and all("8 bit" in line and "MiB" in line for line in lines)


@families
def test_host_memory_takes_the_whole_weight_off_the_device(name):
    model = frozen(name)
    embedding, head = ends(model)
    sizes = {id(end.weight): end.weight.nbytes for end in (embedding, head)}
    before = num_bytes(model)
    lines = place_embeddings(model, "cpu")
    assert before - num_bytes(model) == sum(sizes.values())
    assert len(lines) == len(sizes) and all("host memory" in line for line in lines)


def test_on_the_device_nothing_is_done():
    model = build("llama2")  # trained in full
    before = dict(model.named_modules())
    assert place_embeddings(model, "device") == []
    assert dict(model.named_modules()) == before


@both
def test_casts_and_copies_leave_the_weight_as_it_is(where):
    model = placed("llama3", where, torch.bfloat16)
    values = ends(model)[0].weight.dense()
    twin = copy.deepcopy(model)
    assert ends(twin)[0].held is ends(twin)[1].held  # still one storage
    twin.double()
    assert torch.equal(ends(twin)[1].weight.dense(), values.double())
    assert ends(twin)[0](torch.tensor([3])).dtype == torch.float64
    assert torch.equal(ends(model)[0].weight.dense(), values)
    assert torch.equal(ends(twin.bfloat16())[0].weight.dense(), values)


@both
def test_an_id_that_is_not_in_the_vocabulary_is_refused(where):
    embedding = ends(placed("llama2", where))[0]
    for wrong in (-1, 301):
        with pytest.raises(IndexError):
            embedding(torch.tensor([wrong]))


@both
def test_the_weights_shape_and_type_cost_nothing_and_its_numbers_are_right(where, monkeypatch):
    model = placed("llama2", where, torch.bfloat16)
    embedding, head = ends(model)
    with monkeypatch.context() as patch:
        patch.setattr(type(head.held), "tiles", None)  # nobody may make the numbers
        assert head.weight.shape == (301, 64) and head.weight.dtype == torch.bfloat16
        assert head.weight.device == torch.device("cpu") and not head.weight.requires_grad
        assert head.weight.data_ptr() == head.weight.data_ptr() != embedding.weight.data_ptr()
    hidden = torch.randn(2, 5, 64, dtype=torch.bfloat16, requires_grad=True)
    logits = functional.linear(hidden, head.weight)
    assert torch.equal(logits, head(hidden))
    assert torch.equal(embedding(torch.arange(301)), embedding.weight.dense())
    grads = [
        torch.autograd.grad(z.float().square().sum(), hidden)[0] for z in (logits, head(hidden))
    ]
    assert torch.equal(*grads)


@both
@pytest.mark.usefixtures("small_tiles")
def test_a_head_with_a_bias_takes_any_leading_shape_and_autocast(where):
    model = frozen("llama2")
    model.lm_head = nn.Linear(64, 301).requires_grad_(False)
    plain = copy.deepcopy(model.lm_head)
    place_embeddings(model, where)
    plain.weight.data = model.lm_head.weight.dense()
    heads = model.lm_head, plain, copy.deepcopy(plain).double()
    for head in heads:
        head.bias.requires_grad_()  # as peft's `bias: all` does
    hidden = torch.randn(2, 3, 64)
    for x in (hidden, hidden[:, 1], hidden[0, 0], hidden[:0]):
        found = []
        for head in heads:
            leaf = x.to(head.bias.dtype).requires_grad_()
            logits = head(leaf)
            assert logits.shape == (*x.shape[:-1], 301)
            grads = torch.autograd.grad(logits.square().sum(), (leaf, head.bias))
            found.append((logits.detach(), *grads))
        assert all(judge("head", *group).passed for group in zip(*found, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        logits, original = (head(hidden).detach() for head in heads[:2])
    assert logits.dtype == torch.bfloat16
    assert judge_norm("logits", logits, original, heads[2](hidden.double()).detach()).passed


@both
def test_trained_embeddings_are_refused_in_a_sentence_and_nothing_is_changed(where):
    cases = {
        "full": (build("llama3"), "input embeddings"),
        "saved": (
            adapted(build("llama2"), target_modules=["q_proj"], modules_to_save=["lm_head"]),
            "head",
        ),
        "adapted": (adapted(build("llama2"), target_modules=["embed_tokens"]), "input embeddings"),
    }
    for model, which in cases.values():
        before = dict(model.named_modules())
        with pytest.raises(InputError, match=f"frozen.* {which} are trained.*; freeze") as error:
            place_embeddings(model, where)
        assert "\n" not in str(error.value)
        assert dict(model.named_modules()) == before


@both
@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_held_embeddings_cannot_be_trained_afterwards(where, saved):
    model, more = (
        placed("llama2", where),
        {"target_modules": ["q_proj"], "modules_to_save": [saved]},
    )
    if where == "8bit":
        with pytest.raises(RuntimeError, match="can require gradients"):
            adapted(model, **more)
        return
    model = adapted(model, **more)
    for use in (swap.attach, lambda model: model(**batch())):
        with pytest.raises(InputError, match="cannot be trained; set plan.embeddings: device"):
            use(model)


def test_what_is_held_is_not_held_again():
    with pytest.raises(InputError, match="does not know how to hold"):
        place_embeddings(placed("llama2", "cpu"), "8bit")


def test_an_embedding_that_does_something_else_is_refused():
    class Shifted(nn.Embedding):
        def forward(self, ids):
            return super().forward((ids + 1) % self.num_embeddings)

    model = frozen("llama2")
    model.model.embed_tokens = Shifted(301, 64).requires_grad_(False)
    with pytest.raises(
        InputError, match="does not know what the input embeddings compute; got Shifted"
    ):
        place_embeddings(model, "8bit")
    assert isinstance(model.model.embed_tokens, Shifted)


@both
@pytest.mark.parametrize("first", ["placed", "adapted"])
def test_the_adapter_is_put_on_saved_and_read_as_ever(where, first, tmp_path):
    from peft import PeftModel

    if first == "placed":
        model = adapted(placed("llama3", where))
    else:
        model = adapted(frozen("llama3"))
        place_embeddings(model, where)
    plain = adapted(frozen("llama3"))
    assert (
        model.peft_config["default"].target_modules == plain.peft_config["default"].target_modules
    )
    assert not any(p.requires_grad for end in ends(model) for p in end.parameters())
    model.save_pretrained(tmp_path)
    values = PeftModel.from_pretrained(build("llama3"), tmp_path).state_dict()
    lora = {key: value for key, value in plain.state_dict().items() if "lora" in key}
    assert lora and all(torch.equal(values[key], value) for key, value in lora.items())
    assert model.unload().config.tie_word_embeddings


@both
def test_a_model_without_its_weights_is_not_saved_as_a_whole(where, tmp_path):
    for name in ("llama2", "llama3"):
        with pytest.raises(RuntimeError):
            placed(name, where).save_pretrained(tmp_path)


@both
def test_a_family_nobody_has_heard_of_trains_around_them_and_the_engine_comes_out_again(where):
    model = build_unheard(True)
    for end in ends(model):
        end.requires_grad_(False)
    place_embeddings(model, where)
    before = gradients(model, batch())
    swap.attach(model)
    inside, truth = gradients(model, batch()), true_gradients(model, batch())
    for key, grad in inside[1].items():
        assert judge(key, grad, before[1][key], truth[1][key]).passed, key
    swap.detach(model)
    assert torch.equal(gradients(model, batch())[0], before[0])


@pytest.mark.gpu
@both
@pytest.mark.parametrize("name", ["llama2", "gemma3"])
@pytest.mark.usefixtures("small_tiles")
def test_on_cuda_the_numbers_are_the_dense_models_and_the_device_holds_less(name, where):
    dtype, inputs = torch.bfloat16, {key: x.cuda() for key, x in batch().items()}
    dense = adapted(dequantised(name, dtype) if where == "8bit" else frozen(name, dtype)).cuda()
    ours = frozen(name, dtype).cuda()
    before = num_bytes(ours)
    place_embeddings(ours, where)
    assert num_bytes(ours) < before and all(p.is_cuda for p in ours.parameters())
    if where == "cpu":
        assert ends(ours)[0].held.weight_VD.is_pinned()
        ids = torch.tensor([[7, 7, 300, 0]], device="cuda")
        assert torch.equal(ends(ours)[0](ids), ends(dense)[0](ids))
    ours = adapted(ours).cuda()
    _, exact = gradients(in_float64(dense), inputs)
    for inside in (False, True):
        for model in (dense, ours) if inside else ():
            swap.attach(model)
        _, grads = gradients(dense, inputs)
        for _ in range(3):  # buffers of the first pass are used again
            _, found = gradients(ours, inputs)
        for key, grad in found.items():
            assert judge_norm(key, grad, grads[key], exact[key]).passed, key
