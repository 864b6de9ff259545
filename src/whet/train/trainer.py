"""whet's subclass of transformers.Trainer.

It changes four things and leaves the loop alone: the loss is summed over labelled tokens only and
divided by the labels of the whole optimizer step; rows of one step are sorted by length before they
are cut into passes, so that little padding enters the model; the order of an epoch depends on the
seed and the epoch alone, so that a resumed run sees the rows it would have seen; and a checkpoint is
written whole or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import OptimizerNames

from whet.config import Config
from whet.data.tokenize import Tokens, collate
from whet.errors import InputError, did_you_mean
from whet.model import CausalLM, Tokenizer
from whet.model.loss import summed_loss
from whet.runs import RunFolder, whole_folder


class TokenDataset(Dataset[Tokens]):
    """Tokenised rows, as the Trainer's loader wants them."""

    def __init__(self, rows: Sequence[Tokens]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tokens:
        return self.rows[index]


class StepSampler(Sampler[int]):
    """A seeded permutation for each epoch; inside one optimizer step, short rows come first.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows in one optimizer step.
        seed: Seed of the run.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation; accelerate calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        # Seeds of neighbouring runs and epochs must not meet: seed 1, epoch 1 is not seed 2, epoch 0.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        for start in range(0, len(order), self.batch_size):
            step = order[start : start + self.batch_size]
            yield from sorted(step, key=lambda row: self.lengths[row])


class WhetTrainer(Trainer):
    """transformers.Trainer with whet's loss, order of rows and checkpoints.

    Args:
        model: The model to train, frozen and adapted already.
        tokenizer: Its tokenizer, saved with each checkpoint.
        config: The run's config.
        run: The run's folder.
        train: Tokenised training rows.
        heldout: Tokenised held-out rows, for `eval.steps`.
        callbacks: The Trainer's callbacks.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        config: Config,
        run: RunFolder,
        train: Sequence[Tokens],
        heldout: Sequence[Tokens],
        callbacks: list[TrainerCallback],
    ) -> None:
        self.whet_config, self.run_folder = config, run
        self.tokens_seen = 0
        super().__init__(
            model=model,
            args=training_arguments(config, run, checkpoints=_needs_checkpointing(model, config)),
            train_dataset=TokenDataset(train),
            eval_dataset=TokenDataset(heldout) if heldout else None,
            processing_class=tokenizer,
            data_collator=partial(collate, pad_token_id=tokenizer.pad_token_id or 0),
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)  # the front end shows the progress
        # compute_loss below shifts the labels itself, and divides by those of the whole step.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        del train_dataset
        assert isinstance(self.train_dataset, TokenDataset)
        train = self.whet_config.train
        lengths = [len(tokens.input_ids) for tokens in self.train_dataset.rows]
        return StepSampler(lengths, train.batch_size, train.seed)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return this pass's part of the step's mean loss over labelled tokens."""
        loss, num_labels = summed_loss(model, inputs)
        if model.training:
            self.tokens_seen += int(inputs["attention_mask"].sum())
        loss = loss / (max(1, num_labels) if num_items_in_batch is None else num_items_in_batch)
        # Each process divides by the labels of all, and DDP takes the mean over processes.
        loss = loss * (1 if num_items_in_batch is None else self.accelerator.num_processes)
        return (loss, {"loss": loss}) if return_outputs else loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure the held-out loss, weighted by tokens, and log it."""
        from whet.evaluate import mean_loss

        assert isinstance(self.eval_dataset, TokenDataset) and self.model is not None
        rows = self.eval_dataset.rows[: self.whet_config.eval.max_rows]
        self.model.eval()
        loss, _count = mean_loss(self.model, rows, self.whet_config.eval.batch_size)
        metrics = {"eval_loss": loss}
        self.log(metrics)
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write checkpoints/step-N whole, and drop the oldest beyond `keep_checkpoints`."""
        import shutil

        del model, trial
        step = self.state.global_step
        with whole_folder(self.run_folder.checkpoints_dir / f"step-{step}") as folder:
            self.save_model(str(folder), _internal_call=True)
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            torch.save({"tokens_seen": self.tokens_seen}, folder / "whet_state.pt")
            self.state.save_to_json(str(folder / "trainer_state.json"))
        for old in self.run_folder.checkpoints()[: -self.whet_config.train.keep_checkpoints]:
            shutil.rmtree(old)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        state = torch.load(Path(resume_from_checkpoint) / "whet_state.pt", weights_only=True)
        self.tokens_seen = state["tokens_seen"]


def _checkpointing(on: bool) -> dict[str, Any]:
    """Turn gradient checkpointing on under the name that this transformers has for it."""
    new = "activation_checkpointing"
    return {new if new in TrainingArguments.__dataclass_fields__ else "gradient_checkpointing": on}


def check_optimizer(name: str) -> None:
    """Check an optimizer's name against transformers' list.

    Raises:
        InputError: It is not there.
    """
    known = [str(optimizer.value) for optimizer in OptimizerNames]
    if name not in known:
        guess = did_you_mean(name, known)
        raise InputError(
            f"train.optimizer '{name}' is not one that transformers knows",
            fix=f"did you mean '{guess}'?" if guess else f"use one of {', '.join(known)}",
        )


def _needs_checkpointing(model: CausalLM, config: Config) -> bool:
    """Tell whether transformers must recompute layers; fused ones recompute by themselves, and less."""
    from whet.engine.swap import report_of

    report = report_of(model)
    fused = report is not None and report.layers_fused == report.layers_total
    return config.train.gradient_checkpointing and not fused


def training_arguments(config: Config, run: RunFolder, checkpoints: bool) -> TrainingArguments:
    """Translate the config into transformers' arguments.

    Args:
        config: The run's config.
        run: The run's folder.
        checkpoints: Turn on transformers' gradient checkpointing.
    """
    from whet.model.load import choose_dtype, device

    train = config.train
    on_cuda = device().type == "cuda"
    dtype, _ = choose_dtype(config.model.dtype, train.parameters != "lora")
    bf16 = dtype is torch.float32 and train.parameters != "lora" and config.model.dtype is None
    arguments = TrainingArguments(
        output_dir=str(run.checkpoints_dir),
        per_device_train_batch_size=config.examples_per_pass,
        gradient_accumulation_steps=train.batch_size // config.examples_per_pass,
        num_train_epochs=train.epochs,
        max_steps=train.max_steps or -1,
        learning_rate=train.learning_rate,
        lr_scheduler_type="constant_with_warmup"
        if train.schedule == "constant"
        else train.schedule,
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim=train.optimizer,
        **_checkpointing(checkpoints),
        seed=train.seed,
        # Float32 weights that are trained themselves are multiplied in bfloat16 where a GPU has it.
        bf16=bf16 and on_cuda and torch.cuda.is_bf16_supported(including_emulation=False),
        # Float16 gradients underflow without loss scaling, which comes with the mixed precision.
        fp16=dtype is torch.float16 and on_cuda,
        use_cpu=not on_cuda,
        dataloader_pin_memory=on_cuda,
        logging_steps=train.log_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=train.checkpoint_steps or 10**9,
        eval_strategy="steps" if config.eval.steps else "no",
        eval_steps=config.eval.steps,
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        report_to=[],
    )
    # One process drives one GPU. Left alone, transformers puts DataParallel over all it sees.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments
