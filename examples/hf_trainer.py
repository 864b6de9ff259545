"""transformers.Trainer as it is, given a whet model: own loss, early stop, resume, predictions.

    python examples/hf_trainer.py              # SmolLM2-135M, or any model behind --model

Nothing here is a subclass of whet's. The model comes with the engine inside, and Trainer does what it
does with any model. The script overrides `compute_loss` (an answer's first token counts double), stops
after a few steps by a callback, goes on from the checkpoint written there, and asks `predict` for
logits. It ends with 1 when the held-out loss did not fall.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import transformers

from whet import FastLanguageModel

HERE = Path(__file__).resolve().parent


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", default=str(HERE / "quickstart" / "train.jsonl"))
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--out", default="runs/hf_trainer")
    return parser.parse_args()


def tokenised(file: str, most: int, tokenizer: transformers.PreTrainedTokenizerBase) -> list[dict]:
    """Tokenise conversations; only the last answer is learned."""
    rows = []
    for line in Path(file).read_text(encoding="utf-8").splitlines()[:most]:
        turns = json.loads(line)["messages"]
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        asked = tokenizer.apply_chat_template(
            turns[:-1], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(whole, add_special_tokens=False).input_ids
        start = len(tokenizer(asked, add_special_tokens=False).input_ids)
        rows.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return rows


class FirstTokenTwice(transformers.Trainer):
    """Trainer with a loss of its own: the first learned token of each row has weight 2."""

    loss_is_scaled_for_ga = (
        False  # a mean over the batch, which Trainer divides by the batches of a step
    )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # noqa: ANN001, ANN201, D102
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        target = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        each = torch.nn.functional.cross_entropy(
            outputs.logits.float().transpose(1, 2), target, ignore_index=-100, reduction="none"
        )
        learned = (target != -100).float()
        weight = learned * (1 + (learned.cumsum(1) == 1))
        loss = (each * weight).sum() / weight.sum()
        return (loss, outputs) if return_outputs else loss


class StopAfter(transformers.TrainerCallback):
    """Ends training, with a checkpoint, after some steps."""

    def __init__(self, steps: int) -> None:
        """Take the number of steps."""
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):  # noqa: ANN001, ANN003, ANN201, D102
        if state.global_step >= self.steps:
            control.should_save = control.should_training_stop = True
        return control


def main() -> int:
    """Train in two goes, and measure before and after."""
    options = read_arguments()
    model, tokenizer = FastLanguageModel.from_pretrained(options.model, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16)
    rows = tokenised(options.data, options.rows, tokenizer)
    held_out = rows[: max(4, len(rows) // 10)]

    def trainer(*callbacks: transformers.TrainerCallback) -> transformers.Trainer:
        return FirstTokenTwice(
            model=model,
            args=transformers.TrainingArguments(
                output_dir=options.out,
                max_steps=options.steps,
                per_device_train_batch_size=4,
                learning_rate=1e-3,
                logging_steps=2,
                save_strategy="no",
                report_to=[],
                seed=0,
            ),
            train_dataset=rows[len(held_out) :],
            eval_dataset=held_out,
            data_collator=transformers.DataCollatorForSeq2Seq(tokenizer),
            callbacks=list(callbacks),
        )

    first = trainer(StopAfter(options.steps // 2))
    before = first.evaluate()["eval_loss"]
    first.train()
    print(f"stopped after step {first.state.global_step}; going on from its checkpoint")
    second = trainer()
    second.train(resume_from_checkpoint=f"{options.out}/checkpoint-{first.state.global_step}")
    found = second.predict(held_out)
    after = found.metrics["test_loss"]
    print(
        f"logits of shape {found.predictions.shape}; held-out loss {before:.3f}, then {after:.3f}"
    )
    return 0 if second.state.global_step == options.steps and after < before else 1


if __name__ == "__main__":
    sys.exit(main())
