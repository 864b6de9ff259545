"""The table in docs/kernels.md is made from the kernels' SPECs; run this file to write it anew."""

from pathlib import Path

from harness import SPECS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
BEGIN, END = "<!-- table: from the SPECs -->\n", "<!-- end of table -->"


def table():
    lines = ["| kernel | what | moved, in elements of the tensors' dtype |", "|---|---|---|"]
    lines += [f"| `{s.name}` | {s.summary} | {s.traffic} |" for s in SPECS.values()]
    return "\n".join(lines) + "\n"


def with_table(text):
    before, rest = text.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


def test_the_table_is_the_specs():
    text = PAGE.read_text(encoding="utf-8")
    assert text == with_table(text)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
