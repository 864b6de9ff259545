"""One step's gradient is the same however it is cut into passes, and equals the padded original's."""

import pytest
import torch
from tests.engine.families import FAMILIES, adapted, build, gradients, judge_norm, true_gradients

from whet.data.packing import Packing
from whet.data.tokenize import IGNORED, Tokens, collate
from whet.engine import swap
from whet.engine.swap import EngineSettings
from whet.model.loss import summed_loss

LENGTHS = (31, 7, 52, 18, 3, 44, 26, 12)


def rows_of(vocab=301):
    generator = torch.Generator().manual_seed(4)
    rows = []
    for number, length in enumerate(LENGTHS):
        ids = torch.randint(1, vocab, (length,), generator=generator).tolist()
        prompt = min(length - 1, 1 + number % 4)
        rows.append(Tokens(ids, [IGNORED] * prompt + ids[prompt:], f"row {number}"))
    return rows


def step_gradients(model, batches, num_items):
    model.train()
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = summed_loss(model, batch)[0] / num_items
        loss.backward()
        total += loss.detach()
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_has_the_same_gradient_for_every_tokens_per_pass(name, kind):
    model = build(name) if kind == "full" else adapted(build(name))
    rows = rows_of()
    num_items = sum(row.num_labels for row in rows)
    swap.attach(model, EngineSettings(check="off"))
    assert swap.takes_packed(model)
    found = {}
    for tokens_per_pass in (sum(LENGTHS), 100, 1):  # one pass, two, one example a pass
        packing = Packing(tokens_per_pass)
        passes = packing.passes(rows)
        batches = [packing.batch(group, 0) for group in passes]
        found[len(passes)] = step_gradients(model, batches, num_items)
    assert set(found) == {1, 2, 8}
    buckets = Packing(256, buckets=True)
    found["padded to a bucket"] = step_gradients(model, [buckets.batch(rows, 0)], num_items)
    swap.detach(model)
    padded = collate(rows, 0)
    loss, original = gradients(model, padded, num_items_in_batch=num_items)
    exact, truth = true_gradients(model, padded)
    assert abs(float(loss - exact)) < 1e-5 * float(exact)
    for cut, (found_loss, grads) in found.items():
        assert float(found_loss) == pytest.approx(float(exact), rel=1e-5), cut
        assert grads.keys() == truth.keys(), cut
        for parameter, grad in truth.items():
            comparison = judge_norm(parameter, grads[parameter], original[parameter], grad)
            # Eight small sums have other rounding errors than one: a few in the last place.
            assert comparison.passed or comparison.error <= 2e-6 * grad.norm(), (cut, comparison)


def test_however_a_step_is_cut_every_label_counts_once():
    rows = rows_of()
    for size in range(1, sum(LENGTHS) + 5, 3):
        for split in (False, True):
            packing = Packing(size, split=split)
            batches = [packing.batch(group, 0) for group in packing.passes(rows)]
            labels = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
            assert labels == sum(row.num_labels for row in rows)
