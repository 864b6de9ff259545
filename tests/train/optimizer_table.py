"""The table in docs/optimizers.md, made of what tests/train/test_optimizers.py measured.

`python -m tests.train.optimizer_table --write` runs those tests and writes the page anew; without
`--write` it prints the table.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "optimizers.md"
BEGIN, END = "<!-- table: from the tests -->\n", "<!-- end of table -->"
HEAD = (
    "| `train.optimizer` | comes with | runs on a CPU | resumes bit for bit | `train.optimizer_args` "
    "| loss, first and last step | bytes of state for a parameter |\n|---|---|---|---|---|---|---|\n"
)


@dataclass
class Row:
    """What was found out about an optimizer.

    Args:
        name: As in `train.optimizer`.
        comes_with: Package, or extra of whet.
        runs: yes, or why not.
        resumes: Whether a resumed run had the losses of the whole one.
        settings: Names in `train.optimizer_args`.
        first: Loss of the first step.
        last: Loss of the last step.
        state: Bytes for each trained parameter.
    """

    name: str
    comes_with: str
    runs: str = "not tried: the package is not installed"
    resumes: str = ""
    settings: str = ""
    first: float = 0.0
    last: float = 0.0
    state: float = 0.0

    @property
    def words(self):
        """The columns that do not hang on the machine."""
        return [f"`{self.name}`", self.comes_with, self.runs, self.resumes, self.settings]

    def line(self):
        numbers = [f"{self.first:.2f} → {self.last:.2f}", f"{self.state:.2f}"]
        return f"| {' | '.join(self.words + (numbers if self.first else ['', '']))} |"


def table(rows):
    return HEAD + "".join(row.line() + "\n" for row in rows)


def with_table(text, rows):
    before, rest = text.split(BEGIN)
    return before + BEGIN + table(rows) + END + rest.split(END)[1]


def words_of_the_page():
    """Return the words of each line of the page's table, by the optimizer's name."""
    text = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    return {line[0].strip("`"): line[:5] for line in cells}


class Collector:
    """A plugin of pytest that takes the rows that tests record."""

    def __init__(self):
        self.rows = {}

    def pytest_runtest_logreport(self, report):
        for key, value in report.user_properties:
            if key == "optimizer":
                self.rows[value["name"]] = Row(**value)


def main():
    import pytest

    collector = Collector()
    here = str(Path(__file__).with_name("test_optimizers.py"))
    code = pytest.main([here, "-q", "-k", "takes_several_steps"], plugins=[collector])
    rows = list(collector.rows.values())
    if code or not rows:
        sys.exit(f"the tests ended with {code}; the page is left as it is")
    if "--write" in sys.argv:
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    else:
        print(table(rows))


def record(record_property, row):
    """Hand a row to whoever collects them."""
    record_property("optimizer", asdict(row))


if __name__ == "__main__":
    main()
