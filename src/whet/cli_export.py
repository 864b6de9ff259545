"""The command `export`: a run's result for other programs, loaded again and compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from whet.errors import InputError, WhetError

if TYPE_CHECKING:
    from collections.abc import Callable

    from whet.export.check import Gate
    from whet.runs import RunFolder
    from whet.terminal import Terminal

export_app = typer.Typer()

_EPILOG = """\b
merged    a Hugging Face folder with the adapter merged in: transformers, vLLM, ...
adapter   the adapter alone: peft, vLLM's LoRA modules
gguf      one GGUF file for each --quant: llama.cpp, LM Studio, ...
ollama    a GGUF file and a Modelfile with template, stop tokens and parameters
llama2c   model.bin and tokenizer.bin for llama2.c (models shaped like Llama 2)

Each is loaded again by the program that will use it and compared with the live model: tokens, chat
template, logits or perplexity and KL divergence, answers, the end of a turn. The table is
stored beside the export (check.json and README.md). Exit 1 when it is not the model that was
trained.
"""


@export_app.command(epilog=_EPILOG)
def export(
    name: Annotated[str, typer.Argument(metavar="RUN", help="Run folder.")],
    to: Annotated[
        Literal["merged", "adapter", "gguf", "ollama", "llama2c"],
        typer.Option(help="What to write."),
    ] = "merged",
    out: Annotated[Path | None, typer.Option(help="Folder; default: RUN/export/KIND.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Type of merged weights; default: what the run computed in."),
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="4: the merged model in NF4 (bitsandbytes).")
    ] = None,
    quant: Annotated[
        list[str] | None,
        typer.Option(
            help="Types of the GGUF files, with commas: f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m, "
            "... Default: q8_0."
        ),
    ] = None,
    base: Annotated[
        Literal["original", "dequantised"],
        typer.Option(
            help="What a QLoRA run is merged into: the original weights, or the 4-bit ones it "
            "was trained on, dequantised."
        ),
    ] = "original",
    push: Annotated[
        str | None, typer.Option(metavar="REPO", help="Also upload it to this Hub repository.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Load the export again and compare it.")
    ] = True,
) -> None:
    """Write the tuned model for other programs, load it again and compare it with the live one."""
    from whet.runs import RunFolder

    run = RunFolder.open(name)
    folder = out or run.path / "export" / to
    _require_fitting(to, dtype, bits, quant, base)
    _require_ours(folder)
    from whet.export_view import show_gates
    from whet.terminal import Terminal, quiet_libraries

    quiet_libraries()
    terminal = Terminal()
    files, gates = _write(run, folder, to, dtype, bits, quant, base, check, terminal.stage)
    for file in files:
        terminal.note(f"{file} ({_size(file):,.1f} MiB)")
    if gates:
        show_gates(terminal.out, gates)
    if run.config.model.load_in_4bit and run.adapter_dir.is_dir() and check and to != "adapter":
        _tell_bases(run, folder, base, terminal)
    if failed := [f"{gate.file}: {cause}" for gate in gates for cause in gate.causes]:
        raise WhetError(
            f"the export in '{folder}' is not the model that was trained: {'; '.join(failed)}"
        )
    if push is not None:
        from whet.export.hub import upload

        terminal.stage(f"uploading to {push}")
        terminal.note(upload(folder, push, private=private))


def _require_fitting(
    to: str, dtype: str | None, bits: int | None, quant: list[str] | None, base: str
) -> None:
    """Refuse options that have nothing to do for this kind."""
    if dtype is not None and to != "merged":
        raise InputError(f"--dtype is for --to merged, not for {to}", fix="leave it out")
    if bits is not None and (to != "merged" or bits != 4):
        raise InputError("--bits 4 is for --to merged", f"--to {to} --bits {bits}")
    if quant is not None and to not in ("gguf", "ollama"):
        raise InputError(f"--quant is for --to gguf and ollama, not for {to}", fix="leave it out")
    if base != "original" and to == "adapter":
        raise InputError("--base is for merging; an adapter is written as it was trained")


def _require_ours(folder: Path) -> None:
    """Refuse to write over a folder that is no export of ours."""
    ours = folder.is_dir() and ((folder / "README.md").is_file() or not any(folder.iterdir()))
    if folder.exists() and not ours:
        raise InputError(f"'{folder}' holds something else", fix="choose another folder with --out")


def _write(
    run: RunFolder,
    folder: Path,
    to: str,
    dtype: str | None,
    bits: int | None,
    quant: list[str] | None,
    base: str,
    check: bool,
    tell: Callable[[str], None],
) -> tuple[list[Path], list[Gate]]:
    from whet.export import exports
    from whet.export.gguf import parse_types

    kinds = parse_types(quant or ["q8_0"])
    if to in ("merged", "adapter"):
        return [folder], exports.export_hf(run, folder, to, dtype, bits, base, check, tell)
    if to == "gguf":
        return exports.export_gguf(run, folder, kinds, base, check, tell)
    if to == "ollama":
        from whet.export.ollama import export_ollama

        return export_ollama(run, folder, kinds, base, check, tell)
    from whet.export.llama2c import export_llama2c

    return export_llama2c(run, folder, base, check, tell)


def _tell_bases(run: RunFolder, folder: Path, base: str, terminal: Terminal) -> None:
    """Show and store what it changes which base a QLoRA run is merged into."""
    import json

    from whet.export.exports import compare_bases
    from whet.runs import write_text

    found = {"base": base, **compare_bases(run)}
    write_text(folder / "bases.json", json.dumps(found, indent=2) + "\n")
    run.update_report(export_bases=found)
    terminal.note(
        f"merged into the {base} weights; perplexity of {found['rows']} held-out rows: original "
        f"{found['perplexity_original']:.4g}, dequantised (as trained) "
        f"{found['perplexity_dequantised']:.4g}; KL divergence {found['kl']:.2e} nats a token"
    )


def _size(path: Path) -> float:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) / 2**20
