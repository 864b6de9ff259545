"""Methods dpo, orpo and kto: WhetTrainer with a loss over pairs or judged answers.

A pair is packed whole, and what its two answers have in common before them is computed once
(`engine/passes.py:pack_shared`). The losses need the log-probability of each answer, which the engine's
head gives without logits. The reference is the same model, with its adapter turned off or with the
parameters that it had before training, on the same pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from whet.config import Config
from whet.data.packing import fair_shares
from whet.data.pairs import Unit, mismatched
from whet.data.tokenize import IGNORED, Tokens, collate
from whet.engine.passes import PackedPass, pack_pass, pack_shared
from whet.engine.swap import fuses_head, takes_packed
from whet.model.load import max_length
from whet.model.loss import label_log_probs
from whet.sections import PREFERENCES
from whet.train.preference_loss import dpo_loss, kto_loss, odds_loss
from whet.train.trainer import WhetTrainer


def trainer_of(method: str) -> type[WhetTrainer]:
    """Return the trainer of a method that whet trains itself."""
    return PreferenceTrainer if method in PREFERENCES else WhetTrainer


def turns_adapter_off(config: Config) -> bool:
    """Tell whether the reference is the base model, rather than the trained parameters at their start."""
    if config.preference.reference != "auto":
        return config.preference.reference == "adapter_off"
    # Other starts of an adapter change the base, and trained biases stay when it is turned off.
    starts_at_nothing = config.lora.init in ("default", "gaussian") and config.lora.bias == "none"
    return config.train.parameters == "lora" and starts_at_nothing


@dataclass(frozen=True, slots=True)
class UnitPass:
    """A pass over pairs or judged answers.

    Args:
        batch: What enters the model.
        units: What it is over.
        num_labels: Labelled rows of each document, in the batch's order.
    """

    batch: PackedPass | dict[str, torch.Tensor]
    units: Sequence[Unit]
    num_labels: list[int]


@dataclass
class Means:
    """Means of what is logged, as sums that stay on the device until somebody reads them."""

    totals: dict[str, torch.Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, total: torch.Tensor, num: int) -> None:
        """Add a sum over so many values."""
        total = total.detach().float()
        self.totals[name] = self.totals[name] + total if name in self.totals else total
        self.counts[name] = self.counts.get(name, 0) + num

    def merge(self, other: Means) -> None:
        """Add another's sums."""
        for name, total in other.totals.items():
            self.add(name, total, other.counts[name])

    def read(self, prefix: str = "") -> dict[str, float]:
        """Return the means, and the margin where only its two sides were counted."""
        found = {n: float(t) / self.counts[n] for n, t in self.totals.items() if self.counts[n]}
        chosen, rejected = (found.get(f"rewards/{side}") for side in ("chosen", "rejected"))
        if chosen is not None and rejected is not None:
            found["rewards/margins"] = chosen - rejected
        return {prefix + name: value for name, value in found.items()}

    def clear(self) -> None:
        """Start again from nothing."""
        self.totals.clear()
        self.counts.clear()


