"""The loop of generation: batches, stop texts, log-probabilities, and draws like transformers' own."""

import random

import pytest
import torch

from tests.engine.families import FAMILIES, build
from whet.answer import Answer, GrowingText, Request
from whet.decoding import Batch, OriginalDecoder, make_decoder
from whet.errors import InputError
from whet.generate import Sampling, complete, end_token_ids, generate, stream
from whet.sampling import choose
from whet.trained import load_trained

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [3], [4, 9, 22, 80], [17, 18], [40] * 12]


@pytest.fixture(scope="module")
def loaded(tiny_model):
    return load_trained(str(tiny_model), ["model.dtype=float32"])


class Letters:
    """A tokenizer whose tokens are the texts it is given; `#` is special."""

    def __init__(self, *pieces):
        self.pieces = [*(piece for piece in pieces if piece != "#"), "#"]

    def decode(self, ids, skip_special_tokens=False):
        text = "".join(self.pieces[i] for i in ids)
        return text.replace("#", "") if skip_special_tokens else text


def scripted(words, sampling, **more):
    """Let an answer take the given tokens, as a model with no doubts would make them."""
    tokenizer = Letters(*dict.fromkeys(words))
    ids = [tokenizer.pieces.index(word) for word in words]
    answer = Answer(
        Request([0], sampling, **more), tokenizer, frozenset([len(tokenizer.pieces) - 1])
    )
    told = []
    for token in ids:
        logits = torch.zeros(len(tokenizer.pieces))
        logits[token] = 9.0
        answer.take(logits)
        told.append(answer.take_piece()[0])
        if answer.finish:
            break
    return answer, told


@pytest.mark.parametrize("batch_size", [2, 5])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_family_answers_as_transformers_generate_does(name, batch_size, tokenizer):
    model = build(name).eval()
    sampling = Sampling(max_new_tokens=9, repetition_penalty=8.0)
    batch = Batch(make_decoder(model, tokenizer), tokenizer, [])
    answers = complete(batch, [Request(ids, sampling) for ids in PROMPTS], batch_size)
    for ids, answer in zip(PROMPTS, answers, strict=True):
        expected = model.generate(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long(),
            max_new_tokens=9, do_sample=False, repetition_penalty=8.0, eos_token_id=None,
            pad_token_id=0,
        )[0, len(ids) :].tolist()  # fmt: skip
        assert answer.tokens == expected and answer.finish == "length"
        assert len(set(expected)) > 2


@pytest.mark.parametrize("name", ["llama3", "mistral", "gemma3", "deepseek_v3", "gpt2"])
def test_without_the_engine_a_padded_batch_is_the_same(name, tokenizer):
    model = build(name).eval()
    sampling = Sampling(max_new_tokens=9, repetition_penalty=8.0)
    requests = [Request(ids, sampling, logprobs=0, echo=True) for ids in PROMPTS]

    def answers(decoder, size):
        return complete(Batch(decoder, tokenizer, []), requests, size)

    together = answers(OriginalDecoder(model, 0), 3)
    alone = answers(OriginalDecoder(model, 0), 1)
    fused = answers(make_decoder(model, tokenizer), 3)
    for one, two, three in zip(together, alone, fused, strict=True):
        assert one.tokens == two.tokens == three.tokens
        for found in (one, three):
            scores = [x.logprob for x in found.prompt_logprobs[1:] + found.logprobs]
            expected = [x.logprob for x in two.prompt_logprobs[1:] + two.logprobs]
            assert scores == pytest.approx(expected, abs=2e-4)
        assert len(one.prompt_logprobs) == len(one.request.prompt)


def test_an_answer_is_the_same_whatever_else_is_in_the_batch(loaded):
    prompts = ["turn red", "the", "four into a number and a user of it", "a"]
    sampling = Sampling(max_new_tokens=10, temperature=0.9, top_p=0.95, seed=3)

    def texts(chosen, size):
        found = generate(loaded.model, loaded.tokenizer, chosen, sampling, batch_size=size)
        return [completion.text for completion in found]

    alone = [texts([prompt], 1)[0] for prompt in prompts]
    assert texts(prompts, 4) == texts(prompts, 2) == alone
    assert texts(prompts[::-1], 3) == alone[::-1]


