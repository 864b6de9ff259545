"""Random conversations through every built-in template, against renderers written here piece by piece.

A reference yields (text, learned) pieces in order, so that its spans owe nothing to the code under
test. The trl templates with generation marks are a second, independent witness.
"""

import importlib.util
import re
from copy import deepcopy
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whet.data.template import (
    BUILT_IN,
    end_of_turn,
    render,
    render_prompt,
    set_chat_template,
    specials_in,
)
from whet.errors import InputError

SPECIALS = [
    "<|im_start|>", "<|im_sep|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]",
    "[/INST]", "<start_of_turn>", "<end_of_turn>", "<|system|>", "<|user|>", "<|assistant|>",
]  # fmt: skip


@pytest.fixture(scope="module")
def families(tokenizer):
    """A tokenizer that has every family's control tokens, and a bos."""
    made = deepcopy(tokenizer)
    made.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    made.add_special_tokens({"extra_special_tokens": ["<|im_end|>", *SPECIALS]})
    return made


@pytest.fixture(scope="module")
def bare(tokenizer):
    """A base model's: one control token, which ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")


# --- what each family writes, piece by piece -----------------------------------------------------


def chatml(turns, end, bos):
    for turn in turns:
        learned = turn["role"] == "assistant"
        yield f"<|im_start|>{turn['role']}\n", False
        yield turn["content"] + end, learned
        yield "\n", False


def llama_3(turns, end, bos):
    yield bos, False
    for turn in turns:
        yield f"<|start_header_id|>{turn['role']}<|end_header_id|>\n\n", False
        yield turn["content"].strip() + end, turn["role"] == "assistant"


def phi_4(turns, end, bos):
    for turn in turns:
        yield f"<|im_start|>{turn['role']}<|im_sep|>", False
        yield turn["content"] + end, turn["role"] == "assistant"


def zephyr(turns, end, bos):
    for turn in turns:
        yield f"<|{turn['role']}|>\n", False
        yield turn["content"] + end, turn["role"] == "assistant"
        yield "\n", False


def folded(turns):
    """Put each system turn at the head of the user's turn after it, or make it one."""
    out, system = [], ""
    for turn in [*turns, {"role": "end", "content": ""}]:
        text = turn["content"].strip()
        if turn["role"] == "system":
            system += text + "\n\n"
            continue
        if system and turn["role"] != "user":
            out.append(("user", system.strip()))
        out.append((turn["role"], (system + text).strip() if turn["role"] == "user" else text))
        system = ""
    return out[:-1]


def gemma(turns, end, bos):
    yield bos, False
    for role, text in folded(turns):
        yield f"<start_of_turn>{'model' if role == 'assistant' else 'user'}\n", False
        yield text + end, role == "assistant"
        yield "\n", False


def mistral(turns, end, bos):
    yield bos, False
    for role, text in folded(turns):
        if role == "user":
            yield f"[INST] {text}[/INST]", False
        else:
            yield f" {text}{end}", True


def alpaca(turns, end, bos):
    yield bos, False
    rest = list(turns)
    if rest[0]["role"] == "system":
        yield rest.pop(0)["content"], False
    elif rest[0].get("input"):
        yield (
            (
                "Below is an instruction that describes a task, paired with an input that provides "
                "further context. Write a response that appropriately completes the request."
            ),
            False,
        )
    else:
        yield (
            (
                "Below is an instruction that describes a task. Write a response that appropriately "
                "completes the request."
            ),
            False,
        )
    for turn in rest:
        if turn["role"] == "user":
            yield f"\n\n### Instruction:\n{turn.get('instruction', turn['content'])}", False
            if turn.get("input"):
                yield f"\n\n### Input:\n{turn['input']}", False
        else:
            yield "\n\n### Response:\n", False
            yield turn["content"] + end, True


def plain(turns, end, bos):
    for turn in turns:
        if turn["role"] != "system":
            title = "Response" if turn["role"] == "assistant" else "Instruction"
            yield f"### {title}:\n", False
        learned = turn["role"] == "assistant"
        yield turn["content"] + (end if learned else ""), learned
        yield "\n\n", False


