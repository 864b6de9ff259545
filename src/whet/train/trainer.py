"""whet's subclass of transformers.Trainer.

It changes four things and leaves the loop alone: a batch of its loader is one whole optimizer step,
which is cut into packed passes here, and the loss is summed over labelled tokens only and divided by
the labels of the whole step; memory that runs out in a pass makes the passes smaller and the step is
run again; the order of an epoch depends on the seed and the epoch alone, so that a resumed run sees
the rows it would have seen; and a checkpoint is written whole or not at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.training_args import OptimizerNames

from whet.config import Config
from whet.data.packing import Packing, StepSampler
from whet.data.store import lengths_of
from whet.data.tokenize import Tokens
from whet.engine.graphs import GraphedPasses
from whet.engine.passes import PackedPass
from whet.engine.swap import fuses_head, report_of, takes_packed
from whet.model import CausalLM, Tokenizer
from whet.model.loss import summed_loss
from whet.runs import RunFolder
from whet.train.arguments import training_arguments
from whet.train.callbacks import HeldOutWatch
from whet.train.checkpoints import load_optimizer, restore_checkpoint, write_checkpoint
from whet.train.meter import Meter
from whet.train.optimizer_kinds import kind_of
from whet.train.optimizers import make_optimizer, turn_optimizer
from whet.train.survive import (
    RandomState,
    check_one_pass,
    does_not_fit,
    free_memory,
    is_out_of_memory,
    step_again_when_out_of_memory_,
)

Measured = TypeVar("Measured")


@dataclass(frozen=True, slots=True)
class StepSettings:
    """How a trainer makes a step.

    Args:
        packing: How a step becomes passes, as planned.
        flops: Returns the operations of a pass over examples of given lengths with so many labels: the
            model's, and with what is computed again.
        ease: Makes the model keep less between forward and backward; returns how, or None when it
            keeps the least already.
        tell: Called with what happened, for metrics.jsonl, and a sentence for people.
        checkpoints: Recompute layers that keep their own code, as transformers does.
        graphs: Records packed passes and replays them; None runs each as ever.
    """

    packing: Packing
    flops: Callable[[Sequence[int], int], tuple[float, float]] = lambda lengths, labels: (0.0, 0.0)
    ease: Callable[[], str | None] = lambda: None
    tell: Callable[[dict[str, Any], str], None] = lambda event, text: None
    checkpoints: bool = False
    graphs: GraphedPasses | None = None


class WhetTrainer(Trainer):
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
        self.at = (0, "forward")  # the pass of the step that is being computed, and its phase
        self.watch = HeldOutWatch(config.eval.patience, config.eval.keep_best)
        seed = config.train.seed if config.train.shuffle else None
        options = config.train
        lengths: Any = lengths_of(train)
        self.sampler = StepSampler(lengths, options.batch_size, seed, options.batch_tokens)
        super().__init__(
            model=model,
            args=training_arguments(
                config, run, checkpoints=settings.checkpoints and _has_own_code(model)
            ),
            train_dataset=train,  # type: ignore[arg-type]
            eval_dataset=heldout or None,  # type: ignore[arg-type]
            processing_class=tokenizer,
            data_collator=list,  # type: ignore[arg-type]
            callbacks=[*callbacks, self.watch],
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
        return self.accelerator.prepare(loader)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Make the optimizer, which steps again when memory runs out before it changed anything."""
        fresh = self.optimizer is None
        if fresh:
            assert self.model is not None
            names = self.get_decay_parameter_names(self.model)
            train = self.whet_config.train
            self.optimizer = make_optimizer(self.model, self.args, train, names)
        optimizer = super().create_optimizer(*args, **kwargs)
        if fresh:
            step_again_when_out_of_memory_(optimizer, self._tell_of_the_optimizer)
        return optimizer

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Fetch the rows of a step, timed."""
        with self.meter.phase("data"):
            return super().get_batch_samples(*args, **kwargs)

    def training_step(
        self, model: Any, inputs: Any, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run the passes of one optimizer step, smaller ones when memory runs out.

        Args:
            model: The model, or a parallel wrapper of it.
            inputs: The rows of the step.
            num_items_in_batch: Not used; the labels of all rows are counted here.

        Returns:
            The step's mean loss over labelled tokens.

        Raises:
            WhetError: One example alone does not fit.
        """
        del num_items_in_batch
        model.train()
        turn_optimizer(self.optimizer, "train")
        rows: list[Tokens] = list(inputs)
        num_items = self._count_items(rows)
        state = RandomState.take()
        while True:
            passes = self.packing.passes(rows)
            if self._steps_in_backward:
                check_one_pass(len(passes))
            try:
                loss = self._run_passes(model, passes, num_items)
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).strip().split("\n")[0]
            if self._steps_in_backward:
                check_one_pass(len(passes), reason)
            # Outside of the handler, whose traceback holds the tensors of the failed pass.
            model.zero_grad()
            self._forget_graphs()
            free_memory()
            self._make_room(passes, reason)
            state.restore()
        for group in passes:
            self._count(group)
        self.tokens_seen += sum(len(tokens.input_ids) for tokens in rows)
        return loss

    def try_passes(self, rows: list[Tokens], measure: Callable[..., Measured]) -> Measured | None:
        """Run one pass of given rows for somebody who measures it; smaller when memory runs out.

        Args:
            rows: The rows of the pass.
            measure: Called with rows and a function that runs a pass of them.

        Returns:
            What was measured; None when the pass had to be made smaller.

        Raises:
            WhetError: One example alone does not fit.
        """

        def run_pass(group: Sequence[Tokens]) -> None:
            batch = self._make_batch(group, rounded=False)
            self._run_pass(self.model, batch, torch.ones((), device=self.args.device), 0)

        try:
            return measure(rows, run_pass)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).strip().split("\n")[0]
        self.model.zero_grad()  # type: ignore[union-attr]
        free_memory()
        self._make_room([rows], reason)
        return None

    @property
    def _steps_in_backward(self) -> bool:
        return kind_of(self.whet_config.train.optimizer).in_backward

    @property
    def _pad(self) -> int:
        return self.processing_class.pad_token_id or 0  # type: ignore[union-attr]

    def _count_items(self, rows: Sequence[Tokens]) -> torch.Tensor:
        """Count the labels of the step over all processes; 1 when there is none."""
        num = torch.tensor(sum(tokens.num_labels for tokens in rows), device=self.args.device)
        if self.accelerator.num_processes > 1:
            num = self.accelerator.gather(num).sum()  # type: ignore[union-attr]
        return num.clamp(min=1)

    def _run_passes(
        self, model: Any, passes: list[list[Tokens]], num_items: torch.Tensor
    ) -> torch.Tensor:
        total = torch.zeros((), device=self.args.device)
        graphs = None if self._steps_in_backward else self.settings.graphs
        graphed = graphs is not None and graphs.begin_step()
        for number, group in enumerate(passes):
            with self.meter.phase("data"):
                batch = self._make_batch(group, rounded=graphed)
            # Gradients of all processes meet in the last pass only.
            last = number == len(passes) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                total += self._run_pass(model, batch, num_items, number, graphed)
        return total

    def _make_batch(self, group: Sequence[Tokens], rounded: bool) -> Any:
        if not self.packing.padded and takes_packed(self.model) and fuses_head(self.model):
            return self.packing.packed_pass(group, self._pad, rounded).to(self.args.device)
        return self._prepare_inputs(self.packing.batch(group, self._pad))

    def _learn(self, model: Any, batch: PackedPass, num_items: torch.Tensor) -> torch.Tensor:
        """Do what `_run_pass` does, with nothing between that cannot be recorded."""
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, batch, num_items_in_batch=num_items)
        self.accelerator.backward(loss)
        return loss.detach()

    def _forget_graphs(self) -> None:
        if self.settings.graphs is not None:
            self.settings.graphs.clear()

    def _run_pass(
        self, model: Any, batch: Any, num_items: torch.Tensor, number: int, graphed: bool = False
    ) -> torch.Tensor:
        """Run one pass forward and backward; return its part of the loss."""
        self.at = (number, "forward")
        if graphed and self.settings.graphs is not None:
            with self.meter.phase("backward"):  # forward too, but this is the most of it
                loss = self.settings.graphs.run(batch, num_items, partial(self._learn, model))
            if loss is not None:
                return loss
        with self.meter.phase("forward"), self.compute_loss_context_manager():
            loss = self.compute_loss(model, batch, num_items_in_batch=num_items)
        self.at = (number, "backward")
        options: dict[str, Any] = {}
        if self.args.optim in (OptimizerNames.LOMO, OptimizerNames.ADALOMO):
            options["learning_rate"] = self._get_learning_rate()
        with self.meter.phase("backward"):
            self.accelerator.backward(loss, **options)
        return loss.detach()

    def _count(self, group: Sequence[Tokens]) -> None:
        lengths = [len(tokens.input_ids) for tokens in group]
        labels = sum(tokens.num_labels for tokens in group)
        model_flops, hardware_flops = self.settings.flops(lengths, labels)
        self.meter.add(
            tokens=sum(lengths),
            entered_tokens=self.packing.num_entered(group),
            labelled_tokens=labels,
            model_flops=model_flops,
            hardware_flops=hardware_flops,
            passes=1,
        )

    def _make_room(self, passes: list[list[Tokens]], reason: str) -> None:
        """Make the passes smaller, or else the model keep less, and tell it.

        Raises:
            WhetError: The pass that failed is one example, and the model keeps the least already.
        """
        number, phase = self.at
        failed = passes[number]
        largest = max(self.packing.num_entered(group) for group in passes)
        step = self.state.global_step + 1
        event: dict[str, Any] = {
            "step": step, "event": "out_of_memory", "phase": phase, "pass": number + 1,
            "passes": len(passes), "tokens": self.packing.num_entered(failed), "reason": reason,
        }  # fmt: skip
        text = f"memory ran out in step {step}, pass {number + 1} of {len(passes)}, {phase}: "
        if len(failed) > 1:
            self.packing = replace(self.packing, tokens_per_pass=max(1, largest // 2))
            event["tokens_per_pass"] = self.packing.tokens_per_pass
            text += f"the step runs again in passes of {self.packing.tokens_per_pass:,} tokens"
        elif eased := self.settings.ease():
            self.times_eased += 1
            event["policy"] = eased
            text += f"the step runs again with saved tensors {eased}"
        else:
            raise does_not_fit(failed[0], reason)
        self.settings.tell(event, text)

    def _tell_of_the_optimizer(self, text: str) -> None:
        self._forget_graphs()
        step = self.state.global_step + 1
        self.settings.tell({"step": step, "event": "out_of_memory", "phase": "optimizer"}, text)

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return this pass's part of the step's mean loss over labelled tokens."""
        loss, num_labels = summed_loss(model, inputs)
        loss = loss / (max(1, num_labels) if num_items_in_batch is None else num_items_in_batch)
        # Each process divides by the labels of all, and DDP takes the mean over processes.
        loss = loss * (1 if num_items_in_batch is None else self.accelerator.num_processes)
        return (loss, {"loss": loss}) if return_outputs else loss

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
        """Measure the held-out rows with the weights of use, and let the callbacks know."""
        turn_optimizer(self.optimizer, "eval")
        metrics = self.evaluate()
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

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        restore_checkpoint(self, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        load_optimizer(self, checkpoint, super()._load_optimizer_and_scheduler)


def _has_own_code(model: CausalLM) -> bool:
    """Tell whether any layer is transformers' own; fused ones recompute by themselves, and less."""
    report = report_of(model)
    return report is None or report.layers_fused < report.layers_total
