"""Decoding with the engine: the same tokens as transformers' generate, whatever joins and leaves."""

import pytest
import torch
from torch import nn

from tests.engine.families import FAMILIES, adapted, build, in_nf4
from whet.engine import decode, decoder, product, swap
from whet.engine import ready as room
from whet.engine.decoder import Decoder
from whet.engine.ready import decode_for_generate, make_ready

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [3], [4, 9, 22, 80]]
FORCED = torch.randint(1, 301, (3, 9), generator=torch.Generator().manual_seed(0)).tolist()
FUSED = [name for name, family in FAMILIES.items() if "attention" not in family.kept]


def theirs(model, prompts, num=14):
    """Transformers' generate on each prompt alone, by the original code."""
    swap.detach(model)
    with torch.no_grad():
        return [
            model.generate(
                input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long(),
                max_new_tokens=num, do_sample=False, eos_token_id=None, pad_token_id=0,
            )[0, len(ids) :].tolist()
            for ids in prompts
        ]  # fmt: skip


def ours(ready, prompts, num=14):
    made = Decoder(ready)
    last = torch.cat(made.start(prompts)).argmax(-1).tolist()
    answers = [[token] for token in last]
    for _ in range(num - 1):
        last = made.step(last).argmax(-1).tolist()
        for answer, token in zip(answers, last, strict=True):
            answer.append(token)
    return answers


def forced_logits(ready):
    """Logits behind each prompt and behind each token of a given answer."""
    made = Decoder(ready)
    found = [torch.cat(made.start(PROMPTS))]
    found += [made.step(list(tokens)) for tokens in zip(*FORCED, strict=True)]
    return torch.stack(found, 1)


@pytest.mark.parametrize("kind", ["dense", "adapter", "nf4"])
@pytest.mark.parametrize("name", FUSED)
def test_every_family_decodes_the_tokens_that_transformers_generates(name, kind):
    model = build(name).eval()
    model = in_nf4(model) if kind == "nf4" else adapted(model) if kind == "adapter" else model
    ready = make_ready(model.eval())
    assert not isinstance(ready, str), ready
    assert ready.copies
    found, forced = ours(ready, PROMPTS), forced_logits(ready)
    assert found == theirs(model, PROMPTS)
    for n, logits in enumerate(forced):  # a model that likes one token most would hide much
        ids = torch.tensor([PROMPTS[n] + FORCED[n]])
        with torch.no_grad():
            expected = model(ids).logits[0, len(PROMPTS[n]) - 1 :]
        assert torch.allclose(logits, expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["llama3", "gemma3", "phi4"])
def test_without_room_for_a_copy_the_live_modules_decode(name, monkeypatch):
    monkeypatch.setattr(room, "_has_room", lambda base: False)
    model = adapted(build(name)).eval()
    ready = make_ready(model)
    assert not ready.copies and ready.head is None
    assert all(layer.qkv.weight is None for layer in ready.layers.values())
    assert ours(ready, PROMPTS) == theirs(model, PROMPTS)


def test_without_onednn_the_copies_are_plain(monkeypatch):
    monkeypatch.setattr(product, "packed_weight", lambda weight: None)
    model = adapted(build("gpt2")).eval()
    ready = make_ready(model)
    assert ready.copies and not next(iter(ready.layers.values())).qkv.packed
    assert ours(ready, PROMPTS) == theirs(model, PROMPTS)


@pytest.mark.parametrize("name", ["llama3", "mistral", "gemma2"])
def test_sequences_join_and_leave_between_steps(name):
    model = build(name).eval()
    ready = make_ready(model)
    made, alone = Decoder(ready), {}
    prompts = {"a": PROMPTS[0], "b": PROMPTS[1], "c": PROMPTS[2], "d": [7] * 21}
    rows: list[str] = []

    def join(*names):
        logits = made.start([prompts[n] for n in names])
        rows.extend(names)
        alone.update({n: [int(z[-1].argmax())] for n, z in zip(names, logits, strict=True)})

    def steps(num):
        for _ in range(num):
            logits = made.step([alone[n][-1] for n in rows])
            for n, z in zip(rows, logits, strict=True):
                alone[n].append(int(z.argmax()))

    def leave(*names):
        kept = made.drop([rows.index(n) for n in names])
        rows[:] = [rows[row] for row in kept]

    join("a", "b")
    steps(3)
    join("c")
    steps(2)
    leave("a")
    join("d")
    steps(50)  # past the slots' first capacity
    leave("d", "b")
    steps(4)
    assert rows == ["c"] and made.num_rows == 1
    for name_, answer in alone.items():
        (expected,) = theirs(model, [prompts[name_]], len(answer))
        assert answer == expected, name_


def test_logits_behind_every_token_of_a_prompt():
    model = build("qwen3").eval()
    made = Decoder(make_ready(model))
    found = made.start(PROMPTS, every=True)
    swap.detach(model)
    for ids, logits in zip(PROMPTS, found, strict=True):
        with torch.no_grad():
            assert torch.allclose(logits, model(torch.tensor([ids])).logits[0], atol=2e-4)