# Each family's pieces, and its end-of-turn (None: the tokenizer's own).
FAMILIES = {
    "chatml": (chatml, "<|im_end|>"),
    "llama-3": (llama_3, "<|eot_id|>"),
    "mistral": (mistral, None),
    "gemma": (gemma, "<end_of_turn>"),
    "phi-4": (phi_4, "<|im_end|>"),
    "qwen": (chatml, "<|im_end|>"),
    "alpaca": (alpaca, None),
    "zephyr": (zephyr, None),
    "plain": (plain, None),
}


def expected(name, turns, end, bos):
    text, spans = "", []
    for piece, learned in FAMILIES[name][0](turns, end, bos):
        if learned:
            spans.append((len(text), len(text) + len(piece)))
        text += piece
    return text, tuple(spans)


# --- random conversations ------------------------------------------------------------------------

TRICKY = [
    "", " ", "\n", "hi", "hi", " hi ", "\n\nhi\n", "مرحبا بالعالم", "😀",
    "e\u0301", "\ue000", "a\ue001",
    "<|im_end|>", "<|im_end|>\n<|im_start|>assistant\nno", "### Response:\nno", "[/INST] no</s>",
    "<start_of_turn>model\nno<end_of_turn>", "<|eot_id|>", "<|endoftext|>", "</s>", "{{ x }}", "{% if %}",
    "<think>\nhm\n</think>\n\nhi", "assistant", "user", "\t", "a\r\nb", "\x00",
]  # fmt: skip
contents = st.one_of(
    st.sampled_from(TRICKY),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.lists(st.sampled_from(TRICKY), max_size=3).map("".join),
)


@st.composite
def conversations(draw):
    turns = [{"role": "system", "content": draw(contents)}] if draw(st.booleans()) else []
    for role in draw(st.lists(st.sampled_from(["user", "assistant"]), min_size=1, max_size=6)):
        turn = {"role": role, "content": draw(contents)}
        if role == "user" and draw(st.integers(0, 3)) == 0:
            turn |= {"instruction": draw(contents), "input": draw(contents)}
        turns.append(turn)
    return turns


def check(tokenizer, name, turns):
    wish = None if name == "plain" else name
    tokenizer.chat_template = None
    set_chat_template(tokenizer, wish)
    family, eos = FAMILIES[name][1], tokenizer.eos_token
    end = family if family in tokenizer.get_added_vocab() else eos
    text, spans = expected(name, turns, end, tokenizer.bos_token or "")
    rendered = render(tokenizer, turns)
    assert rendered.text == text
    assert rendered.spans == spans
    assert end_of_turn(tokenizer) == end
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    learned = [
        token
        for token, (first, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        if any(a <= first < b for a, b in rendered.spans)
    ]
    assert tokenizer.decode(learned) == "".join(text[a:b] for a, b in spans)
    ends = tokenizer.convert_tokens_to_ids(end)
    own = sum(turn["content"].count(end) for turn in turns if turn["role"] == "assistant")
    assert learned.count(ends) == len(spans) + own  # every answer's end-of-turn is a learned token


@pytest.mark.parametrize("name", [*BUILT_IN, "plain"])
@settings(deadline=None, derandomize=True, max_examples=60, database=None)
@given(turns=conversations())
def test_exactly_the_answers_and_their_end_of_turn_are_labelled(families, name, turns):
    check(families, name, turns)


@pytest.mark.parametrize("name", [*BUILT_IN, "plain"])
@settings(deadline=None, derandomize=True, max_examples=25, database=None)
@given(turns=conversations())
def test_so_they_are_for_a_base_model_without_the_familys_tokens(bare, name, turns):
    check(bare, name, turns)


@pytest.mark.parametrize("name", [*BUILT_IN, "plain"])
@settings(deadline=None, derandomize=True, max_examples=20, database=None)
@given(turns=conversations())
def test_what_is_trained_goes_on_from_the_prompt(families, name, turns):
    families.chat_template = None
    set_chat_template(families, None if name == "plain" else name)
    rendered = render(families, turns)
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    for index, (start, _) in zip(answers, rendered.spans, strict=True):
        if index:
            assert rendered.text[:start] == render_prompt(families, turns[:index])


@settings(deadline=None, derandomize=True, max_examples=60, database=None)
@given(text=contents)
def test_control_tokens_in_a_text_are_those_the_tokenizer_reads(families, text):
    read = {families.convert_ids_to_tokens(i) for i in families(text)["input_ids"]}
    assert set(specials_in(families, text)) == read & set(families.all_special_tokens)


# --- trl's generation marks ----------------------------------------------------------------------


def say(role, content, **more):
    return {"role": role, "content": content, **more}


CALL = [{"type": "function", "function": {"name": "f", "arguments": {"x": "7"}}}]
RESULT = {"role": "tool", "name": "f", "content": "49"}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {
            "x": {"type": "string", "description": "a number"}}}},
    }
]  # fmt: skip
TALKS = {
    "one": [say("user", "hi"), say("assistant", "yo")],
    "two": [say("user", "hi"), say("assistant", "yo"), say("user", "yo"), say("assistant", "bye ")],
    "system": [say("system", "be brief"), say("user", "hi"), say("assistant", "yo")],
    "thinks": [
        say("user", "hi"), say("assistant", "<think>\nhm\n</think>\n\nyo"), say("user", "again"),
        say("assistant", "<think>\nso\n</think>\n\nbye"),
    ],
    "pair": [say("user", "hi"), say("assistant", "yo"), say("assistant", "and")],
    "tools": [
        say("user", "hi"), say("assistant", "", tool_calls=CALL), RESULT, say("assistant", "it is 49"),
        say("user", "more"), say("assistant", "", tool_calls=CALL), RESULT, say("assistant", "so"),
    ],
}  # fmt: skip
# Multimodal: their content is a list of parts.
NOT_TEXT = ("idefics3", "llava_next", "smolvlm", "diffusion_gemma", "qwen2_5_vl", "qwen3_vl")
# trl's marks begin with what the generation prompt says, which no model has to learn to say: the
# header (deepseek, gpt-oss, muse), its line break (qwen 2.5) or the opening <think> (the others).
WITH_PROMPT = (
    "deepseek_r1_distill", "deepseekv3", "gptoss", "muse_glimmer", "qwen2_5", "qwen3_5_nothink",
    "qwen3_5_think", "qwen3_6", "qwen3_8", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra",
    "nemotron_3_5_lightning",
)  # fmt: skip


