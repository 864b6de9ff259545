import math

import pytest
import torch

from whet.data.template import render_prompt
from whet.errors import InputError
from whet.generate import Sampling, generate, perplexity_of, stream
from whet.trained import load_trained

PROMPTS = ["turn red into a colour", "the", "four into a number and a user of it"]


@pytest.fixture(scope="module")
def loaded(tiny_model):
    return load_trained(str(tiny_model), ["model.dtype=float32"])


def one_by_one(loaded, prompt, num):
    """Greedy decoding written out: no cache, no padding, no generate()."""
    ids = loaded.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer = []
    for _ in range(num):
        logits = loaded.model(torch.tensor([ids + answer])).logits[0, -1]
        answer.append(int(logits.argmax()))
        if answer[-1] == loaded.tokenizer.eos_token_id:
            break
    return answer


def test_a_batch_gives_what_each_prompt_gives_alone(loaded):
    found = generate(
        loaded.model, loaded.tokenizer, PROMPTS, Sampling(max_new_tokens=12), batch_size=2
    )
    for prompt, completion in zip(PROMPTS, found, strict=True):
        expected = one_by_one(loaded, prompt, 12)
        assert completion.text == loaded.tokenizer.decode(expected, skip_special_tokens=True)
        assert completion.prompt == prompt and completion.num_tokens == len(expected)
        assert completion.finished == (expected[-1] == loaded.tokenizer.eos_token_id)


def test_a_stream_is_the_same_text(loaded):
    whole = generate(loaded.model, loaded.tokenizer, PROMPTS[:1], Sampling(max_new_tokens=12))
    pieces = list(stream(loaded.model, loaded.tokenizer, PROMPTS[0], Sampling(max_new_tokens=12)))
    assert "".join(pieces) == whole[0].text and len(pieces) > 1


def test_a_stream_that_nobody_reads_ends(loaded):
    pieces = stream(loaded.model, loaded.tokenizer, PROMPTS[0], Sampling(max_new_tokens=200))
    next(pieces)
    pieces.close()  # would hang for 200 tokens, and leave a thread behind, if it did not stop


def test_logprobs_are_those_of_the_tokens(loaded):
    found = generate(
        loaded.model,
        loaded.tokenizer,
        PROMPTS,
        Sampling(max_new_tokens=5),
        logprobs=True,
        echo=True,
    )
    for completion in found:
        ids = loaded.tokenizer(completion.prompt, add_special_tokens=False)["input_ids"]
        assert len(completion.logprobs) == len(ids) + completion.num_tokens
        assert completion.logprobs[0].logprob is None
        assert completion.prompt == "".join(item.token for item in completion.logprobs[: len(ids)])
        logits = loaded.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for n in range(1, len(ids)):
            expected = logits[n - 1, ids[n]].item()
            assert completion.logprobs[n].logprob == pytest.approx(expected, abs=1e-5)
        best = logits[-1].max().item()
        assert completion.logprobs[len(ids)].logprob == pytest.approx(best, abs=1e-4)
        assert perplexity_of(completion.logprobs) > 1
    short = generate(
        loaded.model, loaded.tokenizer, PROMPTS, Sampling(max_new_tokens=5), logprobs=True
    )
    assert [len(c.logprobs) for c in short] == [c.num_tokens for c in short]


def test_sampling_follows_its_seed(loaded):
    def sample(seed, **options):
        sampling = Sampling(max_new_tokens=8, temperature=1.0, seed=seed, **options)
        return generate(loaded.model, loaded.tokenizer, PROMPTS, sampling)

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    greedy = generate(loaded.model, loaded.tokenizer, PROMPTS, Sampling(max_new_tokens=8))
    assert sample(1, top_p=1e-6) == greedy


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"max_new_tokens": 0}], ids=str
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_a_prompt_that_leaves_no_room_is_refused(loaded):
    with pytest.raises(InputError, match=r"256 tokens\); got \d+ \+ 200"):
        generate(loaded.model, loaded.tokenizer, ["red " * 100], Sampling(max_new_tokens=200))
    with pytest.raises(InputError, match="prompt is empty"):
        generate(loaded.model, loaded.tokenizer, [""], Sampling())


def test_a_plain_model_gets_its_own_template(loaded):
    text = render_prompt(loaded.tokenizer, [{"role": "user", "content": "hi"}])
    assert text.endswith("<|im_start|>assistant\n")
    assert math.isnan(perplexity_of([]))
