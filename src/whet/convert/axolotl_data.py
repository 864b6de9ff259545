"""The data sets of an Axolotl config: where their rows are, and how they are laid out.

Every key of a data set is taken over, or named; so are roles and names of a turn's parts that whet
would not find by itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from whet.convert.rules import Reading, Rule, fatal, lost, moot, names, with_others

_FORMATS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "completion": "text", "pretrain": "text"}
_FILES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".md", ".gz")
# What whet takes a turn's role from, whatever the data set says.
_ROLES = {
    "system": {"system", "developer"}, "user": {"user", "human"},
    "assistant": {"assistant", "gpt", "bot", "model"}, "tool": {"tool", "function", "observation"},
}  # fmt: skip
_TURN = {"role": ("role", "from"), "content": ("content", "value")}
_COLUMNS = (
    "instruction", "input", "output", "system", "prompt", "chosen", "rejected", "completion", "label",
)  # fmt: skip
_TEMPLATE = lost("prompts are made by the chat template (model.chat_template)")
_ONE_TEMPLATE = lost("one template serves all sets: model.chat_template")
_READ = with_others("")

# Keys of one data set.
SOURCE: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "path", "split", "type", "data_files", "field", "text_column", "field_messages",
            "field_tools", "message_property_mappings", "message_field_role", "message_field_content",
            "roles", "roles_to_train", "train_on_eos",
        ),
        _READ,
    ),
    "name": lost("whet takes a Hub id with a split, or files"),
    "revision": lost("whet takes a Hub id with a split, or files"),
    "shards": lost("every row is read; `#N` behind a name takes N of them"),
    "shards_idx": lost("every row is read; `#N` behind a name takes N of them"),
    "skip": lost("every row is read; `#N` behind a name takes N of them"),
    "ds_type": moot("seen by the file's ending"),
    "trust_remote_code": moot("no code of a data set is run"),
    "preprocess_shards": moot("rows are read one by one"),
    "chat_template": _ONE_TEMPLATE,
    "chat_template_jinja": _ONE_TEMPLATE,
    "conversation": _ONE_TEMPLATE,
    "input_format": lost("a function of yours can: data.formatting"),
    "input_transform": lost("a function of yours can: data.formatting"),
    "field_human": lost("set data.columns"),
    "field_model": lost("set data.columns"),
    "field_thinking": lost("a turn's thoughts are in reasoning_content or thinking"),
    "template_thinking_key": lost("the chat template decides"),
    "split_thinking": lost("the chat template decides"),
    "message_field_training": lost("the assistant's turns and the end of each are learned"),
    "message_field_training_detail": lost("the assistant's turns and the end of each are learned"),
    "drop_system_message": lost("system turns stay"),
}  # fmt: skip


def set_data(reading: Reading) -> None:
    """Make data.train, data.heldout, data.format and data.columns of the data sets."""
    for key, ours in (
        ("datasets", "data.train"),
        ("pretraining_dataset", "data.train"),
        ("test_datasets", "data.heldout"),
    ):
        given = reading.get(key) or []
        sources = [
            one if isinstance(one, dict) else {"path": one}
            for one in (given if isinstance(given, list) else [given])
        ]
        paths = [path for one in sources for path in _paths(reading, key, one)]
        if paths:
            reading.set(ours, paths[0] if len(paths) == 1 else paths)
        if ours == "data.train" and sources:
            _set_layout(reading, key, sources)
    if "data.heldout" in reading.ours:
        reading.ours.pop("data.heldout_fraction", None)


def _paths(reading: Reading, key: str, source: dict[str, Any]) -> list[str]:
    """Return a data set's files, or its id with the split behind it; tell what else it says."""
    for part, value in source.items():
        rule = SOURCE.get(part)
        if rule is None:
            reading.lose(f"{key}.{part}", "whet does not know it")
        elif rule.moot:
            reading.moot.append((f"{key}.{part}", rule.why))
        elif not rule.together and value not in (None, False, "", [], "tokenizer_default"):
            reading.lose(f"{key}.{part}", f"{value}: {rule.why}")
    path, split = source.get("path"), source.get("split")
    if files := source.get("data_files"):
        return names(files)
    if not isinstance(path, str) or not path:
        raise fatal(key, source, "give each data set a path")
    if not split:
        return [path]
    if _is_local(path, reading.folder):
        if split != "train":
            reading.lose(f"{key}.split", f"{split}: files have no split; name the ones you want")
        return [path]
    return [f"{path}:{split}"]