@pytest.mark.parametrize("name", ["llama2", "mistral", "gemma3", "gpt2"])
def test_generate_itself_gets_its_new_tokens_from_the_engine(name, monkeypatch):
    model = adapted(build(name)).eval()
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    settings = [
        {"do_sample": False},
        {"do_sample": True, "top_k": 20, "repetition_penalty": 1.2},
        {"num_beams": 3, "do_sample": False},
    ]

    def run():
        found = []
        for more in settings:
            torch.manual_seed(0)
            with torch.no_grad():
                found.append(model.generate(
                    **batch, max_new_tokens=12, eos_token_id=None, pad_token_id=0, **more
                ).tolist())  # fmt: skip
        return found

    expected = run()
    steps = []
    step = decode.CacheStep.__init__
    monkeypatch.setattr(
        decoder, "CacheStep", type("Counted", (decode.CacheStep,), {
            "__init__": lambda self, *a: (steps.append(1), step(self, *a))[1]}),
    )  # fmt: skip
    swap.attach(model)
    assert decode_for_generate(model, True) == ""
    assert run() == expected
    assert len(steps) == 11 * len(settings)
    decode_for_generate(model, False)
    assert run() == expected and len(steps) == 11 * len(settings)


def test_calls_that_ask_for_more_go_to_the_original():
    model = build("llama3").eval()
    swap.attach(model)
    decode_for_generate(model, True)
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        more = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
        found = model.generate(ids, output_hidden_states=True, pad_token_id=0, **more)
    assert len(found.hidden_states[1]) == 3  # of every layer
    static = model.generate(ids, cache_implementation="static", max_new_tokens=3, pad_token_id=0)
    assert static.tolist() == found.sequences.tolist()


def test_what_was_trained_since_is_seen():
    model = adapted(build("llama3")).eval()
    ready = make_ready(model)
    before = ours(ready, PROMPTS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-2)
    after = ours(ready, PROMPTS)
    assert after != before
    with model.disable_adapter():
        base = ours(ready, PROMPTS)
    assert base != after and ours(ready, PROMPTS) == after
    assert after == theirs(model, PROMPTS)
    with model.disable_adapter():
        assert base == theirs(model, PROMPTS)


def sabotaged(fault, monkeypatch):
    if fault == "adapter left out":
        merge = product.merged
        monkeypatch.setattr(
            product,
            "merged",
            lambda p, dtype: merge(type(p)(p.weight, p.bias_N, None, p.transposed), dtype),
        )
    elif fault == "one token too many is seen":
        attend = decode.attend_one
        monkeypatch.setattr(
            decode, "attend_one",
            lambda q, k, v, visible, spec: attend(q, k, v, None, spec),
        )  # fmt: skip
    elif fault == "keys written to a wrong place":
        step = decode.SlotStep.attend

        def attend_shifted(self, number, spec, q, kv):
            return step(self, number, spec, q, kv.roll(1, 0))

        monkeypatch.setattr(decode.SlotStep, "attend", attend_shifted)
    elif fault == "rotation backwards":
        monkeypatch.setattr(
            decode.Step, "angles", lambda self, a: (a[0][0, :, None], a[1][0, :, None])
        )
    else:
        monkeypatch.setattr(decode, "_add", lambda layer, half, x, z: x + z * 1.01)
        monkeypatch.setattr(decode, "_behind", lambda layer, half, x, p, z: x + 1.01 * p(z))


@pytest.mark.parametrize(
    "fault",
    [
        "adapter left out", "one token too many is seen", "keys written to a wrong place",
        "rotation backwards", "residual off by a percent",
    ],
)  # fmt: skip
def test_a_decoder_that_answers_otherwise_is_not_used(fault, monkeypatch):
    model = adapted(build("llama3")).eval()
    monkeypatch.setattr(room, "_has_room", lambda base: True)
    swap.attach(model)
    sabotaged(fault, monkeypatch)
    found = make_ready(model)
    if fault == "adapter left out":  # the live modules still have it
        assert not isinstance(found, str) and not found.copies
    else:
        assert isinstance(found, str) and "off by" in found


def test_a_wrong_position_is_caught_by_the_whole_model(monkeypatch):
    model = build("llama3").eval()
    hidden = decoder.ReadyModel.hidden
    monkeypatch.setattr(
        decoder.ReadyModel, "hidden",
        lambda self, ids, positions, step: hidden(self, ids, positions * 3, step),
    )  # fmt: skip
    assert "logits differ" in make_ready(model)


def test_what_keeps_its_own_attention_is_not_decoded():
    assert "latent" in make_ready(build("deepseek_v3").eval())
    model = build("llama3").eval()
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: None)
    found = make_ready(model)
    assert isinstance(found, str) and found


def test_bfloat16_is_within_the_bound():
    model = adapted(build("llama3", torch.bfloat16)).eval()
    ready = make_ready(model)
    assert not isinstance(ready, str), ready
    logits = torch.cat([z[-1:] for z in Decoder(ready).start(PROMPTS)])
    swap.detach(model)
    with torch.no_grad():
        expected = torch.stack([model(torch.tensor([ids])).logits[0, -1] for ids in PROMPTS])
    assert (logits - expected).float().norm() < 0.05 * expected.float().norm()


def test_a_product_adds_biases_and_residual():
    torch.manual_seed(0)
    layers = [nn.Linear(24, n, bias=n != 8) for n in (16, 8, 40)]
    x, more = torch.randn(3, 24), torch.randn(3, 64)
    expected = torch.cat([layer(x) for layer in layers], -1)
    with torch.no_grad():
        made = product.ready_product(layers, torch.float32)
        assert torch.allclose(made(x), expected, atol=1e-5)
        assert torch.allclose(made(x, more), expected + more, atol=1e-5)
        live = product.live_product(layers)
        assert torch.allclose(live(x, more), expected + more, atol=1e-6)
    hooked = nn.Linear(24, 16)
    hooked.register_forward_hook(lambda m, i, o: o + 1)
    assert product.ready_product([hooked], torch.float32).weight is None
