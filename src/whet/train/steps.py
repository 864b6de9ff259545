"""How a step is computed: its passes, one after another, in each of the processes that share it.

A batch of the loader is one whole optimizer step, or this process's part of it. It is cut into packed
passes here, and the loss is summed over labelled tokens only and divided by the labels of the whole step,
over all processes; memory that runs out in a pass makes the passes smaller, and the step is run again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from transformers import Trainer
from transformers.training_args import OptimizerNames

from whet.config import Config
from whet.data.packing import Packing, StepSampler
from whet.data.tokenize import Tokens
from whet.engine.graphs import GraphedPasses
from whet.engine.passes import PackedPass
from whet.engine.swap import fuses_head, takes_packed
from whet.model.loss import summed_loss
from whet.train.callbacks import StopAtSignal
from whet.train.meter import Meter
from whet.train.noise import noisy_embeddings
from whet.train.optimizer_kinds import kind_of
from whet.train.optimizers import turn_optimizer
from whet.train.shards import Shards
from whet.train.survive import (
    FITS,
    MemoryRanOutElsewhere,
    RandomState,
    cannot_step_again,
    check_one_pass,
    free_memory,
    is_out_of_memory,
    make_room,
    wish_for,
)
from whet.train.world import World

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
        world: The processes of the run.
        shards: How the model is spread over them; None: each has all of it.
    """

    packing: Packing
    flops: Callable[[Sequence[int], int], tuple[float, float]] = lambda lengths, labels: (0.0, 0.0)
    ease: Callable[[], str | None] = lambda: None
    tell: Callable[[dict[str, Any], str], None] = lambda event, text: None
    checkpoints: bool = False
    graphs: GraphedPasses | None = None
    world: World = World()
    shards: Shards | None = None


