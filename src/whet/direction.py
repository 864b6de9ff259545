"""Text of a model on a terminal: what is written from right to left stands right, and nothing else acts.

Terminals that know the bidirectional algorithm (VTE, Konsole, mlterm, Terminal.app) order the letters
themselves, line by line, and need them in the order they are spoken; so do pipes, files and the
clipboard. What they cannot know is that a line of Arabic with a Latin word or a full stop in it is one
run from right to left, for their paragraphs begin at the left. A line whose first letter is one of a
right-to-left script is therefore put between FIRST STRONG ISOLATE and POP DIRECTIONAL ISOLATE (Unicode
Standard Annex 9, 2.4.2), which have no width. Letters are never reordered here: on a terminal that does
it too, they would be reordered twice.
"""

from __future__ import annotations

import re
import unicodedata

ISOLATE, POP = "\u2068", "\u2069"
# Control characters but tab and newline: a model must not move the cursor or change the title.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Lines:
    """Pieces of text made ready for a terminal, line by line.

    Args:
        isolates: Whether lines from right to left get their marks: on a terminal, not in a pipe.
    """

    def __init__(self, isolates: bool) -> None:
        self.isolates = isolates
        self._held = ""  # a line's beginning without a letter: its direction is not known yet
        self._known = self._open = False

    def push(self, piece: str) -> str:
        """Return what can be written now.

        Args:
            piece: The next piece of the text.
        """
        piece = CONTROLS.sub("", piece)
        if not self.isolates:
            return piece
        first, *more = piece.split("\n")
        written = self._push_within(first)
        for line in more:
            written += self.close() + "\n" + self._push_within(line)
        return written

    def close(self) -> str:
        """Return what ends the line."""
        written = self._held + (POP if self._open else "")
        self._held, self._known, self._open = "", False, False
        return written

    def _push_within(self, piece: str) -> str:
        if self._known:
            return piece
        text = self._held + piece
        direction = direction_of(text)
        if direction is None:
            # Digits and signs are written in the same order either way, blanks and bullets are not.
            self._held = text
            return ""
        self._held, self._known, self._open = "", True, direction == "right"
        return (ISOLATE if self._open else "") + text


def direction_of(text: str) -> str | None:
    """Return the direction of a text's first letter, `left` or `right`; None without letters.

    Rule P2 of Unicode Standard Annex 9; what stands in an isolate of the text's own counts here too.

    Args:
        text: Any text.
    """
    for character in text:
        kind = unicodedata.bidirectional(character)
        if kind in ("R", "AL"):
            return "right"
        if kind == "L":
            return "left"
    return None


def isolated(text: str) -> str:
    """Return a whole text with its lines isolated, for a place beside other text.

    Args:
        text: Any text.
    """
    lines = Lines(isolates=True)
    return lines.push(text) + lines.close()
