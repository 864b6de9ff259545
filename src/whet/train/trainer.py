"""whet's subclass of transformers.Trainer.

It changes four things and leaves the loop alone: a batch of its loader is one whole optimizer step, which
is computed in packed passes (steps.py); memory that runs out in a pass makes the passes smaller and the
step is run again; the order of an epoch depends on the seed and the epoch alone, so that a resumed run
sees the rows it would have seen; and a checkpoint is written whole or not at all, and is the same folder
however many processes wrote it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback

from whet.config import Config
from whet.data.packing import StepSampler
from whet.data.store import lengths_of
from whet.data.tokenize import Tokens
from whet.engine.swap import report_of
from whet.model import CausalLM, Tokenizer
from whet.runs import RunFolder
from whet.train.arguments import training_arguments
from whet.train.callbacks import HeldOutWatch, SaveEvery, StopAtSignal
from whet.train.checkpoints import (
    load_optimizer,
    restore_checkpoint,
    write_checkpoint,
)
from whet.train.meter import Meter
from whet.train.optimizers import (
    let_embeddings_learn_at_,
    make_for_tensor_parallel,
    make_optimizer,
    turn_optimizer,
)
from whet.train.randoms import load_random_state
from whet.train.shards import clip_gradients_
from whet.train.steps import StepSettings, StepTrainer
from whet.train.strategy import strategy_arguments
from whet.train.survive import (
    step_again_when_out_of_memory_,
)


class WhetTrainer(StepTrainer):
    """transformers.Trainer with whet's steps, loss, order of rows and checkpoints.

    Args:
        model: The model to train, frozen and adapted already.
        tokenizer: Its tokenizer, saved with each checkpoint.
        config: The run's config.
        run: The run's folder.
        train: Tokenised training rows.
        heldout: Tokenised held-out rows, for `eval.steps`.
        callbacks: The Trainer's callbacks.
        settings: How it makes a step.
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
        settings: StepSettings,
    ) -> None:
        self.whet_config, self.run_folder, self.settings = config, run, settings
        self.packing = settings.packing  # smaller after memory ran out
        self.tokens_seen = 0
        self.times_eased = 0
        self.parameter_groups: list[list[torch.Tensor]] = []
        self.at = (0, "forward")  # the pass of the step that is being computed, and its phase
        self.watch = HeldOutWatch(config.eval.patience, config.eval.keep_best)
        seed = config.train.seed if config.train.shuffle else None
        options = config.train
        lengths: Any = lengths_of(train)
        self.world = world = settings.world
        self.shards = settings.shards
        self.stop: StopAtSignal | None = None
        is_cut = settings.shards is not None and settings.shards.kind == "tp"
        shares = world.shares if self._draws_its_share else 1
        self.sampler = StepSampler(
            lengths, options.batch_size, seed, options.batch_tokens, shares, world.share % shares
        )
        super().__init__(
            model=model,
            args=training_arguments(
                config,
                run,
                settings.checkpoints and _has_own_code(model),
                strategy_arguments(config, world, settings.shards),
            ),
            train_dataset=train,  # type: ignore[arg-type]
            eval_dataset=heldout or None,  # type: ignore[arg-type]
            processing_class=tokenizer,
            data_collator=list,  # type: ignore[arg-type]
            callbacks=[*callbacks, self.watch, *([SaveEvery()] if is_cut else [])],
        )
        self.meter = Meter(self.args.device)
        self.remove_callback(PrinterCallback)  # the front end shows the progress
        # compute_loss below shifts the labels itself, and divides by those of the whole step.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return a loader whose batches are the rows of whole optimizer steps."""
        rows: Any = self.train_dataset
        loader = DataLoader(rows, batch_sampler=self.sampler, collate_fn=list)
        # The sampler has cut the step already: accelerate must not deal whole steps to processes.
        return prepare_data_loader(loader, num_processes=1, process_index=0, put_on_device=False)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Leave out of accelerate's arguments what it refuses on a CPU, and what whet has done itself."""
        found = super()._build_accelerator_args(**kwargs)
        found.pop("parallelism_config", None)
        return found

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Make the optimizer, which steps again when memory runs out before it changed anything."""
        fresh = self.optimizer is None
        if fresh:
            assert self.model is not None
            names = self.get_decay_parameter_names(self.model)
            train = self.whet_config.train
            if self.shards is not None and self.shards.kind == "tp":
                self.optimizer = make_for_tensor_parallel(self.model, self.args, names)
            else:
                self.optimizer = make_optimizer(self.model, self.args, train, names)
        optimizer = super().create_optimizer(*args, **kwargs)
        if fresh:
            rate = self.whet_config.train.embedding_learning_rate
            if rate is not None:
                assert self.model is not None
                let_embeddings_learn_at_(optimizer, self.model, rate)
            # DeepSpeed puts flat pieces in their place.
            self.parameter_groups = [list(group["params"]) for group in optimizer.param_groups]
            step_again_when_out_of_memory_(optimizer, self._tell_of_the_optimizer)
        return optimizer

    def _clip_grad_norm(self, model: Any) -> Any:
        if self.shards is not None and self.shards.kind == "tp":
            return clip_gradients_(model.parameters(), self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Fetch the rows of a step, timed."""
        with self.meter.phase("data"):
            return super().get_batch_samples(*args, **kwargs)

    def _tell_of_the_optimizer(self, text: str) -> None:
        self._forget_graphs()
        step = self.state.global_step + 1
        self.settings.tell({"step": step, "event": "out_of_memory", "phase": "optimizer"}, text)

    def floating_point_ops(self, inputs: Any) -> int:
        """Return nothing: the meter counts, and better than transformers' 6 N."""
        return 0

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure the held-out loss, weighted by tokens, and log it."""
        from whet.evaluate import mean_loss

        rows: Any = self.eval_dataset
        rows = rows[: self.whet_config.eval.max_rows]
        assert self.model is not None
        self.model.eval()
        loss, _count = mean_loss(self.model, rows, self.whet_config.eval.batch_size)
        metrics = {"eval_loss": loss}
        self.log(metrics)
        return metrics

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the held-out rows with the weights of use, and let the callbacks know.

        Rank 0 measures, unless the processes can compute a layer only together.
        """
        turn_optimizer(self.optimizer, "eval")
        together = self.shards is not None or self.world.size == 1
        metrics = self.evaluate() if together or self.world.is_first else {}
        if not together:
            metrics = self.world.agree(metrics)
        handler = self.callback_handler
        self.control = handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch, unless the run that is resumed had stopped for good."""
        if self.watch.stopped:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write checkpoints/step-N whole, and drop the oldest beyond `keep_checkpoints`."""
        del model, trial
        write_checkpoint(self)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        """Wrap the model and make the optimizer; load what a checkpoint holds of a spread model."""
        if self.shards is None:
            return super()._prepare_for_training(
                max_steps, train_dataloader, resume_from_checkpoint
            )
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:  # its weights were loaded before they were spread
            restore_checkpoint(self, Path(resume_from_checkpoint))
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._load_scaler(resume_from_checkpoint)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.shards is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            restore_checkpoint(self, Path(resume_from_checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self.world.size == 1 or checkpoint is None:
            super()._load_rng_state(checkpoint)
        else:
            load_random_state(self, Path(checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        load_optimizer(self, checkpoint, super()._load_optimizer_and_scheduler)


def _has_own_code(model: CausalLM) -> bool:
    """Tell whether any layer is transformers' own; fused ones recompute by themselves, and less."""
    report = report_of(model)
    return report is None or report.layers_fused < report.layers_total
