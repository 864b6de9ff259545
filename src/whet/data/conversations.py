"""Read turns, tool calls and texts from a row's values, and refuse what they are not.

A number or a null where text belongs is never turned into words: the row is a fault. Roles and keys
are those of OpenAI's messages and of ShareGPT, in any mix.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from whet.data.rows import kind_of

# role and content (text, "" beside tool calls); tool_calls, reasoning_content or thinking of an
# assistant; tool_call_id and name of a tool; instruction and input of an alpaca row's question.
Message = dict[str, Any]

TURN_COLUMNS = ("messages", "conversations", "conversation", "dialog")
_ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool",
    "function_response": "tool",
}  # fmt: skip
_KEPT = {"assistant": ("reasoning_content", "thinking"), "tool": ("tool_call_id", "name")}


class Unusable(ValueError):
    """Why a row cannot be used, as a sentence."""


def texts(
    values: Mapping[str, Any], needed: Sequence[str] = (), optional: Sequence[str] = ()
) -> dict[str, str]:
    """Return columns that must hold text; a null is empty where the column is optional.

    Raises:
        Unusable: Columns hold something else, all of them told.
    """
    wrong = []
    for column in (*needed, *optional):
        value = values.get(column)
        if value is None and column in needed:
            wrong.append(f"has no '{column}'")
        elif value is not None and not isinstance(value, str):
            wrong.append(f"'{column}' must be text, not {kind_of(value)}")
        elif column in needed and not (value or "").strip():
            wrong.append(f"'{column}' is empty")
    if wrong:
        raise Unusable(f"{', '.join(wrong)}; fill it in, put quotes round it, or remove the row")
    return {column: values.get(column) or "" for column in (*needed, *optional)}


def turns(question: str, answer: str) -> list[Message]:
    """Return a question and its answer as a conversation."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def names_sharegpt(value: Any) -> bool:
    """Say whether turns are written as {from, value}, rather than {role, content}."""
    return any(
        isinstance(turn, dict) and turn.get("from") is not None and turn.get("role") is None
        for turn in (value if isinstance(value, list) else [value])
    )


def read_turns(value: Any, column: str) -> list[Message]:
    """Read a list of turns.

    Args:
        value: The column's value.
        column: Its name, for errors.

    Raises:
        Unusable: It is no list of turns.
    """
    if not isinstance(value, list) or not value:
        raise Unusable(
            f"'{column}' must be a list of turns, not "
            f"{'an empty list' if value == [] else kind_of(value)}"
        )
    style = names_sharegpt(value) or (column == "conversations" and not _names_roles(value))
    keys = ("from", "value") if style else ("role", "content")
    return [_read_turn(turn, number, column, keys) for number, turn in enumerate(value, 1)]


def read_side(value: Any, column: str, role: str) -> list[Message]:
    """Read one side of an example: a text in a given role, one turn, or a list of turns.

    Raises:
        Unusable: It is none of these.
    """
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        return read_turns(value, column)
    return [{"role": role, "content": texts({column: value}, needed=(column,))[column]}]


def read_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Read the schemas of the tools a conversation may call.

    Args:
        value: A list of objects, the JSON text of one, or null.

    Raises:
        Unusable: It is neither.
    """
    tools = read_list(value, "tools")
    for number, tool in enumerate(tools, 1):
        if not isinstance(tool, dict):
            raise Unusable(f"tool {number} of 'tools' must be an object, not {kind_of(tool)}")
    return tuple(_without_nulls(tool, "tools") for tool in tools)


def read_list(value: Any, column: str) -> list[Any]:
    """Read an optional list, or the JSON text of one; a null is empty.

    Raises:
        Unusable: It is something else.
    """
    found = _from_json(value, f"'{column}'") if isinstance(value, str) and value.strip() else value
    if found is None or found == "" or (isinstance(found, str) and not found.strip()):
        return []
    if not isinstance(found, list):
        raise Unusable(f"'{column}' must be a list, not {kind_of(found)}")
    return found


def notes_on(messages: Sequence[Message]) -> list[str]:
    """Say what is odd about a conversation that ends with an answer, one sentence each."""
    notes = []
    roles = [message["role"] for message in messages]
    doubled = [i for i in range(1, len(roles)) if roles[i] == roles[i - 1] != "tool"]
    if doubled:
        notes.append(
            f"turns {doubled[0]} and {doubled[0] + 1} are both '{roles[doubled[0]]}': join them, or "
            "add the missing turn"
        )
    for message in messages:
        said = message["content"].strip() or message.get("tool_calls")
        if message["role"] == "assistant" and not said:
            notes.append("has an empty answer: the model learns to say nothing")
            break
    return notes


def _names_roles(value: list[Any]) -> bool:
    return any(isinstance(turn, dict) and turn.get("role") is not None for turn in value)


def _read_turn(turn: Any, number: int, column: str, keys: tuple[str, str]) -> Message:
    role_key, content_key = keys
    calls = turn.get("tool_calls") if isinstance(turn, dict) else None
    if (
        not isinstance(turn, dict)
        or role_key not in turn
        or (content_key not in turn and not calls)
    ):
        raise Unusable(f"turn {number} of '{column}' needs '{role_key}' and '{content_key}'")
    written = turn[role_key]
    role = _ROLES.get(written.lower()) if isinstance(written, str) else None
    if role is None:
        shown = f"role '{written}'" if isinstance(written, str) else f"a {kind_of(written)} as role"
        raise Unusable(f"turn {number} has {shown}; known are {', '.join(_ROLES)}")
    if calls and role != "assistant":
        raise Unusable(f"turn {number} has tool_calls in role '{written}'; only assistants call")
    content = turn.get(content_key)
    if written.lower() == "function_call":
        calls, content = _from_json(content, f"turn {number}: a function_call"), None
        calls = calls if isinstance(calls, list) else [calls]
        if not calls:
            raise Unusable(f"turn {number}: a function_call calls nothing")
    message: Message = {"role": role, "content": _read_content(content, number, bool(calls))}
    if calls:
        if not isinstance(calls, list):
            raise Unusable(f"turn {number}: tool_calls must be a list, not {kind_of(calls)}")
        message["tool_calls"] = [_read_call(call, number) for call in calls]
    for key in _KEPT.get(role, ()):
        if isinstance(turn.get(key), str) and turn[key]:
            message[key] = turn[key]
    return message


def _read_content(content: Any, number: int, may_be_null: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None and may_be_null:
        return ""
    if not isinstance(content, list):
        raise Unusable(f"turn {number}: content must be text, not {kind_of(content)}")
    return "".join(_read_parts(content, number))


def _read_parts(parts: list[Any], number: int) -> Iterable[str]:
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else part
        if isinstance(text, str) and kind in (None, "text"):
            yield text
        elif isinstance(kind, str) and kind != "text":
            raise Unusable(
                f"turn {number} has a part of type '{kind}': images and sound are not learned; "
                "remove the part or the row"
            )
        else:
            raise Unusable(f"turn {number}: a part of its content has no text")


def _read_call(call: Any, number: int) -> dict[str, Any]:
    """Return a tool call with the function's name and its arguments as an object."""
    function = (call.get("function") or call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name:
        raise Unusable(f"turn {number}: a tool call needs a function with a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _from_json(arguments or "{}", f"turn {number}: arguments of '{name}'")
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise Unusable(
            f"turn {number}: arguments of '{name}' must be an object, not {kind_of(arguments)}"
        )
    found = {"name": name, "arguments": _without_nulls(arguments, f"arguments of '{name}'")}
    identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**identity, "type": "function", "function": found}


def _from_json(text: Any, what: str) -> Any:
    if not isinstance(text, str):
        raise Unusable(f"{what} must be JSON text, not {kind_of(text)}")
    try:
        found = json.loads(text, parse_constant=_refuse_constant)
        json.dumps(found, ensure_ascii=False).encode()  # halves of surrogate pairs cannot be
    except json.JSONDecodeError as error:
        raise Unusable(f"{what} is not JSON at column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise Unusable(f"{what} is not JSON that can be read: {error}") from error
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _without_nulls(value: Any, what: str) -> Any:
    """Return a value without its null keys, which say "not given".

    Parquet and arrow give every object the keys of all others, as nulls; a template would write
    them out and the model would learn to say null.
    """
    if isinstance(value, dict):
        return {k: _without_nulls(v, what) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        if None in value:
            raise Unusable(f"{what}: a list holds null; remove it")
        return [_without_nulls(item, what) for item in value]
    return value