class StepTrainer(Trainer):
    """transformers.Trainer whose step is whet's; WhetTrainer sets what it needs, and does the rest.

    It is a class because transformers calls `training_step` and `compute_loss` on its Trainer.
    """

    whet_config: Config
    settings: StepSettings
    packing: Packing
    sampler: StepSampler
    world: World
    shards: Shards | None
    stop: StopAtSignal | None
    meter: Meter
    tokens_seen: int
    times_eased: int
    at: tuple[int, str]  # the pass of the step that is being computed, and its phase

    def training_step(
        self, model: Any, inputs: Any, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run the passes of one optimizer step, smaller ones when memory runs out.

        Args:
            model: The model, or a parallel wrapper of it.
            inputs: The rows of the step that are this process's.
            num_items_in_batch: Not used; the labels of all rows are counted here.

        Returns:
            The step's mean loss over labelled tokens; the mean over processes is that of the whole step.

        Raises:
            WhetError: One example alone does not fit.
        """
        del num_items_in_batch
        model.train()
        optimizer: Any = self.optimizer
        turn_optimizer(optimizer, "train")
        rows = self._own_part(list(inputs))
        num_items = self._count_items(rows)
        state = RandomState.take()
        while True:
            passes = self._cut(rows)
            if self._steps_in_backward:
                check_one_pass(len(passes))
            wishes: list[int] = []
            try:
                loss = self._run_passes(model, passes, num_items)
                break
            except MemoryRanOutElsewhere as elsewhere:
                wishes, reason = elsewhere.wishes, "another process's memory ran out"
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
            wishes = wishes or self._tell_the_others(model, passes, reason)
            make_room(self, passes, reason, wishes)
            state.restore()
        for group in filter(None, passes):
            self._count(group)
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
            with self._noise_on(group):
                self._run_pass(self.model, batch, torch.ones((), device=self.args.device), 0)

        try:
            return measure(rows, run_pass)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).strip().split("\n")[0]
        self.model.zero_grad()  # type: ignore[union-attr]
        free_memory()
        make_room(self, [rows], reason, [wish_for(self, [rows])])
        return None

    @property
    def _steps_in_backward(self) -> bool:
        return kind_of(self.whet_config.train.optimizer).in_backward

    @property
    def _pad(self) -> int:
        return self.processing_class.pad_token_id or 0  # type: ignore[union-attr]

    @property
    def _draws_its_share(self) -> bool:
        """Whether the sampler gives each process its part of a step, and not all of it."""
        return True

    def _own_part(self, rows: list[Tokens]) -> list[Tokens]:
        """Return the rows of a step that this process computes."""
        return rows

    def _count_items(self, rows: Sequence[Tokens]) -> torch.Tensor:
        """Count the labels of the step over all processes; 1 when there is none."""
        (labels,) = self._begin_step(rows, sum(tokens.num_labels for tokens in rows))
        return torch.tensor(max(1, labels), device=self.args.device)

    def _begin_step(self, rows: Sequence[Tokens], *counts: int) -> list[int]:
        """Count what a step is over all processes, and hear whether any of them should stop.

        Args:
            rows: Those of this process.
            counts: Of this process.

        Returns:
            The sums of the counts.
        """
        entered = sum(len(tokens.input_ids) for tokens in rows)
        asked = self.stop is not None and self.stop.asked
        sums = [entered, int(asked), *counts]
        if self.world.size > 1:
            found: Any = self.accelerator.gather(torch.tensor([sums], device=self.args.device))
            # Processes that compute one replica together have the same rows.
            sums = found[:: self.world.tensor].sum(0).tolist()
            if self.stop is not None:
                self.stop.agreed = bool(sums[1])
        self.tokens_seen += sums[0]
        return sums[2:]

    def _cut(self, rows: Sequence[Tokens]) -> list[list[Tokens]]:
        """Cut this process's rows into passes; an empty one takes part and counts nothing.

        In the last pass the gradients of all processes meet, so that everyone has one. The smallest is
        last: memory that will run out has done so by then. Where a model is spread over processes they
        compute each layer together, and whoever has fewer passes joins in with empty ones.
        """
        passes = self.packing.passes(rows) if rows else []
        if self.world.shares == 1:
            return passes
        passes.sort(key=self.packing.num_entered, reverse=True)
        num = len(passes) or 1
        if self.shards is not None:
            numbers = self.accelerator.gather(torch.tensor([num], device=self.args.device))
            num = int(numbers.max())  # type: ignore[union-attr]
        return passes + [[]] * (num - len(passes))

    def _run_passes(
        self, model: Any, passes: list[list[Tokens]], num_items: torch.Tensor
    ) -> torch.Tensor:
        total = torch.zeros((), device=self.args.device)
        graphs = None if self._steps_in_backward else self.settings.graphs
        graphed = graphs is not None and graphs.begin_step()
        for number, group in enumerate(passes):
            if not group:
                self._run_empty_pass(model, num_items, number, number == len(passes) - 1)
                continue
            with self.meter.phase("data"):
                batch = self._make_batch(group, rounded=graphed)
            # Gradients of all processes meet in the last pass only.
            last = number == len(passes) - 1
            with self._gradients_meet(model, last), self._noise_on(group):
                total += self._run_pass(model, batch, num_items, number, graphed, last)
        return total

    def _run_empty_pass(
        self, model: Any, num_items: torch.Tensor, number: int, last: bool, agreed: bool = False
    ) -> None:
        """Run a pass that counts nothing: its loss, and so its gradients, are multiplied by zero."""
        rows: Any = self.train_dataset
        shortest = rows[int(self.sampler.lengths.argmin())]
        batch = self._make_batch([shortest], rounded=False)
        with self._gradients_meet(model, last):
            asks = last and not agreed
            self._run_pass(model, batch, num_items, number, last=asks, weight=0.0)

    def _gradients_meet(self, model: Any, last: bool) -> contextlib.AbstractContextManager[Any]:
        if self.shards is not None:
            return self.shards.gradients_meet(self, model, last)
        return contextlib.nullcontext() if last else self.accelerator.no_sync(model)

    def _noise_on(self, rows: Sequence[Tokens]) -> contextlib.AbstractContextManager[None]:
        """Return the context in which the rows of a pass are embedded, with noise if that is wanted."""
        train = self.whet_config.train
        if train.neftune_alpha is None:
            return contextlib.nullcontext()
        model: Any = self.model
        step = self.state.global_step
        return noisy_embeddings(model, rows, train.neftune_alpha, train.seed, step)

    def _tell_the_others(self, model: Any, passes: list[list[Tokens]], reason: str) -> list[int]:
        """Say that memory ran out here, and return what every process wants done about it."""
        wish = wish_for(self, passes)
        if self.world.size == 1:
            return [wish]
        if self.shards is not None or self.at[1] == "gradients meet":
            raise cannot_step_again(self.world.rank, reason)
        wishes = self._gather_wishes(wish)
        # The others are in a pass after which DDP reduces, and have to get out of it: what is reduced
        # is thrown away.
        at = self.at
        self._run_empty_pass(model, torch.ones(()), at[0], last=True, agreed=True)
        model.zero_grad()
        self.at = at
        return wishes

    def _gather_wishes(self, wish: int) -> list[int]:
        wishes: Any = self.accelerator.gather(torch.tensor([wish], device=self.args.device))
        return wishes.tolist()

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
        self,
        model: Any,
        batch: Any,
        num_items: torch.Tensor,
        number: int,
        graphed: bool = False,
        last: bool = False,
        weight: float = 1.0,
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
        if weight != 1.0:
            loss = loss * weight
        self.at = (number, "backward")
        wishes = [FITS]
        if last and self.world.size > 1 and self.shards is None:
            wishes = self._gather_wishes(FITS)  # nobody begins it before all can
            self.at = (number, "gradients meet")
        options: dict[str, Any] = {}
        if self.args.optim in (OptimizerNames.LOMO, OptimizerNames.ADALOMO):
            options["learning_rate"] = self._get_learning_rate()
        with self.meter.phase("backward"):
            self.accelerator.backward(loss, **options)
        if max(wishes) > FITS:
            raise MemoryRanOutElsewhere(wishes)
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
        # Each process divides by the labels of all, and the mean is taken over processes.
        loss = loss * (1 if num_items_in_batch is None else self.world.shares)
        return (loss, {"loss": loss}) if return_outputs else loss
