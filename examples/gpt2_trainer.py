"""GPT-2 on a text or CSV file with transformers' own Trainer; whet's engine computes layers and loss.

    python examples/gpt2_trainer.py                                   # random weights, no network
    python examples/gpt2_trainer.py --model openai-community/gpt2 --data my.csv --column review

The script is what one would write without whet, and one line more: `attach(model)`. A tenth of the text
is kept back; its perplexity is printed before and after training, then the model goes on with a prompt.
The exit status is 1 if the perplexity did not fall.
"""

import argparse
import math
import sys
from pathlib import Path

import datasets
import torch
import transformers

from whet.engine.swap import attach

HERE = Path(__file__).resolve().parent


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="Hub id or folder with weights; else a small random GPT-2")
    parser.add_argument(
        "--data", nargs="+", default=sorted(map(str, HERE.parent.glob("docs/*.md")))
    )
    parser.add_argument("--column", default="text", help="column of a CSV file")
    parser.add_argument("--block", type=int, default=128, help="tokens of a training example")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--rate", type=float, help="learning rate: 2e-3 for random weights, else 5e-5"
    )
    parser.add_argument("--prompt", default="The engine")
    parser.add_argument("--out", default="runs/gpt2_trainer")
    return parser.parse_args()


def load(
    name: str | None,
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, or make a random one."""
    source = name or str(HERE / "models" / "gpt2-bytes")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    if name:
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    else:
        transformers.set_seed(0)
        settings = transformers.AutoConfig.from_pretrained(source)
        model = transformers.AutoModelForCausalLM.from_config(settings)
    return model, tokenizer


def read_blocks(
    files: list[str], column: str, tokenizer: transformers.PreTrainedTokenizerBase, size: int
) -> datasets.DatasetDict:
    """Read paragraphs or CSV rows, keep a tenth of them back, and lay them end to end in blocks."""
    if files[0].endswith(".csv"):
        rows = datasets.load_dataset("csv", data_files=files, split="train")
    else:
        rows = datasets.load_dataset("text", data_files=files, split="train", sample_by="paragraph")
        column = "text"
    rows = rows.filter(lambda row: bool((row[column] or "").strip()))

    def blocks(batch: dict) -> dict:
        ids = [
            i
            for text in batch[column]
            for i in [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        ]
        whole = range(0, len(ids) - size + 1, size)
        rows = [ids[start : start + size] for start in whole]
        return {"input_ids": rows, "labels": rows}  # the model shifts them

    parts = rows.train_test_split(test_size=0.1, seed=0)
    return parts.map(blocks, batched=True, remove_columns=rows.column_names)


def main() -> int:
    """Train, measure, generate."""
    arguments = read_arguments()
    model, tokenizer = load(arguments.model)
    print(attach(model).lines()[0])
    data = read_blocks(arguments.data, arguments.column, tokenizer, arguments.block)
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=arguments.out,
            max_steps=arguments.steps,
            per_device_train_batch_size=16,
            learning_rate=arguments.rate or (5e-5 if arguments.model else 2e-3),
            lr_scheduler_type="cosine",
            warmup_steps=min(20, arguments.steps // 10),
            weight_decay=0.1,
            logging_steps=max(1, arguments.steps // 10),
            save_strategy="no",
            prediction_loss_only=True,
            report_to=[],
            seed=0,
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        data_collator=transformers.default_data_collator,
    )
    before = math.exp(trainer.evaluate()["eval_loss"])
    trainer.train()
    after = math.exp(trainer.evaluate()["eval_loss"])
    trainer.save_model()
    tokenizer.save_pretrained(arguments.out)
    print(f"held-out perplexity: {before:.2f} before, {after:.2f} after")
    prompt = tokenizer(arguments.prompt, return_tensors="pt").to(model.device)
    transformers.set_seed(0)
    text = model.generate(
        **prompt, max_new_tokens=80, do_sample=True, temperature=0.8,
        pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    print(tokenizer.decode(text[0], skip_special_tokens=True))
    return 0 if after < before else 1


if __name__ == "__main__":
    sys.exit(main())
