"""Right-to-left text on a terminal: isolates around its lines, nothing reordered, nothing that acts."""

import unicodedata

import pytest

from whet.direction import ISOLATE, POP, Lines, direction_of, isolated

ARABIC = "مرحبا، اسمي whet."
HEBREW = "שלום 123!"


def written(pieces, isolates=True):
    lines = Lines(isolates)
    return "".join(lines.push(piece) for piece in pieces) + lines.close()


@pytest.mark.parametrize("text", [ARABIC, HEBREW, f"- {ARABIC}", f"1. {HEBREW}"])
def test_a_line_from_right_to_left_is_isolated(text):
    assert isolated(text) == ISOLATE + text + POP


@pytest.mark.parametrize("text", ["plain", f"name: {ARABIC}", "", "42 + 1", "日本語"])
def test_other_lines_are_as_they_are(text):
    assert isolated(text) == text


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_pieces_of_any_size_are_the_same_text(size):
    text = f"So:\n\n- {ARABIC}\n{HEBREW}\nand so on\n{ARABIC}"
    pieces = [text[n : n + size] for n in range(0, len(text), size)]
    marked = f"So:\n\n{ISOLATE}- {ARABIC}{POP}\n{ISOLATE}{HEBREW}{POP}\nand so on\n{ISOLATE}{ARABIC}{POP}"
    assert written(pieces) == marked
    assert marked.replace(ISOLATE, "").replace(POP, "") == text  # the order of the letters is kept


def test_a_bullet_waits_for_the_first_letter():
    lines = Lines(isolates=True)
    assert lines.push("- ") == "" and lines.push("(") == ""
    assert lines.push("م") == f"{ISOLATE}- (م"
    assert lines.push("رحبا") == "رحبا" and lines.push("\n") == f"{POP}\n"
    assert lines.push("1. ") == "" and lines.close() == "1. "


def test_in_a_pipe_text_has_no_marks():
    assert written([ARABIC, "\n", HEBREW], isolates=False) == f"{ARABIC}\n{HEBREW}"


def test_a_model_cannot_steer_the_terminal():
    text = "a\x1b]0;title\x07b\x1b[2Jc\r\x9bd\te\nf"
    for isolates in (True, False):
        assert written([text], isolates) == "a]0;titleb[2Jcd\te\nf"


def test_the_marks_open_and_close_an_isolate():
    assert unicodedata.bidirectional(ISOLATE) == "FSI" and unicodedata.bidirectional(POP) == "PDI"
    assert (direction_of(ARABIC), direction_of("a"), direction_of(" 1")) == ("right", "left", None)
