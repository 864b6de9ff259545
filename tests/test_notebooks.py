"""Every notebook runs from its first cell to its last, with a tiny model in the place of its own.

One kernel runs them all, emptied between two: importing torch and peft takes longer than a notebook.
"""

import asyncio
from pathlib import Path

import nbformat
import pytest

from whet.train.recipe import fit

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NAMES = sorted(file.stem for file in FOLDER.glob("*.ipynb"))
BYTES = FOLDER.parent / "examples" / "models" / "gpt2-bytes"
SMALL = [
    "train.max_steps=3", "train.warmup_steps=1", "model.max_length=240", "data.max_rows=12",
    "eval.max_rows=4", "eval.exact_match=false", "eval.samples=0", "engine.check=off", "plan.probe=off",
    "data.cache=false", "train.checkpoint_steps=null",
]  # fmt: skip


@pytest.fixture(scope="module")
def kernel():
    from jupyter_client.manager import AsyncKernelManager

    manager = AsyncKernelManager(kernel_name="python3")
    yield manager
    if manager.has_kernel:
        asyncio.run(manager.shutdown_kernel(now=True))


@pytest.fixture
def parameters(tiny_model, tmp_path, config):
    """What takes the place of each notebook's own parameters."""
    small = [f"run.dir={tmp_path}", f"model.name={tiny_model}", *SMALL]
    text = tmp_path / "text.txt"
    text.write_text("A planner plans. " * 60)
    texts = [f"data.train={text}", "data.text_rows=file", "data.heldout_fraction=0.2"]
    made = {
        "quickstart": {"SET": small, "ANSWER": 4},
        "dpo": {"SET": small, "ANSWER": 4},
        "plain_text": {"SET": small + texts, "ANSWER": 4},
        "gpt2": {
            "SET": [*small, *texts, f"model.name={BYTES}", "model.init=random"], "ANSWER": 4,
        },
        "qlora": {
            "SET": [*small, "data.heldout_fraction=0.2"], "CARDS": ["12GB", "24GB"],
        },
        "gguf_and_chat": {"RUN": str(tmp_path / "tiny"), "KINDS": ["f16", "q8_0"], "ANSWER": 4},
    }  # fmt: skip

    def of(name):
        if name == "gguf_and_chat":
            pytest.importorskip("cyllama")
            changes = {"name": "tiny", "dir": str(tmp_path)}
            short = config.train.model_copy(update={"max_steps": 2})
            run = config.run.model_copy(update=changes)
            fit(config.model_copy(update={"run": run, "train": short}))
        return made[name]

    return of


def test_every_notebook_has_parameters_here():
    assert NAMES == ["dpo", "gguf_and_chat", "gpt2", "plain_text", "qlora", "quickstart"]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name, kernel, parameters, monkeypatch):
    from nbclient import NotebookClient

    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), (
        "no outputs are committed"
    )
    assert code[0].source.startswith("# Parameters")
    values = parameters(name)
    assert all(f"{key} = " in code[0].source for key in values)
    code[0].source += "".join(f"\n{key} = {value!r}" for key, value in values.items())
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    client = NotebookClient(
        notebook, km=kernel, timeout=120, resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute()
    images = [
        output for cell in code for output in cell.outputs if "image/png" in output.get("data", {})
    ]
    assert images, "each shows a plot"
    assert not (FOLDER / "runs").exists(), "the test's own folder is used"
