"""The held-out loss of what each framework trained, in float32, by one and the same code.

    python -m benchmarks.peers.evaluate HELDOUT.jsonl MODEL NF4 FOLDER...

Plain transformers + peft, one row at a time. Each line printed is a folder and its loss; the folder
`-` is the model as it was.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch


def load(model: str, nf4: bool, device: str) -> Any:
    """Load a model in float32, with its frozen weights in NF4 where they were so in training."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": torch.float32}
    if nf4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    if device == "cuda":
        options["device_map"] = {"": 0}
    loaded = AutoModelForCausalLM.from_pretrained(model, **options).eval()
    for module in loaded.modules():
        if hasattr(module, "compute_dtype"):  # a folder in NF4 brings its own
            module.compute_dtype = torch.float32
    return loaded


def loss_of(model: Any, rows: list[dict[str, list[int]]]) -> float:
    """Return the mean loss over all labelled tokens of the rows."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for row in rows:
            ids, labels = (
                torch.tensor(row[key], device=model.device) for key in ("input_ids", "labels")
            )
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum"))
            count += int((labels[1:] != -100).sum())
    return total / count


def main() -> None:
    """Evaluate all folders on one loaded model."""
    heldout, name, nf4, *folders = sys.argv[1:]
    rows = [json.loads(line) for line in Path(heldout).read_text().splitlines()]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = load(name, nf4 == "True", device)
    for folder in folders:
        if folder == "-":
            loss = loss_of(base, rows)
        elif (Path(folder) / "adapter_config.json").exists():
            from peft import PeftModel

            adapted = PeftModel.from_pretrained(base, folder).eval()
            loss = loss_of(adapted, rows)
            base = adapted.unload()
        else:
            loss = loss_of(load(folder, False, device), rows)
        print(json.dumps({"folder": folder, "loss": loss}), flush=True)


if __name__ == "__main__":
    main()
