"""The text of a config: YAML as people write it, JSON as programs do; no key twice in either."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import yaml

from whet.errors import InputError


class _Loader(yaml.SafeLoader):
    """YAML whose `1e-4` is a number and whose doubled keys are errors."""


_Loader.yaml_implicit_resolvers = copy.deepcopy(yaml.SafeLoader.yaml_implicit_resolvers)
# YAML 1.1 reads on and off as booleans, which here are choices (`engine.cuda_graphs: off`).
for _start in "oO":
    _Loader.yaml_implicit_resolvers[_start] = [
        resolver
        for resolver in _Loader.yaml_implicit_resolvers[_start]
        if resolver[0] != "tag:yaml.org,2002:bool"
    ]
# YAML 1.1 reads 1e-4 as text because it has no dot; every config of a trainer has such a number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _mapping_without_doubles(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, str) and key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key '{key}' is given twice", key_node.start_mark
            )
        seen.add(key if isinstance(key, str) else str(key))
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_doubles)


def parse_yaml(text: str) -> Any:
    """Parse YAML (or JSON, which is YAML) with numbers as people write them.

    Args:
        text: The document.

    Raises:
        yaml.YAMLError: The text is not YAML, or gives a key twice.
    """
    return yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader)


def parse_json(text: str, name: str) -> dict[str, Any]:
    """Parse JSON that holds an object.

    Args:
        text: The document.
        name: What to call it in an error.

    Raises:
        InputError: It is not JSON, with line and column; gives a key twice; or is no object.
    """
    try:
        tree = json.loads(text, object_pairs_hook=_object_without_doubles)
    except json.JSONDecodeError as error:
        at = f"{name}:{error.lineno}:{error.colno}"
        raise InputError(f"{at}: {error.msg}", fix="correct the JSON there") from error
    except _DoubledKey as error:
        raise InputError(f"{name}: key '{error}' is given twice", fix="take one out") from error
    return _require_sections(tree, name)


class _DoubledKey(ValueError):
    """A JSON object has this key twice, and json would take the last without a word."""


def _object_without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise _DoubledKey(key)
        made[key] = value
    return made


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; InputError as of `parse_json`, or when it cannot be read.

    Args:
        path: The file.
    """
    return parse_json(_read_text(path), str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Args:
        path: The file.

    Raises:
        InputError: It cannot be read, is not YAML (with line and column), or is no mapping.
    """
    try:
        tree = parse_yaml(_read_text(path))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise InputError(f"{at}: {error.problem}", fix="correct the YAML there") from error
    except yaml.YAMLError as error:
        raise InputError(f"'{path}' is not YAML: {error}") from error
    return _require_sections(tree, str(path))


def _read_text(path: Path) -> str:
    if not path.exists():
        raise InputError(f"there is no config file '{path}'", fix="`whet init` writes one")
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"'{path}' cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"'{path}' is not UTF-8 text", f"byte {error.start}") from error


def _require_sections(tree: Any, name: str) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise InputError(
            f"'{name}' must hold sections (model, data, train, ...)",
            type(tree).__name__,
            "`whet init` writes an example",
        )
    return tree
