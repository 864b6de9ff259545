"""The errors whet shows to people.

Every message states the rule, the value that broke it and the way out, in one sentence a person
can act on. Bugs of our own are `assert`s and tracebacks, never these.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class WhetError(Exception):
    """The work failed, for a reason that the user can do something about.

    Args:
        what: The rule or the job, as a clause without a full stop.
        got: The value that was found, if there is one to show.
        fix: What to do about it, as an imperative.
    """

    exit_code = 1

    def __init__(self, what: str, got: object = None, fix: str | None = None) -> None:
        self.what, self.got, self.fix = what, got, fix
        super().__init__(what, got, fix)

    def __str__(self) -> str:
        text = self.what if self.got is None else f"{self.what}; got {self.got}"
        return text if self.fix is None else f"{text}; {self.fix}"


class InputError(WhetError):
    """What the user gave is wrong: a config, a file, a name. Nothing was started."""

    exit_code = 2

    @classmethod
    def listing(cls, title: str, mistakes: Iterable[str], most: int = 20) -> InputError:
        """Tell several mistakes at once, one a line.

        Args:
            title: What was read, for instance the config's path.
            mistakes: One sentence each.
            most: How many to print before "and N more".
        """
        lines = list(mistakes)
        shown = [f"  - {line}" for line in lines[:most]]
        if len(lines) > most:
            shown.append(f"  - and {len(lines) - most} more")
        return cls("\n".join([title, *shown]))


class Interrupted(WhetError):
    """The user stopped a run; its checkpoint is on disk. The exit code is the shell's for Ctrl-C."""

    exit_code = 130


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """Return the known name closest to a misspelt one, or None when nothing is close.

    Args:
        name: What was written.
        known: Every name that would have been right.
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return close[0] if close else None


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, for a sentence of ours.

    Args:
        error: What was raised.
    """
    return (str(error).strip() or type(error).__name__).split("\n")[0][:300]
