"""Methods that trl's trainers run, given whet's model and data: grpo and reward.

grpo's loop of sampling, judging and learning is trl's; the engine computes its layers and
log-probabilities. A reward model is no causal language model: trl trains it, the engine in its layers.
Plans, packing and resuming are those of whet's own trainer, and are not here.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, TrainerCallback

from whet.config import Config
from whet.data.formatting import load_formatting
from whet.data.pairs import units_of
from whet.data.prepare import PreparedData, examples_of
from whet.engine.swap import met, stay_on_top
from whet.errors import InputError, Interrupted, WhetError
from whet.evaluate import Sample, answer
from whet.model import CausalLM, Tokenizer
from whet.model.load import attach_engine, choose_dtype, device, load_model
from whet.model.lora import count_parameters, prepare_parameters
from whet.runs import RunFolder, start_run, whole_folder
from whet.sensors import Sensors, training_gpus
from whet.train.arguments import training_arguments
from whet.train.callbacks import (
    Progress,
    StopAtSignal,
    append_line,
    judged_in,
    machine_figures,
    peak_memory_bytes,
)
from whet.train.listen import Listener
from whet.train.plot import plot_loss
from whet.train.reward_model import load_reward_model
from whet.train.trackers import tracking

if TYPE_CHECKING:
    from transformers import TrainingArguments

Reward = Callable[..., list[float]]
# What the config says of training, in the arguments of any of transformers' trainers.
_KEPT = (
    "output_dir", "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type",
    "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "optim_args", "seed",
    "bf16", "fp16", "use_cpu", "dataloader_pin_memory", "logging_steps", "logging_nan_inf_filter",
    "disable_tqdm", "report_to",
)  # fmt: skip


def fit_with_trl(
    config: Config,
    data: PreparedData,
    tokenizer: Tokenizer,
    resume: bool,
    listener: Listener,
    callbacks: Sequence[TrainerCallback] = (),
) -> RunFolder:
    """Run a method of trl's, from checked data to saved weights.

    Args:
        config: A checked config, whose method is grpo or reward.
        data: Its data.
        tokenizer: The model's tokenizer.
        resume: Refused.
        listener: Hears what happens.
        callbacks: More callbacks of the trainer.

    Returns:
        The folder of the finished run.

    Raises:
        InputError: trl is not installed, a reward function cannot be loaded, or a run should go on.
        Interrupted: The user stopped the run.
    """
    from transformers import set_seed

    require_trl(config.method)
    if resume:
        raise InputError(
            f"a run of method '{config.method}' cannot be resumed", fix="start it without --resume"
        )
    rewards = load_rewards(config) if config.method == "grpo" else []
    run, moved = start_run(config)
    if moved:
        listener.note(f"the earlier run '{run.path}' is now '{moved}'")
    started = time.perf_counter()
    with run.lock():
        _write_report_head(run, config, data)
        set_seed(config.train.seed)
        model = _load(config, tokenizer, listener)
        _put_engine(run, config, model, listener)
        before = _measure(config, model, tokenizer, data, rewards, listener, "base")
        trainer = _trainer(config, run, model, tokenizer, data, rewards)
        stay_on_top(model)
        _train(run, config, trainer, listener, callbacks)
        if before is not None:
            after = _measure(config, model, tokenizer, data, rewards, listener, "tuned")
            _write_rewards(run, before, after)
        lora = config.train.parameters == "lora"
        with whole_folder(run.adapter_dir if lora else run.model_dir) as folder:
            model.save_pretrained(str(folder))
            tokenizer.save_pretrained(str(folder))
        plot_loss(run)
        run.update_report(seconds=time.perf_counter() - started, peak_bytes=peak_memory_bytes())
        if config.engine.enabled:
            run.update_report(engine={**run.report["engine"], "met": met(model)})
    return run


def _load(config: Config, tokenizer: Tokenizer, listener: Listener) -> CausalLM:
    listener.stage(f"loading {config.model.name}")
    dtype, _ = choose_dtype(config.model.dtype, config.train.parameters != "lora")
    if config.method == "reward":
        return load_reward_model(config, dtype, tokenizer)
    return prepare_parameters(load_model(config.model, dtype), config)


def _train(
    run: RunFolder,
    config: Config,
    trainer: Any,
    listener: Listener,
    callbacks: Sequence[TrainerCallback],
) -> None:
    """Train to the end, or raise where the user stopped it."""
    trained, total = count_parameters(trainer.model)
    listener.note(f"training {trained:,} of {total:,} parameters ({trained / total:.2%})")
    stop = StopAtSignal()
    trainer.remove_callback(PrinterCallback)  # the front end shows the progress
    for callback in (TrlMetrics(run, listener), stop, *callbacks):
        trainer.add_callback(callback)
    listener.stage("training")
    handlers = trainer.callback_handler.callbacks
    tracks = tracking(run, config.train.trackers, handlers, listener.note)
    with stop.listening(listener.note), tracks:
        trainer.train()
    done, steps = trainer.state.global_step, trainer.state.max_steps
    if done < steps:
        raise Interrupted(f"stopped after step {done} of {steps}; the run cannot be resumed")
    if config.method == "reward" and trainer.eval_dataset is not None:
        found = trainer.evaluate()
        run.update_report(reward={k: v for k, v in found.items() if isinstance(v, float)})
    run.update_report(training={"steps": done, "parameters_trained": trained, "parameters": total})


def require_trl(method: str) -> None:
    """Stop when trl is not installed.

    Raises:
        InputError: It is not; the sentence says how to install it.
    """
    try:
        import trl  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"method '{method}' needs trl, which is not installed", fix="pip install 'whet[trl]'"
        ) from error


def load_rewards(config: Config) -> list[Reward]:
    """Load the functions that judge answers, each checked for what it returns whenever it is called.

    Args:
        config: The whole config.

    Raises:
        InputError: One cannot be loaded.
    """
    named = config.grpo.reward
    return [
        _checked(load_formatting(name, "grpo.reward"))
        for name in ([named] if isinstance(named, str) else named)
    ]


def _checked(function: Callable[..., Any]) -> Reward:
    name = getattr(function, "__name__", type(function).__name__)

    @functools.wraps(function)
    def judge(*, completions: list[Any], **kwargs: Any) -> list[float]:
        try:
            found = function(completions=completions, **kwargs)
        except Exception as error:  # the user's code: whatever it raises is told in a sentence
            raise WhetError(
                f"grpo.reward: {name}() raised {type(error).__name__}: {error}",
                fix="it is called with prompts, completions, answer and more, each by its name: give it "
                "**kwargs for those it does not use",
            ) from error
        if not isinstance(found, list | tuple) or len(found) != len(completions):
            got = f"{len(found)} items" if isinstance(found, list | tuple) else type(found).__name__
            raise WhetError(
                f"grpo.reward: {name}() must return a number for each of {len(completions)} completions",
                got,
            )
        return list(found)

    vars(judge)["__name__"] = name  # trl logs each function's rewards under its name
    return judge


def prompts_of(config: Config) -> Iterator[dict[str, Any]]:
    """Yield a row of trl's for each training example: the prompt as messages, and the answer.

    Args:
        config: The whole config.
    """
    for example in islice(examples_of(config.data, config.data.train), config.data.max_rows):
        prompt = [{"role": m["role"], "content": m["content"]} for m in example.messages[:-1]]
        yield {"prompt": prompt, "answer": example.answer}


def _shared_arguments(config: Config, run: RunFolder) -> dict[str, Any]:
    arguments: TrainingArguments = training_arguments(config, run, checkpoints=False)
    return {
        **{name: getattr(arguments, name) for name in _KEPT},
        "save_strategy": "no",
        # trl turns it on otherwise; the engine's layers recompute by themselves.
        "gradient_checkpointing": False,
    }


def _trainer(
    config: Config,
    run: RunFolder,
    model: CausalLM,
    tokenizer: Tokenizer,
    data: PreparedData,
    rewards: list[Reward],
) -> Any:
    if config.method == "reward":
        return _reward_trainer(config, run, model, tokenizer, data)
    return _grpo_trainer(config, run, model, tokenizer, rewards)


def _grpo_trainer(
    config: Config, run: RunFolder, model: CausalLM, tokenizer: Tokenizer, rewards: list[Reward]
) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer  # type: ignore[import-not-found]

    functions: Any = rewards
    settings = config.grpo
    arguments = GRPOConfig(
        **_shared_arguments(config, run),
        # The answers to one prompt are one pass, `batch_size` prompts one step.
        per_device_train_batch_size=settings.num_generations,
        gradient_accumulation_steps=config.train.batch_size,
        num_generations=settings.num_generations,
        max_completion_length=settings.max_new_tokens,
        temperature=settings.temperature,
        beta=settings.beta,
        shuffle_dataset=config.train.shuffle,
    )
    return GRPOTrainer(
        model,
        reward_funcs=functions,
        args=arguments,
        train_dataset=Dataset.from_list(list(prompts_of(config))),
        processing_class=tokenizer,
    )


def _reward_trainer(
    config: Config, run: RunFolder, model: CausalLM, tokenizer: Tokenizer, data: PreparedData
) -> Any:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer  # type: ignore[import-not-found]

    def pairs(rows: Any) -> Any:
        documents = [[tokens.input_ids for tokens in unit.documents] for unit in units_of(rows)]
        return [{"chosen_ids": chosen, "rejected_ids": rejected} for chosen, rejected in documents]

    heldout = pairs(data.heldout)
    size = config.train.batch_size
    arguments = RewardConfig(
        **_shared_arguments(config, run),
        per_device_train_batch_size=size,
        per_device_eval_batch_size=size,
        eval_strategy="steps" if config.eval.steps and heldout else "no",
        eval_steps=config.eval.steps,
        max_length=None,  # the rows are cut already, and told
    )
    return RewardTrainer(
        model,
        args=arguments,
        train_dataset=Dataset.from_list(pairs(data.train)),
        eval_dataset=Dataset.from_list(heldout) if heldout else None,
        processing_class=tokenizer,
    )


class TrlMetrics(TrainerCallback):
    """Appends each log step of trl's to metrics.jsonl, and tells it.

    Args:
        run: The run's folder.
        listener: Hears of each step.
    """

    def __init__(self, run: RunFolder, listener: Listener) -> None:
        self.run, self.listener = run, listener
        self._start = self._last = time.perf_counter()
        self._tokens = 0.0
        self.sensors: Sensors | None = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self.sensors = Sensors(training_gpus())
        self._start = self._last = time.perf_counter()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Write one line."""
        numbers = {k: v for k, v in (logs or {}).items() if isinstance(v, int | float)}
        if any(name.startswith("eval_") for name in numbers):
            found = {k.replace("eval_", "heldout_", 1): v for k, v in numbers.items()}
            append_line(self.run, {"step": state.global_step, **found})
        if "loss" not in numbers:
            return
        now, tokens = time.perf_counter(), numbers.get("num_tokens", 0.0)
        rate = (tokens - self._tokens) / (now - self._last)
        self._last, self._tokens = now, tokens
        seconds = now - self._start
        append_line(self.run, {
            "step": state.global_step, **numbers, "tokens_per_second": rate,
            "memory_bytes": peak_memory_bytes(), "seconds": seconds,
            **machine_figures(self.sensors),
        })  # fmt: skip
        self.listener.progress(Progress(
            step=state.global_step, num_steps=state.max_steps, loss=numbers["loss"],
            learning_rate=numbers.get("learning_rate", 0.0), grad_norm=numbers.get("grad_norm", 0.0),
            tokens_per_second=rate, labelled_per_second=0.0, entered_per_second=rate, mfu=0.0, hfu=0.0,
            memory_bytes=peak_memory_bytes(), planned_bytes=0, seconds_in={}, seconds=seconds,
            eta_seconds=seconds / max(1, state.global_step) * (state.max_steps - state.global_step),
            judged=judged_in(numbers),
        ))  # fmt: skip


