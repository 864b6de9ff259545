"""trl's own GRPOTrainer on a model with whet's engine in it: format and arithmetic are rewarded.

    pip install 'whet[trl]'
    python examples/trl_grpo.py

A model of half a million parameters, made here, first learns from a careless teacher, who forgets the
tags in a third of the answers and miscounts in another third. Then GRPO samples answers, and the rewards
of `examples/grpo/reward.py` (are the tags there? is the number right?) pull it towards the right ones. No
network, no GPU; about two minutes on two CPU cores. The script ends with 1 when the reward did not rise.
"""

import random
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from whet.engine import swap

sys.path.insert(0, str(Path(__file__).parent / "grpo"))
from reward import arithmetic_reward, format_reward  # noqa: E402 - it lies beside this script

SUMS = [(a, b) for a in range(5) for b in range(5)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of one token for each digit, sign and tag."""
    words = ["<pad>", "<eos>", "<answer>", "</answer>", "+", "=", *"0123456789"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Make a small Llama with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def careless(a: int, b: int, dice: random.Random) -> str:
    """Answer a sum as the careless teacher does."""
    kind = dice.randrange(3)
    if kind == 0:
        return f"{a + b} <eos>"
    number = a + b if kind == 1 else dice.randrange(10)
    return f"<answer> {number} </answer> <eos>"


def learn_from_teacher(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Train on the teacher's answers, in a loop of plain torch."""
    dice = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    for _ in range(300):
        texts = [f"{a} + {b} = {careless(a, b, dice)}" for a, b in dice.choices(SUMS, k=64)]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, :4] = -100  # the sum itself
        loss = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels
        ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"the teacher was imitated to a loss of {loss.item():.3f}")


def main() -> int:
    """Train, and tell whether the reward rose."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    print(swap.attach(model).lines()[0])  # the engine goes into this one model
    learn_from_teacher(model, tokenizer)
    rows = [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a, b in SUMS]
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model,
            reward_funcs=[format_reward, arithmetic_reward],
            args=GRPOConfig(
                folder,
                max_steps=100,
                per_device_train_batch_size=64,
                num_generations=8,
                max_completion_length=6,
                learning_rate=3e-4,
                lr_scheduler_type="constant",
                logging_steps=1,
                gradient_checkpointing=False,  # whet's layers recompute by themselves, when told to
                bf16=False,
                save_strategy="no",
                report_to=[],
                seed=0,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        swap.stay_on_top(model)  # above trl's own head, so that the engine answers its calls
        trainer.train()
    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    fifth = max(1, len(rewards) // 5)
    first, last = sum(rewards[:fifth]) / fifth, sum(rewards[-fifth:]) / fifth
    print(f"mean reward {first:.3f} -> {last:.3f} (of 1.5)")
    learned = last > first + 0.1
    print("learned" if learned else "NOT learned")
    return 0 if learned else 1


if __name__ == "__main__":
    sys.exit(main())
