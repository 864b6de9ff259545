"""The Modelfile is one that Ollama takes, and its Go template renders what the chat template does."""

import copy

import pytest

from whet.data.template import BUILT_IN, render_prompt, set_chat_template
from whet.errors import WhetError
from whet.export.go_template import from_chat_template, render
from whet.export.ollama import parse_modelfile

TALKS = [
    [{"role": "user", "content": "Hi {{ .Content }}"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
     {"role": "user", "content": "c\nd"}],
    [{"role": "system", "content": "S"}, {"role": "user", "content": "a"},
     {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},
     {"role": "assistant", "content": "d"}, {"role": "user", "content": "e"}],
]  # fmt: skip


@pytest.fixture
def with_bos(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.bos_token = "<|endoftext|>"
    return made


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name != "alpaca"])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_built_in_template_becomes_a_go_template(name, adds_bos, with_bos):
    set_chat_template(with_bos, name)
    template = from_chat_template(with_bos, adds_bos)
    for turns in TALKS:
        theirs = render_prompt(with_bos, turns)
        assert render(template, turns) == (
            theirs.removeprefix(with_bos.bos_token) if adds_bos else theirs
        )


def test_a_default_system_prompt_is_kept(with_bos):
    with_bos.chat_template = (
        "{% if messages[0].role != 'system' %}<sys>You are whet.</sys>\n{% endif %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    template = from_chat_template(with_bos, True)
    for turns in TALKS:
        assert render(template, turns) == render_prompt(with_bos, turns)


def test_braces_in_a_template_stay_text(with_bos):
    with_bos.chat_template = (
        "{% for m in messages %}{{ '{{' + m.role + '}} ' + m.content }}\n{% endfor %}{{ '{{a}}' }}"
    )
    template = from_chat_template(with_bos, True)
    assert render(template, TALKS[0]) == render_prompt(with_bos, TALKS[0])


def test_a_template_that_counts_its_turns_is_not_written_as_one(with_bos):
    with_bos.chat_template = (
        "{% for m in messages %}{{ loop.length }} {{ m.content }}\n{% endfor %}"
        "{{ messages | length }}"
    )
    assert from_chat_template(with_bos, True) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("PARAMETER stop x\n", "needs one FROM"),
        ("FROM a\nFORM b\n", "no instruction 'FORM'"),
        ("FROM a\nPARAMETER halt x\n", "no parameter 'halt'"),
        ("FROM a\nPARAMETER num_ctx lots\n", "num_ctx is not a value"),
        ('FROM a\nPARAMETER num_ctx "5"\n', "num_ctx is not of its type"),
        ('FROM a\nTEMPLATE """abc\nd e\n', "no instruction 'd'"),
    ],
)
def test_a_modelfile_that_ollama_would_refuse_is_refused(text, words):
    with pytest.raises(WhetError, match=words):
        parse_modelfile(text)


def test_a_modelfile_is_read_as_documented():
    text = (
        '# made\nfrom ./m.gguf\nTEMPLATE """a\n# no comment\nb"""\n'
        'PARAMETER stop "<|x|>"\n\nSYSTEM Hi\n'
    )
    assert parse_modelfile(text) == [
        ("FROM", "./m.gguf"), ("TEMPLATE", "a\n# no comment\nb"), ("PARAMETER", 'stop "<|x|>"'),
        ("SYSTEM", "Hi"),
    ]  # fmt: skip