class PreferenceTrainer(WhetTrainer):
    """WhetTrainer whose examples are Units, and whose loss compares their answers.

    A step's loss is the mean over its units, however many passes they take.
    """

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        config = self.whet_config
        self.preference = config.preference
        self._start: list[torch.Tensor] | None = None
        if config.method != "orpo" and not turns_adapter_off(config):
            # Taken before a checkpoint is loaded: a resumed run has the reference that it had.
            self._start = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        self._max_length = max_length(config.model) if config.method == "kto" else 0
        self._step: Sequence[Unit] = ()  # the units of the step, in the order they were drawn
        self._num_plain = torch.ones(())  # orpo: tokens that the plain loss of the step is over
        self._kl = torch.zeros(())  # kto: of the step
        # Sums and counts of what is logged: of the step being computed, and since the last log.
        self._now, self._logged = Means(), Means()

    @property
    def _draws_its_share(self) -> bool:
        return self.whet_config.method != "kto"  # which compares answers of the whole step

    def _own_part(self, rows: list[Tokens]) -> list[Tokens]:
        if self.whet_config.method != "kto":
            return rows
        self._step = [unit for unit in rows if isinstance(unit, Unit)]
        return self._shared_out(rows)

    def _shared_out(self, rows: Sequence[Tokens]) -> list[Tokens]:
        """Return this process's part of rows that each process has all of."""
        costs = [len(tokens.input_ids) for tokens in rows]
        return [rows[i] for i in fair_shares(costs, self.world.shares)[self.world.share]]

    def _count_items(self, rows: Sequence[Tokens]) -> torch.Tensor:
        """Count the units of the step over all processes, and note what else its loss depends on."""
        num, plain = self._begin_step(rows, len(rows), self._count_plain(rows))
        self._num_plain = torch.tensor(max(1, plain), device=self.args.device)
        return torch.tensor(max(1, num), device=self.args.device)

    def _count_plain(self, rows: Sequence[Tokens]) -> int:
        return sum(sum(self._labelled(unit)[:1]) for unit in rows if isinstance(unit, Unit))

    def _run_passes(
        self, model: Any, passes: list[list[Tokens]], num_items: torch.Tensor
    ) -> torch.Tensor:
        self._now.clear()
        if self.whet_config.method == "kto":
            self.at = (0, "forward")
            wrong = self._shared_out(mismatched(self._step, self._max_length))
            self._kl = self._estimate_kl(wrong, num_items, together=True)
        loss = super()._run_passes(model, passes, num_items)
        self._logged.merge(self._now)
        return loss

    def _make_batch(self, group: Sequence[Tokens], rounded: bool) -> UnitPass:
        units = [unit for unit in group if isinstance(unit, Unit)]
        documents = [self._documents(unit) for unit in units]
        flat = [document for each in documents for document in each]
        counts = [count for unit in units for count in self._labelled(unit)]
        if self.packing.padded or not (takes_packed(self.model) and fuses_head(self.model)):
            tokens = [Tokens(ids, labels, "") for ids, labels in flat]
            return UnitPass(self._prepare_inputs(collate(tokens, self._pad)), units, counts)
        num = sum(len(unit.input_ids) for unit in units)
        padding = self.packing.length_of(num) - num
        if self.preference.share_prompts and len(flat) > len(units):
            batch = pack_shared(documents, self._pad, padding)
        else:
            batch = pack_pass(flat, self._pad, padding)
        return UnitPass(batch.to(self.args.device), units, counts)

    def _documents(self, unit: Unit) -> list[tuple[list[int], list[int]]]:
        """Return ids and labels of a unit's documents; orpo's plain loss may be over all tokens."""
        found = [(tokens.input_ids, tokens.labels) for tokens in unit.documents]
        if self.whet_config.method == "orpo" and self.preference.nll_on == "all":
            found[0] = (found[0][0], found[0][0])
        return found

    def _labelled(self, unit: Unit) -> list[int]:
        return [
            sum(label != IGNORED for label in labels[1:]) for _, labels in self._documents(unit)
        ]

    def _estimate_kl(
        self, wrong: Sequence[Tokens], num_items: torch.Tensor, together: bool
    ) -> torch.Tensor:
        """Return how much likelier the model finds the step's answers behind prompts of others.

        Args:
            wrong: The answers of this process, behind prompts of others.
            num_items: Answers of the step.
            together: Add up over processes.
        """
        total = torch.zeros((), device=self.args.device)
        for group in self.packing.passes(wrong) if wrong else []:
            batch = self._make_batch(group, rounded=False)
            with torch.no_grad(), self.compute_loss_context_manager(), _without_dropout(self.model):
                total += self._answers(self.model, batch).sum() - self._reference(batch).sum()
        if together and self.world.shares > 1:
            parts: Any = self.accelerator.gather(total[None])
            total = parts[:: self.world.tensor].sum()
        return (total / num_items).clamp(min=0)

    def _answers(self, model: Any, batch: UnitPass) -> torch.Tensor:
        """Return the summed log-probability of each document's labels."""
        parts = label_log_probs(model, batch.batch).split(batch.num_labels)
        return torch.stack([part.sum() for part in parts])

    def _reference(self, batch: UnitPass) -> torch.Tensor:
        with torch.no_grad(), _without_dropout(self.model), self._as_reference():
            return self._answers(self.model, batch)

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[None]:
        """Let the model be its own reference inside the body."""
        model: Any = self.model
        if self._start is None:
            with model.disable_adapter():
                yield
        else:
            with _swapped([p for p in model.parameters() if p.requires_grad], self._start):
                yield

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return this pass's part of the step's mean loss over units."""
        batch: UnitPass = inputs
        num = len(batch.units) if num_items_in_batch is None else num_items_in_batch
        compute = {"dpo": self._dpo, "orpo": self._orpo, "kto": self._kto}[self.whet_config.method]
        loss = compute(model, batch, num) * self.world.shares
        return (loss, {"loss": loss}) if return_outputs else loss

    def _dpo(self, model: Any, batch: UnitPass, num_items: torch.Tensor | int) -> torch.Tensor:
        reference_U2 = self._reference(batch).view(-1, 2)
        answers_U2 = self._answers(model, batch).view(-1, 2)
        ratio_U2 = answers_U2 - reference_U2
        counts_U2 = torch.tensor(batch.num_labels, device=ratio_U2.device).view(-1, 2)
        loss_U = dpo_loss(ratio_U2[:, 0], ratio_U2[:, 1], counts_U2, self.preference)
        self._note_pairs(answers_U2, self.preference.beta * ratio_U2)
        return loss_U.sum() / num_items

    def _orpo(self, model: Any, batch: UnitPass, num_items: torch.Tensor | int) -> torch.Tensor:
        settings = self.preference
        parts = label_log_probs(model, batch.batch).split(batch.num_labels)
        documents = [tokens for unit in batch.units for tokens in unit.documents]
        means = []
        for part, tokens in zip(parts, documents, strict=True):
            if (
                len(part) != tokens.num_labels
            ):  # all of a chosen text: its answer's rows are some of them
                part = part[torch.tensor(tokens.labels[1:], device=part.device) != IGNORED]
            means.append(part.sum() / max(1, len(part)))
        mean_U2 = torch.stack(means).view(-1, 2)
        loss_U = odds_loss(mean_U2[:, 0], mean_U2[:, 1])
        plain = -torch.cat(parts[0::2]).sum() / self._num_plain
        self._note_pairs(mean_U2, settings.beta * mean_U2)
        self._now.add("nll_loss", plain * num_items, len(batch.units))
        self._now.add("log_odds_ratio", -loss_U.sum(), len(loss_U))
        return plain + settings.beta * loss_U.sum() / num_items

    def _kto(self, model: Any, batch: UnitPass, num_items: torch.Tensor | int) -> torch.Tensor:
        settings = self.preference
        reference_U = self._reference(batch)
        answers_U = self._answers(model, batch)
        ratio_U = answers_U - reference_U
        good_U = torch.tensor([unit.desirable for unit in batch.units], device=ratio_U.device)
        loss_U = kto_loss(ratio_U, good_U, self._kl.to(ratio_U.device), settings)
        for name, those in (("chosen", good_U), ("rejected", ~good_U)):
            num = sum(unit.desirable == (name == "chosen") for unit in batch.units)
            self._now.add(f"rewards/{name}", settings.beta * ratio_U[those].sum(), num)
            self._now.add(f"logps/{name}", answers_U[those].sum(), num)
        self._now.add("kl", self._kl * len(batch.units), len(batch.units))
        return loss_U.sum() / num_items

    def _note_pairs(self, answers_U2: torch.Tensor, rewards_U2: torch.Tensor) -> None:
        num = len(rewards_U2)
        for column, name in enumerate(("chosen", "rejected")):
            self._now.add(f"rewards/{name}", rewards_U2[:, column].sum(), num)
            self._now.add(f"logps/{name}", answers_U2[:, column].sum(), num)
        margin_U = rewards_U2[:, 0] - rewards_U2[:, 1]
        self._now.add("rewards/accuracies", (margin_U > 0).sum(), num)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the rewards with the loss."""
        if "loss" in logs:
            logs = {**logs, **self._of_all_shares().read()}
            self._logged.clear()
        super().log(logs, *args, **kwargs)

    def _run_empty_pass(self, *args: Any, **kwargs: Any) -> None:
        noted, self._now = self._now, Means()
        super()._run_empty_pass(*args, **kwargs)
        self._now = noted

    def _of_all_shares(self) -> Means:
        """Add up what each process noted since the last log."""
        if self.world.shares == 1:
            return self._logged
        noted = self._logged
        mine = ({name: float(total) for name, total in noted.totals.items()}, noted.counts)
        found = Means()
        for totals, counts in self.world.gather(mine)[:: self.world.tensor]:
            for name, total in totals.items():
                found.add(name, torch.tensor(total), counts[name])
        return found

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure loss and rewards of the held-out units, and log them."""
        rows: Any = self.eval_dataset
        rows = rows[: self.whet_config.eval.max_rows]
        assert self.model is not None
        self.model.eval()
        total, size, means = 0.0, self.whet_config.train.batch_size, Means()
        for start in range(0, len(rows), size):
            units = list(rows[start : start + size])
            num_items = torch.tensor(len(units), device=self.args.device)
            self._num_plain = torch.tensor(
                max(1, self._count_plain(units)), device=self.args.device
            )
            self._now.clear()
            if self.whet_config.method == "kto":
                wrong = mismatched(units, self._max_length)
                self._kl = self._estimate_kl(wrong, num_items, together=False)
            for group in self.packing.passes(units):
                with torch.no_grad(), self.compute_loss_context_manager():
                    batch = self._make_batch(group, rounded=False)
                    part = self.compute_loss(self.model, batch, num_items_in_batch=num_items)
                total += float(part) / self.world.shares * len(units)
            means.merge(self._now)
        metrics = {"eval_loss": total / max(1, len(rows)), **means.read("eval_")}
        self.log(metrics)
        return metrics


@contextlib.contextmanager
def _without_dropout(model: Any) -> Iterator[None]:
    """Put a model into eval mode inside the body."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def _swapped(parameters: Sequence[Any], others: Sequence[torch.Tensor]) -> Iterator[None]:
    """Give parameters other values inside the body; no value is copied."""
    kept = [parameter.data for parameter in parameters]
    try:
        for parameter, other in zip(parameters, others, strict=True):
            parameter.data = other
        yield
    finally:
        for parameter, mine in zip(parameters, kept, strict=True):
            parameter.data = mine