def test_choices_of_one_prompt_differ_and_repeat(loaded):
    sampling = Sampling(max_new_tokens=8, temperature=1.0, seed=5)
    ids = loaded.tokenizer("the user", add_special_tokens=False)["input_ids"]

    def run():
        batch = Batch(make_decoder(loaded.model, loaded.tokenizer), loaded.tokenizer, [])
        requests = [Request(ids, sampling, choice) for choice in range(3)]
        return [answer.tokens for answer in complete(batch, requests, 3)]

    first = run()
    assert first == run() and len({tuple(tokens) for tokens in first}) == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 7},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 0.8, "top_k": 40, "top_p": 0.9},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 1.5, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.7},
        {"temperature": 1.0, "top_p": 1e-9},
    ],
    ids=str,
)
@pytest.mark.parametrize("vocab", [31, 2003])
def test_draws_are_transformers_distribution(settings, vocab):
    from transformers import generation as filters

    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(1, vocab, generator=generator) * 4
    seen = [0, 3, 3, 9, int(logits.argmax())]
    scores = logits
    chain = [
        ("repetition_penalty", filters.RepetitionPenaltyLogitsProcessor),
        ("temperature", filters.TemperatureLogitsWarper),
        ("top_k", filters.TopKLogitsWarper),
        ("top_p", filters.TopPLogitsWarper),
        ("min_p", filters.MinPLogitsWarper),
    ]
    for name, kind in chain:
        if name in settings:
            scores = kind(settings[name])(torch.tensor([seen]), scores)
    expected = scores.double().softmax(-1)[0]
    sampling = Sampling(**settings)
    num = 4000
    drawn = [choose(logits[0], sampling, seen, (n + 0.5) / num) for n in range(num)]
    found = torch.bincount(torch.tensor(drawn), minlength=vocab).double() / num
    # Evenly spread numbers: each share is within one draw of its probability at either end.
    assert float((found - expected).abs().max()) <= 2 / num
    assert set(drawn) <= set(expected.nonzero()[:, 0].tolist())


