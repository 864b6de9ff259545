"""Calls that Unsloth's notebooks make before and around a trainer."""

from __future__ import annotations

import warnings
from typing import Any

from whet.data.conversations import TURN_COLUMNS, Unusable, read_turns
from whet.errors import InputError


def standardize_sharegpt(dataset: Any, num_proc: int | None = None, **unused: Any) -> Any:
    """Write conversations of any style as turns of `role` and `content`.

    Args:
        dataset: A Dataset, IterableDataset or DatasetDict with a column conversations, messages,
            conversation or dialog: ShareGPT's turns (`from`, `value`), OpenAI's, or a mix.
        num_proc: Processes; None is one.
        **unused: Unsloth's names of roles and its batch size: whet knows the roles of `whet data`.

    Returns:
        A dataset with that column rewritten; roles are system, user, assistant and tool.

    Raises:
        InputError: There is no such column, or a row's conversation cannot be read.
    """
    if unused:
        warnings.warn(
            f"standardize_sharegpt: {', '.join(unused)} has nothing to do here; the roles that whet "
            "knows are those of docs/data.md", UserWarning, stacklevel=2,
        )  # fmt: skip
    columns = _columns_of(dataset)
    column = next((name for name in TURN_COLUMNS if name in columns), None)
    if column is None:
        raise InputError(
            "standardize_sharegpt finds no conversations", ", ".join(columns),
            f"name the column {' or '.join(TURN_COLUMNS)}",
        )  # fmt: skip

    def rewrite(row: dict[str, Any], number: int) -> dict[str, Any]:
        turns = [_without_nothing(turn) for turn in row[column] or []]
        try:
            return {column: read_turns(turns, column)}
        except Unusable as error:
            raise InputError(f"standardize_sharegpt: row {number}: {error}") from error

    options = {} if num_proc is None else {"num_proc": num_proc}
    # The column leaves first: its turns have other keys afterwards.
    return dataset.map(rewrite, with_indices=True, remove_columns=[column], **options)


standardize_data_formats = standardize_sharegpt


def unsloth_train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """Call `trainer.train`, whose loss is divided by the labels of a whole step as it is."""
    return trainer.train(*args, **kwargs)


def PatchDPOTrainer() -> None:  # noqa: N802 - Unsloth's name
    """Do nothing: trl's trainers take a model with the engine as they are."""
    warnings.warn(
        "PatchDPOTrainer has nothing to do here; trl's DPOTrainer takes the model as it is",
        UserWarning, stacklevel=2,
    )  # fmt: skip


def _columns_of(dataset: Any) -> list[str]:
    found = dataset.column_names
    if isinstance(found, dict):  # of a DatasetDict
        return list(dict.fromkeys(name for names in found.values() for name in names))
    return list(next(iter(dataset)) if found is None else found)


def _without_nothing(turn: Any) -> Any:
    """Drop what a turn has only because others have it: Arrow gives all of them the same keys."""
    if not isinstance(turn, dict):
        return turn
    return {key: value for key, value in turn.items() if value is not None}
