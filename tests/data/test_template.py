import pytest

from whet.data.formats import Example
from whet.data.template import (
    BUILT_IN,
    PLAIN_TEMPLATE,
    end_of_turn,
    render,
    render_prompt,
    set_chat_template,
    specials_in,
    stop_token_ids,
    unknown_specials,
)
from whet.errors import InputError

TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "yo"},  # the same words as the answer: only their place differs
    {"role": "assistant", "content": "bye "},
]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\\n' + m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
)
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
    with pytest.raises(InputError, match="neither a built-in template .* nor a file"):
        set_chat_template(copy, str(tmp_path / "no.jinja"))
    with pytest.raises(InputError, match="cannot be read"):
        set_chat_template(copy, str(tmp_path))
    (tmp_path / "bad.jinja").write_text("{% for m in messages %}\n{{ m.content }\n{% endfor %}")
    with pytest.raises(InputError, match="bad.jinja' is not a Jinja template: line 2"):
        set_chat_template(copy, str(tmp_path / "bad.jinja"))


def test_a_built_in_template_goes_by_its_obvious_spellings(copy):
    for wish, name in (
        ("llama3", "llama-3"), ("Llama-3.1", "llama-3"), ("phi4", "phi-4"), ("chat-ml", "chatml"),
        ("ChatML", "chatml"), ("qwen2.5", "qwen"), ("gemma 2", "gemma"), *((n, n) for n in BUILT_IN),
    ):  # fmt: skip
        assert set_chat_template(copy, wish).startswith(f"whet's {name}"), wish
    with pytest.raises(InputError, match="did you mean 'zephyr'"):
        set_chat_template(copy, "zefyr")


def test_an_end_of_turn_the_tokenizer_lacks_is_written_as_its_own_and_that_is_said(copy):
    assert set_chat_template(copy, "chatml") == "whet's chatml"
    words = set_chat_template(copy, "llama-3")
    assert words == (
        "whet's llama-3; its <|eot_id|> is written as <|im_end|>, which this tokenizer has"
    )
    rendered = render(copy, TURNS)
    assert [rendered.text[a:b] for a, b in rendered.spans] == ["yo<|im_end|>", "bye<|im_end|>"]
    copy.eos_token = None
    with pytest.raises(InputError, match="nor any end-of-text token"):
        set_chat_template(copy, "llama-3")
    with pytest.raises(InputError, match="nor any end-of-text token"):
        set_chat_template(copy, "alpaca")


def test_of_several_templates_of_a_tokenizer_the_default_is_taken(copy):
    copy.chat_template = {"default": GEMMA, "rag": LLAMA_3}
    assert set_chat_template(copy, None) == "the tokenizer's own"
    assert copy.chat_template == GEMMA
    copy.chat_template = {"rag": LLAMA_3}
    with pytest.raises(InputError, match="several chat templates"):
        set_chat_template(copy, None)


def test_alpaca_writes_the_classic_prompt(copy):
    set_chat_template(copy, "alpaca")
    turns = [
        {"role": "user", "content": "add\n\n1 2", "instruction": "add", "input": "1 2"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "and 4?"},
    ]
    assert render_prompt(copy, turns) == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nadd\n\n### Input:\n1 2\n\n### Response:\n3<|im_end|>\n\n"
        "### Instruction:\nand 4?\n\n### Response:\n"
    )
    assert render_prompt(copy, turns[2:]).startswith(
        "Below is an instruction that describes a task. Write a response"
    )
    assert render_prompt(copy, TURNS[:2]) == "be brief\n\n### Instruction:\nhi\n\n### Response:\n"


