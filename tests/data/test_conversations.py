import json

import pytest

from whet.data.conversations import Unusable, read_tools, read_turns

CALL = {"name": "f", "arguments": {"x": 1}}
NORMAL = {"type": "function", "function": CALL}


def one(column="messages", **turn):
    return read_turns([turn], column)[0]


@pytest.mark.parametrize(
    ("written", "role"),
    [
        ("developer", "system"), ("System", "system"), ("human", "user"), ("gpt", "assistant"),
        ("model", "assistant"), ("bot", "assistant"), ("observation", "tool"), ("ipython", "tool"),
        ("function", "tool"), ("function_response", "tool"),
    ],
)  # fmt: skip
def test_roles_go_by_many_names(written, role):
    assert one(role=written, content="x") == {"role": role, "content": "x"}
    assert one("conversations", **{"from": written, "value": "x"})["role"] == role


@pytest.mark.parametrize(
    "call",
    [
        {"id": "c1", "type": "function", "function": CALL},
        {"id": "c1", "function": {"name": "f", "arguments": '{"x": 1}'}},
        {"id": "c1", **CALL},
        {"id": "c1", "function": {"name": "f", "arguments": {"x": 1, "y": None}}},
    ],
)
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_a_tool_call_is_the_same_however_it_is_written(call, content):
    message = one(role="assistant", tool_calls=[call], **content)
    assert message == {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", **NORMAL}]}


def test_a_call_without_arguments_has_none():
    for arguments in (None, "", "{}", {}):
        call = {"function": {"name": "f", "arguments": arguments}}
        message = one(role="assistant", content="", tool_calls=[call])
        assert message["tool_calls"][0]["function"]["arguments"] == {}


def test_sharegpt_calls_are_calls():
    for value in (CALL, [CALL]):
        message = one("conversations", **{"from": "function_call", "value": json.dumps(value)})
        assert message == {"role": "assistant", "content": "", "tool_calls": [NORMAL]}


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        ({"from": "function_call", "value": "f(x)"}, "a function_call is not JSON at column"),
        ({"from": "function_call", "value": '{"x": 1}'}, "needs a function with a name"),
        ({"from": "function_call", "value": "[]"}, "calls nothing"),
        ({"from": "function_call", "value": None}, "must be JSON text, not null"),
        ({"from": "function_call", "value": '{"name": "f", "arguments": {"a": NaN}}'}, "not JSON"),
        ({"from": "gpt"}, "needs 'from' and 'value'"),
        ({"from": "gpt", "value": 3}, "content must be text, not number"),
        ({"from": None, "value": "x"}, "needs 'role' and 'content'"),
        ({"role": 3, "content": "x"}, "has a number as role"),
        ({"role": "user", "content": "x", "tool_calls": [NORMAL]}, "only assistants call"),
        ({"role": "assistant", "tool_calls": "f"}, "tool_calls must be a list, not text"),
        ({"role": "assistant", "tool_calls": ["f"]}, "needs a function with a name"),
        ({"role": "assistant", "tool_calls": [{"function": None}]}, "needs a function with a name"),
    ],
)
def test_a_turn_that_is_none_is_refused(turn, words):
    with pytest.raises(Unusable, match=words):
        one(**turn)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("{x: 1}", "arguments of 'f' is not JSON at column 2"),
        ("[1]", "must be an object, not list"),
        (3, "must be an object, not number"),
        ('"\\ud800"', "surrogates not allowed"),
        ({"a": [1, None]}, "a list holds null"),
        ("[" * 100_000, "not JSON that can be read"),
    ],
)
def test_arguments_that_are_no_object_are_refused(arguments, words):
    with pytest.raises(Unusable, match=words):
        one(role="assistant", tool_calls=[{"function": {"name": "f", "arguments": arguments}}])


def test_parts_of_text_are_joined_and_images_refused():
    parts = [{"type": "text", "text": "a"}, {"text": "b"}, "c"]
    assert one(role="user", content=parts)["content"] == "abc"
    for kind in ("image", "image_url", "audio", "video"):
        with pytest.raises(Unusable, match=f"'{kind}': images and sound are not learned"):
            one(role="user", content=[{"type": kind, kind: {}}])
    # Parquet gives every part the keys of all.
    assert (
        one(role="user", content=[{"type": "text", "text": "a", "image": None}])["content"] == "a"
    )
    for part in ({"type": "text", "text": None}, None, 3, {}):
        with pytest.raises(Unusable, match="has no text"):
            one(role="user", content=[part])


def test_what_a_template_needs_beside_the_content_is_kept_and_nulls_are_not():
    for key in ("reasoning_content", "thinking"):
        assert one(role="assistant", content="x", **{key: "so"})[key] == "so"
        assert key not in one(role="assistant", content="x", **{key: None})
        assert key not in one(role="user", content="x", **{key: "so"})
    told = one(role="tool", content="x", tool_call_id="c1", name="f", tool_calls=None)
    assert told == {"role": "tool", "content": "x", "tool_call_id": "c1", "name": "f"}


def test_tools_are_a_list_or_its_json():
    tool = {"type": "function", "function": {"name": "f", "parameters": {"default": None}}}
    clean = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert read_tools([tool]) == read_tools(json.dumps([tool])) == (clean,)
    for empty in (None, "", " ", "[]", "null", []):
        assert read_tools(empty) == ()
    for wrong in ("{", "{}", {}, 3, ["f"]):
        with pytest.raises(Unusable, match="'tools'"):
            read_tools(wrong)
