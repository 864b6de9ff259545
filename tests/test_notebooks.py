"""Every notebook runs from its first cell to its last, with a tiny model in the place of its own.

One kernel runs them all, emptied between two: importing torch and peft takes longer than a notebook.
"""

from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
# The quickstart first: its run is the one that gguf_and_chat exports.
NAMES = sorted(
    (f.stem for f in FOLDER.glob("*.ipynb")), key=lambda name: (name != "quickstart", name)
)
BYTES = FOLDER.parent / "examples" / "models" / "gpt2-bytes"
SMALL = [
    "train.max_steps=3", "train.warmup_steps=1", "model.max_length=240", "data.max_rows=12",
    "eval.max_rows=4", "eval.exact_match=false", "eval.samples=0", "engine.check=off", "plan.probe=off",
    "data.cache=false", "train.checkpoint_steps=null",
]  # fmt: skip


def parameters(tiny_model, tmp_path):
    """Return what takes the place of each notebook's own parameters."""
    small = [f"run.dir={tmp_path}", f"model.name={tiny_model}", *SMALL]
    text = tmp_path / "text.txt"
    text.write_text(
        "A planner plans what a run needs.\n\n" * 8 + "".join(f"Line {n}.\n\n" for n in range(20))
    )
    texts = [f"data.train={text}", "data.text_rows=paragraph", "data.heldout_fraction=0.2"]
    return {
        "quickstart": {"SET": small, "ANSWER": 4},
        "dpo": {"SET": small, "ANSWER": 4},
        "plain_text": {"SET": small + texts, "ANSWER": 4},
        "gpt2": {
            "SET": [*small, *texts, f"model.name={BYTES}", "model.init=random"], "ANSWER": 4,
        },
        "qlora": {
            "SET": [*small, "data.heldout_fraction=0.2"], "CARDS": ["12GB", "24GB"],
        },
        "gguf_and_chat": {"RUN": str(tmp_path / "quickstart"), "KINDS": ["f16", "q8_0"], "ANSWER": 4},
    }  # fmt: skip


@pytest.fixture(scope="module")
def executed(tiny_model, tmp_path_factory):
    """Run all notebooks one after the other in one kernel, and return each one's cells of code."""
    from nbclient import NotebookClient

    tmp_path = tmp_path_factory.mktemp("notebooks")
    values, cells, code = parameters(tiny_model, tmp_path), [], {}
    for name in NAMES:
        notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
        code[name] = [cell for cell in notebook.cells if cell.cell_type == "code"]
        first = code[name][0]
        first.source += "".join(f"\n{key} = {value!r}" for key, value in values[name].items())
        cells += [nbformat.v4.new_code_cell("%reset -f"), *code[name]]
    client = NotebookClient(
        nbformat.v4.new_notebook(cells=cells), timeout=300,
        startup_timeout=300, allow_errors=True,
        kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}},
    )  # fmt: skip
    client.execute()
    return code


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_committed_without_outputs(name):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert code[0].source.startswith("# Parameters")


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_to_its_end_and_shows_a_plot(name, executed):
    outputs = [output for cell in executed[name] for output in cell.outputs]
    assert [f"{o.ename}: {o.evalue}" for o in outputs if o.output_type == "error"] == []
    assert all(cell.execution_count for cell in executed[name])
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not (FOLDER / "runs").exists(), "the test's own folder is used"


def test_every_notebook_is_here():
    assert NAMES == ["quickstart", "dpo", "gguf_and_chat", "gpt2", "plain_text", "qlora"]