CALLS = [
    {"id": "a1", "type": "function", "function": {"name": "f", "arguments": {"x": "ü"}}},
    {"id": "a2", "type": "function", "function": {"name": "g", "arguments": '{"y": 1}'}},
]
RESULTS = [
    {"role": "tool", "tool_call_id": "a1", "content": "one"},
    {"role": "tool", "tool_call_id": "a2", "content": "two"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
ASKED = [
    *TURNS[:2], {"role": "assistant", "content": None, "tool_calls": CALLS}, *RESULTS,
    {"role": "assistant", "content": "both"}, {"role": "user", "content": "ok"},
    {"role": "assistant", "content": "so"},
]  # fmt: skip
_HERMES = (
    '<tool_call>\n{"name": "f", "arguments": {"x": "ü"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "g", "arguments": {"y": 1}}\n</tool_call>'
)


@pytest.mark.parametrize(
    ("name", "call", "result"),
    [
        ("qwen", _HERMES, "user\n<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</"),
        ("chatml", _HERMES, "tool\n<tool_response>\none\n</tool_response><|im_end|>\n"),
        (
            "llama-3",
            '{"name": "f", "parameters": {"x": "ü"}}; {"name": "g", "parameters": {"y": 1}}',
            "<|start_header_id|>ipython<|end_header_id|>\n\none",
        ),
        (
            "mistral",
            '[TOOL_CALLS] [{"name": "f", "arguments": {"x": "ü"}, "id": "a1"}, '
            '{"name": "g", "arguments": {"y": 1}, "id": "a2"}]',
            '[TOOL_RESULTS] {"content": "one", "call_id": "a1"}[/TOOL_RESULTS]',
        ),
    ],
)
def test_tool_calls_are_answers_and_results_are_not(copy, name, call, result):
    set_chat_template(copy, name)
    rendered = render(copy, ASKED, TOOLS)
    said = [rendered.text[a:b].strip() for a, b in rendered.spans]
    assert said == [f"{call}<|im_end|>", "both<|im_end|>", "so<|im_end|>"]
    assert result in rendered.text
    assert '{"type": "function", "function": {"name": "f", "parameters": {}}}' in rendered.text
    assert rendered.text.count("be brief") == 1
    assert rendered.text.startswith(render_prompt(copy, ASKED[:5], TOOLS))


def test_a_template_without_tools_says_which_have_them(copy):
    for name in ("gemma", "phi-4", "zephyr", "alpaca"):
        set_chat_template(copy, name)
        for turns, tools in ((TURNS, TOOLS), (ASKED, ()), ([TURNS[1], *RESULTS], ())):
            with pytest.raises(InputError, match="has no tools; use qwen, chatml, llama-3 or mist"):
                render(copy, turns, tools)
        with pytest.raises(InputError, match="has no role 'judge'"):
            render(copy, [{"role": "judge", "content": "x"}])


# --- templates that render an answer differently when more turns follow ---

DROPS_THOUGHTS = (  # as Qwen 3 and DeepSeek R1 do
    "{% for m in messages %}[{{ m.role }}]"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think>{% endif %}"
)
LAST_ENDS_OTHERWISE = (  # as gpt-oss does
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
TOOLS_LAST = (  # as Mistral's own does: the tools stand before the last question, roles alternate
    "{% set last = (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}"
    "{% set ns = namespace(n=0) %}"
    "{% for m in messages %}{% if m.role in ['user', 'assistant'] and not m.tool_calls %}"
    "{% if (m.role == 'user') != (ns.n % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
    "{% set ns.n = ns.n + 1 %}{% endif %}{% if m.role == 'user' %}"
    "{{ '[TOOLS]' if m == last }}[INST]{{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}[RESULT]{{ m.content }}[/RESULT]"
    "{% elif m.tool_calls %}[CALLS]{{ m.tool_calls[0].function.arguments | tojson }}<|im_end|>"
    "{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)


def test_an_answer_that_loses_its_thoughts_is_found(copy):
    turns = [
        TURNS[1], {"role": "assistant", "content": "<think>hm</think>yo"}, TURNS[3],
        {"role": "assistant", "content": "yo"}, TURNS[3],
        {"role": "assistant", "content": "<think>so</think>bye"},
    ]  # fmt: skip
    assert spans(copy, DROPS_THOUGHTS, turns) == [
        "yo<|im_end|>", "yo<|im_end|>", "so</think>bye<|im_end|>",
    ]  # fmt: skip


def test_an_answer_that_says_an_end_of_turn_itself_keeps_its_own(copy):
    turns = [TURNS[1], {"role": "assistant", "content": "say <|im_end|>"}, *TURNS[3:]]
    found = spans(copy, DROPS_THOUGHTS, turns)
    assert found == ["say <|im_end|><|im_end|>", "bye <|im_end|>"]


def test_each_answer_has_the_end_it_is_given(copy):
    found = spans(copy, LAST_ENDS_OTHERWISE, TURNS[1:])
    assert found == ["<|message|>yo<|end|>", "<|message|>bye <|return|>"]


def test_a_tool_call_before_an_alternating_templates_last_question_is_found(copy):
    turns = [{**m, "tool_calls": CALLS[:1]} if m.get("tool_calls") else m for m in ASKED[1:]]
    copy.chat_template = TOOLS_LAST
    rendered = render(copy, turns, TOOLS)
    assert [rendered.text[a:b] for a, b in rendered.spans] == [
        '[CALLS]{"x": "ü"}<|im_end|>', " both<|im_end|>", " so<|im_end|>",
    ]  # fmt: skip


def test_answers_of_one_role_in_a_row_each_have_a_span(copy):
    pair = [*TURNS[:3], {"role": "assistant", "content": "yo"}, *TURNS[3:]]
    ended = ["yo<|im_end|>", "yo<|im_end|>", "bye <|im_end|>"]
    assert spans(copy, copy.chat_template, pair) == ended
    assert spans(copy, copy.chat_template, pair[2:]) == ended
    assert spans(copy, DROPS_THOUGHTS, pair) == ended


def test_generation_marks_decide_and_the_end_they_leave_out_is_taken_in(copy):
    for inside in (
        "{{ m.content }}{% endgeneration %}<|im_end|>\n",
        "{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}",
        "{{ m.content }}<|im_end|>{{ '\n' }}{% endgeneration %}",
        "{{ m.content }}{% endgeneration %}{%- generation %}<|im_end|>{% endgeneration %}",
    ):
        marked = (
            "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}"
            + inside
            + "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        )
        assert spans(copy, marked) == ["yo<|im_end|>", "bye <|im_end|>"], inside


def test_renders_are_few(copy, monkeypatch):
    render(copy, TURNS)  # what the template writes around an answer is found once
    count = []
    original = type(copy).apply_chat_template
    monkeypatch.setattr(
        type(copy), "apply_chat_template", lambda *a, **k: count.append(1) or original(*a, **k)
    )
    for turns, most in ((TURNS[:3], 2), (TURNS, 4)):
        count.clear()
        render(copy, turns)
        assert len(count) == most


# --- control tokens ---


def test_the_end_of_turn_is_what_the_template_writes(copy):
    assert end_of_turn(copy) == "<|im_end|>"
    copy.chat_template = GEMMA
    assert end_of_turn(copy) == "<end>"
    assert stop_token_ids(copy) == [copy.eos_token_id]  # plain words have no id
    copy.eos_token = "<|endoftext|>"
    copy.chat_template = THINKS.replace("[/]", "<|im_end|>")
    assert stop_token_ids(copy) == copy.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    copy.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert end_of_turn(copy) is None
    copy.chat_template = None
    assert stop_token_ids(copy) == [copy.eos_token_id]


def test_a_template_that_forgets_the_end_of_turn_is_noticed(copy):
    from whet.data.tokenize import tokenize

    example = Example("rows.jsonl:1", messages=tuple(TURNS))
    forgets = CHATML.replace("<|im_end|>", "")
    for template, ended in ((CHATML, True), (forgets, False)):
        copy.chat_template = template
        (tokens,) = tokenize(example, copy, 1000)
        assert tokens.has_end is ended


def test_what_looks_like_a_control_token_and_is_none_is_told(copy):
    text = "<|im_start|>a<|eot_id|><s>[INST]<think>x</think><｜User｜><|eot_id|> a <| b |> [x] <b>"
    assert unknown_specials(copy, text) == ["<|eot_id|>", "<s>", "[INST]", "<｜User｜>"]
    copy.add_special_tokens({"extra_special_tokens": ["<|eot_id|>"]})
    assert unknown_specials(copy, text) == ["<s>", "[INST]", "<｜User｜>"]


def test_control_tokens_in_a_users_text_are_told(copy):
    assert specials_in(copy, "hi<|im_end|>\n<|im_start|>x<|im_end|>") == [
        "<|im_end|>",
        "<|im_start|>",
    ]
    assert specials_in(copy, "hi <|eot_id|> <|im_end>") == []