def trl_folder():
    found = importlib.util.find_spec("trl")
    folder = Path(found.origin).parent / "chat_templates" if found and found.origin else None
    return folder if folder and folder.is_dir() else None


def training_twins():
    folder = trl_folder()
    names = [f.name.removesuffix("_training.jinja") for f in folder.glob("*_training.jinja")]
    return sorted(name for name in names if name not in NOT_TEXT)


def rendered_with(tokenizer, template, talk):
    tokenizer.chat_template = template
    try:
        return render(tokenizer, TALKS[talk], TOOLS if talk == "tools" else ())
    except InputError as error:
        if "refuses the turns" in str(error):
            return None
        raise


def compare(tokenizer, name, ours, marked):
    """Hold our spans of a text against the marks of a template that renders the same text."""
    text = ours.text
    assert len(ours.spans) == len(marked.spans)
    for (start, end), (first, last) in zip(ours.spans, marked.spans, strict=True):
        assert text[:end].rstrip() == text[:last].rstrip()
        if name in WITH_PROMPT:
            assert first <= start
            assert text[first:start] in render_prompt(tokenizer, TALKS["tools"][:1]) or text[
                first:start
            ] in render_prompt(tokenizer, TALKS["tools"][:3])
        else:
            assert start == first


@pytest.mark.skipif(trl_folder() is None, reason="trl is not installed")
def test_spans_by_comparing_renders_are_those_of_trls_marks(families):
    folder, compared = trl_folder(), set()
    for name in training_twins():
        for talk in TALKS:
            ours = rendered_with(families, (folder / f"{name}.jinja").read_text(), talk)
            marked = rendered_with(families, (folder / f"{name}_training.jinja").read_text(), talk)
            if ours and marked and ours.text == marked.text:
                compared.add(name)
                compare(families, name, ours, marked)
    # GLM's training twin writes an end-of-turn that the original lacks: no text of both is the same.
    assert set(training_twins()) - compared <= {"glm4moe"}


@pytest.mark.skipif(trl_folder() is None, reason="trl is not installed")
def test_a_marked_template_gives_the_same_spans_without_its_marks(families):
    for name in training_twins():
        template = (trl_folder() / f"{name}_training.jinja").read_text()
        without = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", template)
        without = re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", without)
        for talk in TALKS:
            marked = rendered_with(families, template, talk)
            ours = rendered_with(families, without, talk)
            assert (ours is None) == (marked is None)
            if ours and marked:
                assert ours.text == marked.text
                compare(families, name, ours, marked)
