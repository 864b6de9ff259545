"""Every family computes what its original computes: loss and all gradients, padded and packed."""

import pytest
import torch

from tests.engine.families import (
    FAMILIES,
    adapted,
    batch,
    build,
    gradients,
    in_nf4,
    packed_batch,
    true_gradients,
)
from whet.engine import swap
from whet.engine.parity import judge

BATCHES = {
    "right": batch,
    "left": lambda: batch("left"),
    "packed": packed_batch,
}


def make(family, method, dtype=torch.float32):
    model = build(family, dtype)
    if method == "nf4":
        model = in_nf4(model)
    return model if method == "full" else adapted(model)


def compare(model, inputs):
    """Return what fails the triangulated bound, original against engine, on one batch."""
    truth = true_gradients(model, inputs)
    original = gradients(model, inputs)
    swap.attach(model)
    ours = gradients(model, inputs)
    assert ours[1].keys() == original[1].keys() == truth[1].keys()
    compared = [judge("loss", ours[0], original[0], truth[0])]
    for name, gradient in ours[1].items():
        compared.append(judge(name, gradient, original[1][name], truth[1][name]))
    swap.detach(model)
    return [one for one in compared if not one.passed]


@pytest.mark.parametrize("method", ["lora", "full", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_gives_the_originals_loss_and_gradients(family, method):
    model = make(family, method)
    for name, inputs in BATCHES.items():
        assert not compare(model, inputs()), f"{name} batch"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_report_says_what_is_fused_and_why_not(family):
    model = adapted(build(family))
    report = swap.attach(model)
    kept = {part.part for part in report.parts if not part.fused}
    assert kept == set(FAMILIES[family].kept)
    assert all(part.reason for part in report.parts if not part.fused)
    assert report.layers_total == 2
    assert report.layers_fused == (2 if not kept else 0)


@pytest.mark.parametrize("family", ["llama3", "gemma2", "qwen3", "gpt2", "phi4"])
def test_bfloat16_is_as_close_to_the_truth_as_the_original(family):
    model = make(family, "lora", torch.bfloat16)
    inputs = batch()
    truth = true_gradients(model, inputs)
    original = gradients(model, inputs)
    swap.attach(model)
    ours = gradients(model, inputs)

    def error(found):
        # Sixteen bits: single entries scatter, so all gradients are judged together.
        apart = [(g.double() - truth[1][n]).square().sum() for n, g in found[1].items()]
        return float(sum(apart)) ** 0.5

    assert error(ours) <= 1.5 * error(original)
    assert abs(ours[0] - truth[0]) <= 2 * abs(original[0] - truth[0]) + 1e-3


@pytest.mark.parametrize("family", [name for name in FAMILIES if not FAMILIES[name].kept])
def test_documents_of_a_pack_never_see_each_other(family):
    model = build(family).eval()
    swap.attach(model)
    inputs = packed_batch((7, 12, 5))
    changed = {k: v.clone() for k, v in inputs.items()}
    changed["input_ids"][0, :7] = (changed["input_ids"][0, :7] + 17) % 301
    with torch.no_grad():
        a = model(**inputs, use_cache=False).logits
        b = model(**changed, use_cache=False).logits
    assert not torch.equal(a[0, :7], b[0, :7])
    assert torch.equal(a[0, 7:], b[0, 7:])


def test_an_out_of_reach_window_and_one_inside_differ_as_the_original_does():
    for family in ("mistral", "gemma2", "gemma3"):
        model = build(family).eval()
        ids = batch(rows=1, width=33)["input_ids"]
        with torch.no_grad():
            theirs = model(ids, use_cache=False).logits
            swap.attach(model)
            ours = model(ids, use_cache=False).logits
        assert torch.allclose(ours, theirs, atol=1e-4 * float(theirs.abs().max()))
