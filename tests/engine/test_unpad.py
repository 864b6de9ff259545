"""A padded batch becomes packed tokens and comes back; documents begin where they should."""

import pytest
import torch

from tests.engine.families import (
    batch,
    build,
    gradients,
    in_float64,
    packed_batch,
    true_gradients,
)
from whet.engine import swap
from whet.engine.parity import judge
from whet.engine.unpad import from_lengths, pack_batch

CPU = torch.device("cpu")


def pack(mask, positions=None, cu_seqlens=None, shape=None):
    mask = None if mask is None else torch.tensor(mask)
    positions = None if positions is None else torch.tensor(positions)
    cu_seqlens = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)
    return pack_batch(shape or tuple(mask.shape), mask, positions, cu_seqlens, CPU)


def check_round_trip(packed, mask):
    """Packing takes the real tokens in order; padding puts them back, with zeros beside them."""
    torch.manual_seed(0)
    values = torch.randn(*mask.shape, 3)
    flat = packed.pack(values)
    assert torch.equal(flat, values[mask.bool()])
    assert torch.equal(packed.pad(flat), values * mask[..., None])
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.cu_seqlens.tolist()[-1] == packed.num_tokens == int(mask.sum())
    assert packed.cu_seqlens.diff().tolist() == list(packed.lengths)


def test_right_padding_is_left_out():
    mask = [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]
    packed = pack(mask)
    assert packed.lengths == (4, 2, 1)
    assert packed.longest == 4
    assert packed.positions_T.tolist() == [0, 1, 2, 3, 0, 1, 0]
    assert packed.index_T.tolist() == [0, 1, 2, 3, 4, 5, 8]
    check_round_trip(packed, torch.tensor(mask))


def test_left_padding_is_left_out_and_positions_count_it_as_transformers_does():
    mask = [[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]]
    packed = pack(mask)
    assert packed.lengths == (3, 1, 4)
    assert packed.positions_T.tolist() == [1, 2, 3, 3, 0, 1, 2, 3]
    check_round_trip(packed, torch.tensor(mask))


def test_padding_on_both_sides_is_left_out():
    mask = [[0, 1, 1, 0], [1, 1, 1, 1]]
    packed = pack(mask)
    assert packed.lengths == (2, 4)
    check_round_trip(packed, torch.tensor(mask))


@pytest.mark.parametrize("mask", [[[1, 0, 1, 1]], [[0, 1, 0, 1]], [[1, 1, 1, 1], [1, 0, 0, 1]]])
def test_a_mask_with_a_hole_is_not_packed(mask):
    assert pack(mask) is None


def test_a_row_without_a_real_token_gives_no_document():
    mask = [[1, 1, 0], [0, 0, 0], [0, 1, 1]]
    packed = pack(mask)
    assert packed.lengths == (2, 2)
    check_round_trip(packed, torch.tensor(mask))


def test_a_batch_without_a_real_token_has_no_tokens():
    packed = pack([[0, 0], [0, 0]])
    assert packed.num_tokens == 0 and packed.lengths == () and packed.longest == 0
    assert torch.equal(packed.pad(packed.pack(torch.ones(2, 2, 3))), torch.zeros(2, 2, 3))


def test_one_token_is_one_document():
    packed = pack([[1]])
    assert packed.lengths == (1,) and packed.cu_seqlens.tolist() == [0, 1]
    check_round_trip(packed, torch.ones(1, 1, dtype=torch.int64))


def test_without_padding_nothing_is_copied():
    packed = pack(None, shape=(2, 3))
    values = torch.randn(2, 3, 5)
    assert packed.index_T is None and packed.lengths == (3, 3)
    assert packed.pack(values).data_ptr() == values.data_ptr()
    assert packed.pad(packed.pack(values)).data_ptr() == values.data_ptr()


def test_positions_that_restart_begin_a_document():
    packed = pack(None, [[0, 1, 2, 0, 0, 1], [0, 1, 0, 1, 2, 3]], shape=(2, 6))
    assert packed.lengths == (3, 1, 2, 2, 4)
    check_round_trip(packed, torch.ones(2, 6, dtype=torch.int64))


def test_positions_of_one_row_serve_every_row():
    packed = pack(None, [[5, 6, 7]], shape=(2, 3))
    assert packed.lengths == (3, 3)
    assert packed.positions_T.tolist() == [5, 6, 7, 5, 6, 7]


def test_a_row_ends_a_document_though_positions_go_on():
    packed = pack(None, [[0, 1, 2], [3, 4, 5]], shape=(2, 3))
    assert packed.lengths == (3, 3)


def test_padding_behind_packed_documents_is_left_out():
    mask = [[1, 1, 1, 1, 1, 0, 0]]
    packed = pack(mask, [[0, 1, 2, 0, 1, 0, 0]])
    assert packed.lengths == (3, 2)
    check_round_trip(packed, torch.tensor(mask))