def _is_local(path: str, folder: Path) -> bool:
    known = path.endswith(_FILES) or path[0] in "./~" or path.count("/") != 1
    return known or Path(path).exists() or (folder / path).exists()


def _set_layout(reading: Reading, key: str, sources: list[dict[str, Any]]) -> None:
    """Read the rows' layout; where the sets differ, whet looks at each file's first row."""
    kinds = [source.get("type") for source in sources]
    formats = {_FORMATS.get(str(kind)) for kind in kinds}
    if len(formats) == 1 and (only := formats.pop()):
        reading.set("data.format", only)
    maps = []
    for source, kind in zip(sources, kinds, strict=True):
        columns = _columns(source)
        if isinstance(kind, dict):
            columns |= _columns_of_type(reading, key, kind)
        elif isinstance(kind, str) and kind not in (*_FORMATS, "chat_template"):
            reading.lose(f"{key}.type", f"{kind}: whet looks at the first row (data.format)")
        maps.append({ours: theirs for ours, theirs in columns.items() if ours != theirs})
        _check_turns(reading, key, source)
    if any(one != maps[0] for one in maps):
        reading.lose(
            key, "the sets name their columns differently, and data.columns is for all of them"
        )
    reading.set("data.columns", {k: v for one in maps for k, v in one.items()} or None)


def _columns(source: dict[str, Any]) -> dict[str, str]:
    columns = {}
    if field := source.get("field") or source.get("text_column"):
        columns["text"] = field
    if messages := source.get("field_messages"):
        columns["conversations" if messages == "conversations" else "messages"] = messages
    if tools := source.get("field_tools"):
        columns["tools"] = tools
    return columns


def _columns_of_type(reading: Reading, key: str, kind: dict[str, Any]) -> dict[str, str]:
    """Read a `type` that spells out columns and formats."""
    columns = {}
    for part, value in kind.items():
        column = part.removeprefix("field_")
        if part.startswith("field_") and column in _COLUMNS:
            columns[column] = value
        elif part == "system_prompt":
            reading.set("data.system", value or None)
        elif part.endswith("format"):
            if value and value.strip("{}") not in _COLUMNS:
                reading.lose(f"{key}.type.{part}", _TEMPLATE.why)
        else:
            reading.lose(f"{key}.type.{part}", "whet does not know it")
    return columns


def _check_turns(reading: Reading, key: str, source: dict[str, Any]) -> None:
    """Name what is said about turns that whet would read in another way."""
    mapped = dict(source.get("message_property_mappings") or {})
    for part in ("role", "content"):
        if old := source.get(f"message_field_{part}"):
            mapped.setdefault(part, old)
    for part, theirs in mapped.items():
        if theirs not in _TURN.get(part, (part,)):
            reading.lose(
                f"{key}.message_property_mappings",
                f"{part}: {theirs}: a turn has role and content, or from and value (data.formatting)",
            )
    for role, called in (source.get("roles") or {}).items():
        if odd := sorted(set(names(called)) - _ROLES.get(role, set())):
            reading.lose(f"{key}.roles", f"{role}: whet does not know the role {', '.join(odd)}")
    for part, usual in (("roles_to_train", (["assistant"], ["gpt"])), ("train_on_eos", ("turn",))):
        if (value := source.get(part)) not in (None, *usual):
            reading.lose(
                f"{key}.{part}", f"{value}: the assistant's turns and the end of each are learned"
            )
