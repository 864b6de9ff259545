import pytest

from whet.data.template import PLAIN_TEMPLATE, render, render_prompt, set_chat_template
from whet.errors import InputError

TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "yo"},  # the same words as the answer: only their place differs
    {"role": "assistant", "content": "bye "},
]

LLAMA_3 = (
    "{{ '<|begin|>' }}{% for m in messages %}<|start|>{{ m['role'] }}<|stop|>\n\n"
    "{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}"
)
GEMMA = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ '' }}{% else %}<start>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<start>model\n{% endif %}"
)
THINKS = (  # the generation prompt says more than the turn's header does
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[/]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think></think>{% endif %}"
)


def spans(tokenizer, template, turns=TURNS):
    tokenizer.chat_template = template
    rendered = render(tokenizer, turns)
    return [rendered.text[a:b] for a, b in rendered.spans]


@pytest.fixture
def copy(tokenizer):
    from copy import deepcopy

    return deepcopy(tokenizer)


def test_a_span_is_the_answer_with_its_end_of_turn(copy):
    assert spans(copy, copy.chat_template) == ["yo<|im_end|>", "bye <|im_end|>"]
    assert spans(copy, PLAIN_TEMPLATE) == ["yo<|im_end|>", "bye <|im_end|>"]
    assert spans(copy, LLAMA_3) == ["yo<|eot|>", "bye<|eot|>"]
    assert spans(copy, GEMMA) == ["yo<end>", "bye<end>"]
    assert spans(copy, THINKS) == ["yo[/]", "bye [/]"]


def test_the_prompt_ends_where_the_answer_starts(copy):
    text = render(copy, TURNS).text
    assert text.startswith(render_prompt(copy, TURNS[:2]))
    assert render_prompt(copy, TURNS[:2]).endswith("<|im_start|>assistant\n")


def test_a_template_that_forgets_earlier_answers_is_refused(copy):
    forgets = (
        "{% for m in messages %}{% if loop.last or m['role'] != 'assistant' %}{{ m['content'] }}"
    )
    answer = {"role": "assistant", "content": "something else"}
    with pytest.raises(InputError, match="differently when more turns follow"):
        spans(copy, forgets + "{% endif %}{% endfor %}", [*TURNS[:2], answer, *TURNS[3:]])


def test_a_template_that_refuses_the_turns_says_so(copy):
    with pytest.raises(InputError, match=r"refuses the turns \(user.*system roles not supported"):
        spans(
            copy,
            "{{ raise_exception('system roles not supported') }}",
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
        )


def test_a_tokenizer_without_template_gets_the_plain_one_and_it_is_said(copy):
    copy.chat_template = None
    assert "because the tokenizer has none" in set_chat_template(copy, None)
    assert copy.chat_template == PLAIN_TEMPLATE
    copy.chat_template = copy.eos_token = None
    with pytest.raises(InputError, match="neither a chat template nor an end-of-text"):
        set_chat_template(copy, None)


def test_a_template_file_is_used(copy, tmp_path):
    (tmp_path / "t.jinja").write_text(GEMMA)
    assert "t.jinja" in set_chat_template(copy, str(tmp_path / "t.jinja"))
    assert copy.chat_template == GEMMA
    with pytest.raises(InputError, match="cannot be read"):
        set_chat_template(copy, str(tmp_path / "no.jinja"))