def test_known_boundaries_are_taken_as_they_are():
    packed = pack(None, None, [0, 2, 5, 6], shape=(1, 6))
    assert packed.lengths == (2, 3, 1)
    assert packed.cu_seqlens.tolist() == [0, 2, 5, 6]


def test_an_empty_document_is_none():
    packed = pack(None, None, [0, 0, 2, 2, 5, 5], shape=(1, 5))
    assert packed.lengths == (2, 3) and packed.cu_seqlens.tolist() == [0, 2, 5]


def test_masks_of_every_type_mean_the_same():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    for kind in (torch.bool, torch.int32, torch.float32, torch.bfloat16):
        packed = pack_batch((2, 3), mask.to(kind), None, None, CPU)
        assert packed.lengths == (2, 3)


def test_documents_of_given_lengths_lie_side_by_side():
    packed = from_lengths([3, 1, 2])
    assert packed.positions_T.tolist() == [0, 1, 2, 0, 0, 1]
    assert packed.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert packed.batch_shape == (1, 6)


def test_what_is_not_real_gets_no_gradient_and_what_is_gets_its_own():
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    packed = pack(mask.tolist())
    values = torch.randn(2, 3, 4, requires_grad=True)
    upstream = torch.randn(2, 3, 4)
    packed.pad(packed.pack(values)).backward(upstream)
    assert torch.equal(values.grad, upstream * mask[..., None])


def flattened(**settings):
    """What transformers' own collator makes of three documents."""
    from transformers import DataCollatorWithFlattening

    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(1, 301, (n,), generator=generator).tolist() for n in (7, 1, 12)]
    return DataCollatorWithFlattening(return_tensors="pt", **settings)(
        [{"input_ids": row} for row in rows]
    )


@pytest.mark.parametrize("settings", [
    {}, {"return_flash_attn_kwargs": True},
    {"return_flash_attn_kwargs": True, "return_position_ids": False},
    {"return_flash_attn_kwargs": True, "return_seq_idx": True},
], ids=str)  # fmt: skip
def test_what_transformers_flattens_is_learned_document_by_document(settings):
    model, inputs = build("llama3"), dict(flattened(**settings))
    if settings.get("return_flash_attn_kwargs"):
        assert inputs["cu_seq_lens_q"].tolist() in ([0, 7, 8, 20], [[0, 7, 8, 20]])
    with_positions = dict(flattened())
    truth = true_gradients(model, with_positions)
    original = gradients(model, with_positions)
    swap.attach(model)
    ours = gradients(model, inputs)
    assert judge("loss", ours[0], original[0], truth[0]).passed
    for name, grad in ours[1].items():
        judged = judge(name, grad, original[1][name], truth[1][name])
        # Without position ids the rotation goes on from document to document, which changes nothing
        # but rounding: scores know the distance of two tokens alone.
        assert judged.error <= (3 if "return_position_ids" in settings else 1) * judged.bound


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_row_of_padding_alone_changes_nothing(side):
    model, inputs = build("qwen3"), batch(side)
    swap.attach(model)
    loss, grads = gradients(model, inputs)
    extra = {
        "input_ids": torch.zeros(1, 17, dtype=torch.int64),
        "attention_mask": torch.zeros(1, 17, dtype=torch.int64),
        "labels": torch.full((1, 17), -100),
    }
    wider = {key: torch.cat([value[:1], extra[key], value[1:]]) for key, value in inputs.items()}
    found = gradients(model, wider)
    assert torch.equal(found[0], loss)
    assert all(torch.equal(found[1][name], grad) for name, grad in grads.items())


def test_a_mask_with_a_hole_runs_the_padded_original():
    model, inputs = build("llama2"), batch()
    inputs["attention_mask"][0, 5] = 0
    truth = gradients(in_float64(model), inputs)
    original = gradients(model, inputs)
    swap.attach(model)
    ours = gradients(model, inputs)
    assert judge("loss", ours[0], original[0], truth[0]).passed
    for name, grad in ours[1].items():
        assert judge(name, grad, original[1][name], truth[1][name]).passed, name


def test_one_token_through_the_decoder_is_the_originals():
    model = build("gemma3").eval()
    ids = torch.tensor([[7]])
    with torch.no_grad():
        theirs = model(input_ids=ids, use_cache=False).logits
        exact = build("gemma3", torch.float64).eval()(input_ids=ids, use_cache=False).logits
        swap.attach(model)
        ours = model(input_ids=ids, use_cache=False).logits
    assert judge("logits", ours, theirs, exact).passed


def test_a_pack_of_many_rows_pads_back_to_its_rows():
    model = build("llama2").eval()
    pieces = [packed_batch((5, 4)), packed_batch((2, 7))]
    inputs = {key: torch.cat([p[key] for p in pieces]) for key in ("input_ids", "position_ids")}
    truth = in_float64(model)
    with torch.no_grad():
        exact, theirs = (program(**inputs, use_cache=False).logits for program in (truth, model))
        swap.attach(model)
        ours = model(**inputs, use_cache=False).logits
    assert ours.shape == (2, 9, 301)
    assert judge("logits", ours, theirs, exact).passed
