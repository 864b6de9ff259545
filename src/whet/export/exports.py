"""Each kind of export from end to end: written, loaded again, compared, and its card and table stored."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whet.export import gguf
from whet.export.card import base_licence, model_card
from whet.export.check import Gate, check, mean_divergence, perplexity
from whet.export.gguf_compare import compare_tensors
from whet.export.gguf_settings import HALF_PRECISION_ACTIVATIONS
from whet.export.gguf_tokenizer import Vocabulary, prove, read_vocabulary
from whet.export.live import Live, TransformersModel, live_of
from whet.export.llama_cpp import GGUFModel, is_installed, require
from whet.export.strings import sample_strings
from whet.export.weights import export_adapter, export_merged, tuned_weights
from whet.model.load import choose_dtype, load_tokenizer
from whet.runs import RunFolder, make_folder, write_text

if TYPE_CHECKING:
    import torch

    from whet.export.tensors import Weights
    from whet.model import Tokenizer

logger = logging.getLogger(__name__)

CHECK_FILE = "check.json"
_NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
Tell = Callable[[str], None]


def export_hf(
    run: RunFolder,
    folder: Path,
    to: str,
    dtype: str | None = None,
    bits: int | None = None,
    base: str = "original",
    checked: bool = True,
    tell: Tell = logger.info,
) -> list[Gate]:
    """Write a Hugging Face folder, and compare it with the live model in transformers.

    Args:
        run: A finished run.
        folder: Where to; it is replaced whole.
        to: `merged` or `adapter`.
        dtype: Of merged weights; None is the type the run computed in.
        bits: 4 for a merged model in NF4.
        base: What a QLoRA run is merged into: `original` or `dequantised`.
        checked: Load it again and compare.
        tell: Called with what is being done.

    Returns:
        What was compared.
    """
    tell(f"writing {folder}")
    if to == "merged":
        kind = export_merged(run, folder, dtype, base, bits)
    else:
        export_adapter(run, folder)
        kind, _ = choose_dtype(run.config.model.dtype, full=False)
    if not checked:
        write_text(folder / "README.md", model_card(run, to, (), usage_of(to, folder)))
        return []
    tell("loading it again, and comparing it with the live model")
    gate = check_folder(run, folder, to, kind, bits, base)
    store(run, folder, to, [gate], usage_of(to, folder))
    return [gate]


def check_folder(
    run: RunFolder,
    folder: Path,
    to: str,
    dtype: torch.dtype,
    bits: int | None = None,
    base: str = "original",
    live: Live | None = None,
) -> Gate:
    """Load a Hugging Face folder with plain libraries, and compare it with the live model.

    Args:
        run: The run it came from.
        folder: The export.
        to: `merged` or `adapter`.
        dtype: Type of its weights, or of the products with 4-bit ones.
        bits: 4 when its weights are in NF4.
        base: What a QLoRA run was merged into.
        live: The live model's side, when it is known already.
    """
    tokenizer = load_tokenizer(run.config.model, run.weights_dir)
    live = live or _live(run, tokenizer, base)
    section = run.config.model.model_copy(update={"load_in_4bit": False})
    program = TransformersModel(folder, dtype, section if to == "adapter" else None)
    name = "nf4" if bits else _NAMES[str(dtype).removeprefix("torch.")]
    return check(live, program, folder.name, name, stops=to == "merged")[0]


def _live(run: RunFolder, tokenizer: Tokenizer, base: str) -> Live:
    if base == "original":
        return live_of(run, tokenizer)
    with tuned_weights(run, base) as weights:
        return live_of(run, tokenizer, weights)


def compare_bases(run: RunFolder) -> dict[str, float]:
    """Measure what it changes for a QLoRA run which weights its adapter is merged into.

    Args:
        run: A run with `model.load_in_4bit` and an adapter.

    Returns:
        Perplexities of the held-out rows with both, and the mean KL divergence between them. The
        dequantised weights are those the adapter was trained beside.
    """
    tokenizer = load_tokenizer(run.config.model, run.weights_dir)
    trained = _live(run, tokenizer, "dequantised")
    trained_logits, rows = trained.logits, trained.rows
    del trained
    original = _live(run, tokenizer, "original").logits
    return {
        "perplexity_original": perplexity(original, rows),
        "perplexity_dequantised": perplexity(trained_logits, rows),
        "kl": mean_divergence(trained_logits, original),
        "rows": len(rows),
    }


def export_gguf(
    run: RunFolder,
    folder: Path,
    kinds: Sequence[str],
    base: str = "original",
    checked: bool = True,
    tell: Tell = logger.info,
) -> tuple[list[Path], list[Gate]]:
    """Write GGUF files of several types, and compare each with the live model in llama.cpp.

    Args:
        run: A finished run.
        folder: Where to; files of other types in it stay.
        kinds: Types, as `gguf.parse_types` gives them.
        base: What a QLoRA run is merged into: `original` or `dequantised`.
        checked: Load them again and compare.
        tell: Called with what is being done.

    Returns:
        The files, and what was compared of each.

    Raises:
        InputError: llama.cpp does not know the family, or cyllama is needed and not there.
        WhetError: The disk is full.
    """
    if checked or any(kind in gguf.QUANTISED for kind in kinds):
        require()
    tokenizer = load_tokenizer(run.config.model, run.weights_dir)
    make_folder(folder)
    with tuned_weights(run, base) as weights:
        more = (
            {"general.license": licence} if (licence := base_licence(run.config.model.name)) else {}
        )
        files, scratch = write_files(
            weights,
            tokenizer,
            folder,
            run.path.name,
            kinds,
            more,
            keep_reference=checked,
            tell=tell,
        )
        try:
            if not checked:
                store(run, folder, "gguf", [], usage_of("gguf", files[0]))
                return files, []
            tell("loading them again in llama.cpp, and comparing them with the live model")
            live = live_of(run, tokenizer, weights if base == "dequantised" else None)
            gates = check_files(live, weights, files, kinds, scratch)
        finally:
            if scratch is not None:
                scratch.unlink(missing_ok=True)
    store(run, folder, "gguf", gates, usage_of("gguf", files[0]))
    return files, gates


def write_files(
    weights: Weights,
    tokenizer: Tokenizer,
    folder: Path,
    name: str,
    kinds: Sequence[str],
    more: dict[str, Any] | None = None,
    keep_reference: bool = False,
    tell: Tell = logger.info,
) -> tuple[list[Path], Path | None]:
    """Write GGUF files of several types.

    Args:
        weights: The model.
        tokenizer: Its tokenizer.
        folder: Where to; it exists.
        name: First part of the files' names.
        kinds: Types.
        more: More metadata.
        keep_reference: Leave the 16-bit file that the quantised ones were made from.
        tell: Called with what is being done.

    Returns:
        The files in the order of `kinds`, and the 16-bit file when it is none of them.
    """
    vocabulary = vocabulary_of(weights, tokenizer)
    made: dict[str, Path] = {}
    direct = [kind for kind in kinds if kind in gguf.DIRECT]
    small = [kind for kind in kinds if kind in gguf.QUANTISED]
    sources = [kind for kind in ("f16", "bf16", "f32") if kind in direct]
    scratch = None
    if small and not sources:
        scratch = folder / f".{name}-f16.gguf"
        gguf.write_gguf(weights, vocabulary, scratch, "f16", name, more)
    try:
        for kind in direct:
            made[kind] = folder / f"{name}-{kind}.gguf"
            tell(f"writing {made[kind]}")
            layout = gguf.write_gguf(weights, vocabulary, made[kind], kind, name, more)
            for note in layout.settings.notes:
                logger.warning("%s", note)
        for kind in small:
            made[kind] = folder / f"{name}-{kind}.gguf"
            tell(f"writing {made[kind]}")
            gguf.quantise(scratch or made[sources[0]], made[kind], kind)
    except BaseException:
        if scratch is not None:
            scratch.unlink(missing_ok=True)
        raise
    if scratch is not None and not keep_reference:
        scratch.unlink(missing_ok=True)
    return [made[kind] for kind in kinds], scratch


def vocabulary_of(weights: Weights, tokenizer: Tokenizer) -> Vocabulary:
    """Return a tokenizer for a GGUF file; its rule is proven when llama.cpp is there to ask.

    Args:
        weights: The model.
        tokenizer: Its tokenizer.
    """
    vocabulary = read_vocabulary(tokenizer, weights.config.get_text_config().vocab_size)
    if is_installed():
        return prove(vocabulary, tokenizer, sample_strings(tokenizer))
    return vocabulary


def check_files(
    live: Live,
    weights: Weights,
    files: Sequence[Path],
    kinds: Sequence[str],
    scratch: Path | None = None,
) -> list[Gate]:
    """Compare GGUF files with the live model; those in few bits with the 16-bit file.

    Args:
        live: The live model's side.
        weights: Its weights.
        files: The files.
        kinds: Their types.
        scratch: The 16-bit file when it is none of them.
    """
    tensors = dict(zip(kinds, compare_tensors(weights, files, kinds), strict=True))
    half = weights.config.model_type in HALF_PRECISION_ACTIVATIONS
    pairs = dict(zip(kinds, files, strict=True))
    reference = None
    if scratch is not None:
        with GGUFModel(scratch) as model:
            reference = model.logits(live.rows)
    gates: dict[str, Gate] = {}
    # Those in 16 bit first: the others are compared with them.
    for kind in sorted(pairs, key=lambda k: (k not in ("f16", "bf16", "f32"), k != "f16")):
        with GGUFModel(pairs[kind]) as model:
            gate, logits = check(live, model, pairs[kind].name, kind, reference, half)
        gate.findings.insert(0, tensors[kind])
        gates[kind] = gate
        if reference is None and kind in ("f16", "bf16", "f32"):
            reference = logits
    return [gates[kind] for kind in kinds]


def store(run: RunFolder, folder: Path, to: str, gates: Sequence[Gate], usage: str) -> None:
    """Write the model card, and what was compared as JSON; earlier files' results stay.

    Args:
        run: The run.
        folder: The export.
        to: Its kind.
        gates: What was compared.
        usage: How it is used, in Markdown.
    """
    path = folder / CHECK_FILE
    known: dict[str, Any] = {}
    if path.is_file():
        known = {entry["file"]: entry for entry in json.loads(path.read_text(encoding="utf-8"))}
    known.update({gate.file: gate.to_dict() for gate in gates})
    if gates:
        write_text(path, json.dumps(list(known.values()), indent=2, ensure_ascii=False) + "\n")
    write_text(folder / "README.md", model_card(run, to, gates, usage))


def usage_of(to: str, path: Path) -> str:
    """Return in Markdown how an export is used.

    Args:
        to: Its kind.
        path: The folder, or the first file.
    """
    name = path.name
    if to == "merged":
        return (
            f"```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```\n\n'
            f"With vLLM: `vllm serve {name}`"
        )
    if to == "adapter":
        return (
            "```python\nfrom peft import AutoPeftModelForCausalLM\n\n"
            f'model = AutoPeftModelForCausalLM.from_pretrained("{name}")\n```'
        )
    if to == "ollama":
        return "```\nollama create NAME -f Modelfile\nollama run NAME\n```"
    if to == "llama2c":
        return f"```\n./run {name} -z tokenizer.bin\n```"
    return f"With llama.cpp: `llama-cli -m {name}`; `llama-server -m {name}`"