def test_the_smallest_and_largest_random_numbers_draw_likely_tokens():
    logits = torch.tensor([-torch.inf, 1.0, 2.0, -torch.inf])
    for settings in ({"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}):
        drawn = {choose(logits, Sampling(**settings), [], u) for u in (0.0, 1 - 2**-53)}
        assert drawn == {1, 2}


def test_several_wrong_settings_are_told_at_once():
    with pytest.raises(InputError, match="top_k.*min_p.*repetition_penalty.*stop"):
        Sampling(top_k=-1, min_p=2, repetition_penalty=0, stop=("",))


def test_a_stop_text_ends_an_answer_wherever_tokens_are_cut():
    pieces = ["He", "llo", " wo", "r", "ld", "\nUs", "er", ":", " more"]
    sampling = Sampling(max_new_tokens=50, stop=("\nUser:", "zzz"))
    answer, told = scripted(pieces, sampling, pieces=True, logprobs=0)
    assert answer.text == "Hello world" == "".join(told)
    assert answer.finish == "stop" and answer.stop == "\nUser:" and len(answer.tokens) == 8
    assert [x.token for x in answer.logprobs] == pieces[:5]
    assert "\nUs" not in told  # held back while it might become the stop text


def test_what_only_begins_like_a_stop_text_is_told():
    pieces = ["a", "\nUs", "ual", "ly", "#"]
    answer, told = scripted(pieces, Sampling(stop=("\nUser:",)), pieces=True, logprobs=0)
    assert "".join(told) == answer.text == "a\nUsually" and answer.finish == "stop"
    assert told == ["a", "", "\nUsual", "ly", ""] and answer.stop is None
    assert [x.token for x in answer.logprobs] == pieces


def test_a_stop_text_inside_of_a_token_cuts_it():
    answer, told = scripted(["abc", "dSTOPe"], Sampling(stop=("STOP",)), pieces=True)
    assert answer.text == "abcd" == "".join(told)
    answer, _ = scripted(["abc", "dSTOPe"], Sampling(stop=("STOP",)), logprobs=0)
    assert [item.token for item in answer.logprobs] == ["abc", "dSTOPe"]


def test_the_first_of_two_stop_texts_counts():
    answer, _ = scripted(["one ", "two ", "three"], Sampling(stop=("three", "two")))
    assert answer.text == "one " and answer.stop == "two"


def test_the_longest_answer_ends_in_a_held_back_text():
    answer, told = scripted(
        ["x", "\nU", "y"], Sampling(max_new_tokens=2, stop=("\nUser",)), pieces=True
    )
    assert answer.finish == "length" and answer.text == "x\nU" == "".join(told)


TEXTS = [
    "plain words, and more", "مرحبا بالعالم، كيف الحال؟", "日本語のテキスト", "a😀b👩‍👩‍👧c", "é\n\t x  y",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_growing_text_is_the_whole_text_in_whole_characters(text, tokenizer):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = [*ids[:2], tokenizer.eos_token_id, *ids[2:]]  # a special token has no text
    growing = GrowingText(tokenizer)
    pieces = [growing.push(token) for token in ids]
    pieces.append(growing.rest())
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 3


def test_growing_text_of_any_bytes_is_what_the_tokenizer_decodes(tokenizer):
    draw = random.Random(0)
    for _ in range(30):
        ids = [draw.randrange(3, len(tokenizer)) for _ in range(40)]
        growing = GrowingText(tokenizer)
        pieces = [growing.push(token) for token in ids]
        assert "".join(pieces) + growing.rest() == tokenizer.decode(ids)


def test_growing_text_keeps_a_sentencepiece_tokenizers_blanks():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [
        "<unk>",
        "▁the",
        "▁user",
        "s",
        "▁say",
        "▁",
        "hi",
        *[f"<0x{n:02X}>" for n in range(256)],
    ]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    made = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    ids = [1, 2, 3, 4, 5, 5, 6, *(7 + b for b in "م😀".encode()), 1]
    growing = GrowingText(made)
    pieces = [growing.push(token) for token in ids]
    assert "".join(pieces) + growing.rest() == made.decode(ids) == "the users say  hiم😀 the"
    assert pieces[1] == " user"


def test_likeliest_tokens_are_told_beside_each(loaded):
    settings = {"logprobs": 3, "echo": True}
    (found,) = generate(
        loaded.model, loaded.tokenizer, ["turn red into"], Sampling(max_new_tokens=4), **settings
    )
    for item in found.logprobs[1:]:
        values = [value for _, value in item.top]
        assert len(values) == 3 and values == sorted(values, reverse=True)
        assert item.logprob <= values[0] + 1e-6
    assert found.logprobs[0].top == () and found.logprobs[-1].top[0][0] == found.logprobs[-1].token


def test_stop_texts_reach_streams_and_batches(loaded):
    sampling = Sampling(max_new_tokens=20, temperature=1.0, seed=1)
    (whole,) = generate(loaded.model, loaded.tokenizer, ["the user"], sampling)
    stop = whole.text[5:8]
    cut = Sampling(max_new_tokens=20, temperature=1.0, seed=1, stop=(stop,))
    (short,) = generate(loaded.model, loaded.tokenizer, ["the user"], cut)
    assert short.finished and short.stop == stop
    assert short.text == whole.text[: whole.text.index(stop)]
    assert "".join(stream(loaded.model, loaded.tokenizer, "the user", cut)) == short.text


def test_the_models_own_repetition_penalty_is_followed(loaded, caplog):
    own = loaded.model.generation_config
    plain = Sampling(max_new_tokens=12)
    before = generate(loaded.model, loaded.tokenizer, ["the user"], plain)
    try:
        own.repetition_penalty, own.no_repeat_ngram_size = 1.8, 3
        found = generate(loaded.model, loaded.tokenizer, ["the user"], plain)
        asked = Sampling(max_new_tokens=12, repetition_penalty=1.0)
        assert generate(loaded.model, loaded.tokenizer, ["the user"], asked) == before
    finally:
        own.repetition_penalty = own.no_repeat_ngram_size = None
    assert found != before and "no_repeat_ngram_size=3" in caplog.text


def test_answers_end_with_any_of_the_models_end_tokens(loaded):
    ends = end_token_ids(loaded.model, loaded.tokenizer)
    assert loaded.tokenizer.eos_token_id in ends
    ids = loaded.tokenizer("the user", add_special_tokens=False)["input_ids"]
    batch = Batch(make_decoder(loaded.model, loaded.tokenizer), loaded.tokenizer, ends)
    free = complete(batch, [Request(ids, Sampling(max_new_tokens=9))], 1)[0]
    batch = Batch(batch.decoder, loaded.tokenizer, [free.tokens[3]])
    ended = complete(batch, [Request(ids, Sampling(max_new_tokens=9))], 1)[0]
    first = free.tokens.index(free.tokens[3])
    assert ended.tokens == free.tokens[: first + 1] and ended.finish == "stop"