def _measure(
    config: Config,
    model: CausalLM,
    tokenizer: Tokenizer,
    data: PreparedData,
    rewards: list[Reward],
    listener: Listener,
    name: str,
) -> tuple[float, list[Sample]] | None:
    """Return the mean reward of the greedy answers to the held-out prompts, and the answers."""
    examples = [e for e in data.heldout_examples[: config.eval.max_rows] if e.messages]
    if not rewards or not examples:
        return None
    listener.stage(f"judging the {name} model")
    model.eval()
    settings = config.eval.model_copy(update={"max_new_tokens": config.grpo.max_new_tokens})
    samples = answer(model, tokenizer, examples, settings)
    told: dict[str, Any] = {
        "prompts": [list(example.messages[:-1]) for example in examples],
        "completions": [[{"role": "assistant", "content": s.answer}] for s in samples],
        "completion_ids": [tokenizer(s.answer)["input_ids"] for s in samples],
        "answer": [example.answer for example in examples],
    }
    total = sum(sum(judge(**told)) for judge in rewards)
    return total / len(examples), samples


def _write_rewards(
    run: RunFolder, before: tuple[float, list[Sample]], after: tuple[float, list[Sample]] | None
) -> None:
    from whet.train.results import write_samples

    assert after is not None
    run.update_report(reward={"base": before[0], "tuned": after[0], "num_answers": len(after[1])})
    write_samples(run, before[1], after[1])


def _put_engine(run: RunFolder, config: Config, model: CausalLM, listener: Listener) -> None:
    report = attach_engine(model, config)
    for line in report.lines() if report else ["engine: off (engine.enabled)"]:
        listener.note(line)
    if report:
        run.update_report(engine=report.to_dict())


def _write_report_head(run: RunFolder, config: Config, data: PreparedData) -> None:
    from whet.doctor import versions

    run.update_report(
        config=config.model_dump(), versions=versions(), device=device().type,
        data=data.report.to_dict(),
    )  # fmt: skip
