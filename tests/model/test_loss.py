import pytest
import torch
from torch.nn import functional

from whet.model.loss import summed_loss


@pytest.fixture
def batch():
    torch.manual_seed(1)
    ids = torch.randint(3, 300, (3, 11))
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, :6] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def make(family, float64=True):
    import transformers

    torch.manual_seed(0)
    if family == "llama":
        config = transformers.LlamaConfig(
            vocab_size=301, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2,
        )  # fmt: skip
    else:
        config = transformers.GPT2Config(
            vocab_size=301,
            n_embd=32,
            n_layer=2,
            n_head=4,
            attn_pdrop=0,
            embd_pdrop=0,
            resid_pdrop=0,
        )
    model = transformers.AutoModelForCausalLM.from_config(config)
    return model.double() if float64 else model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loss_and_gradients_are_those_of_the_plain_model(family, batch):
    model = make(family)
    loss, num = summed_loss(model, batch)
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    target = batch["labels"][:, 1:].reshape(-1)
    plain = functional.cross_entropy(
        logits[:, :-1].float().reshape(-1, 301), target, ignore_index=-100, reduction="sum"
    )
    plain.backward()
    assert num == int((target != -100).sum())
    # Both are float32 sums over at most 30 rows.
    assert loss.item() == pytest.approx(plain.item(), rel=30 * 2**-23)
    for name, parameter in model.named_parameters():
        size = parameter.grad.abs().max()
        assert (ours[name] - parameter.grad).abs().max() <= 1e-5 * size, name


def test_padding_never_enters_the_loss(batch):
    model = make("llama")
    loss, num = summed_loss(model, batch)
    batch["input_ids"][0, 7:] = 17
    again, _ = summed_loss(model, batch)
    assert torch.equal(loss, again)
    longer = {
        k: functional.pad(v, (0, 5), value=-100 if k == "labels" else 0) for k, v in batch.items()
    }
    padded, same = summed_loss(model, longer)
    assert same == num and padded.item() == pytest.approx(loss.item(), rel=1e-6)


def test_no_labels_at_all_is_a_loss_of_zero_with_zero_gradients(batch):
    model = make("llama")
    batch["labels"].fill_(-100)
    loss, num = summed_loss(model, batch)
    loss.backward()
    assert num == 0 and loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
