"""One search of `benchmarks.contexts`: a peer loads the model in bounded memory and tries lengths.

    python -m benchmarks.contexts_worker TASK

TASK is JSON. Events are JSON lines on the standard output; what a framework prints goes to the standard
error. Imported in every peer's environment, so that nothing of whet is imported but for whet itself.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.contexts import CONTENDERS, next_length
from benchmarks.peers.job import TARGETS, Job, Workload
from benchmarks.peers.worker import Memory

# How torch, CUDA's libraries, oneDNN and Triton say that memory ran out, besides torch.OutOfMemoryError.
SIGNS = (
    "out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory",
    "bad_alloc", "alloc_failed", "cublas_status_not_initialized", "could not create a memory object",
    "could not create a primitive",
)  # fmt: skip

Step = Callable[[int], dict[str, Any]]


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception, or what it was raised from, says that memory ran out."""
    import torch

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError | torch.OutOfMemoryError):
            return True
        if any(sign in str(cause).lower() for sign in SIGNS):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def bound_memory(gib: float, device: str) -> None:
    """Let this process have so much memory and no more.

    On CUDA the bound is a card's: what the context takes is not torch's to use.
    """
    import torch

    if device == "cpu":
        # The data segment: what is allocated, and not the mapped libraries.
        resource.setrlimit(resource.RLIMIT_DATA, (int(gib * 2**30),) * 2)
        return
    torch.zeros(1, device="cuda")
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()
    share = (gib * 2**30 - context) / total
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(share, 0.0)))


def ids_of(tokens: int) -> list[int]:
    """Return random token ids, the same each time."""
    import torch

    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(3, 49_000, (tokens,), generator=generator).tolist()


def prepare_whet(job: Job) -> Step:
    """Load the model with whet's engine in it, and return its step."""
    import torch
    from peft import LoraConfig, get_peft_model

    from whet.engine import swap
    from whet.engine.memory import Policy
    from whet.model.load import load_model
    from whet.model.loss import summed_loss
    from whet.sections import ModelSection
    from whet.train.survive import free_memory

    section = ModelSection(name=job.model, load_in_4bit=job.work.load_in_4bit)
    model: Any = load_model(section, torch.bfloat16)
    settings = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=TARGETS)
    model = get_peft_model(model, settings).train()
    swap.attach(model)
    least = Policy(qkv="recompute", gate_up="recompute")
    ways = {
        "keep": Policy(),
        "recompute": least,
        "offload": replace(least, hidden="offload", attention="offload"),
    }
    failed: dict[str, int] = {}  # where a policy ran out of memory it will do so with more tokens

    def once(tokens: int, policy: Policy) -> None:
        swap.set_policies(model, [policy] * len(swap.current_policies(model)))
        trained = [p for p in model.parameters() if p.requires_grad]
        ids = torch.tensor([ids_of(tokens)], device=model.device)
        try:
            loss, num_labels = summed_loss(model, {"input_ids": ids, "labels": ids})
            (loss / num_labels).backward()
            torch.optim.AdamW(trained, lr=1e-5).step()
        finally:
            model.zero_grad(set_to_none=True)

    def step(tokens: int) -> dict[str, Any]:
        names = [n for n in job.settings["policies"] if tokens < failed.get(n, tokens + 1)]
        for name in names:
            began = time.perf_counter()
            try:
                once(tokens, ways[name])
                return {"policy": name, "seconds": _since(began, job.device)}
            except Exception as error:
                if not is_out_of_memory(error) or name == names[-1]:
                    raise
                failed[name] = tokens
            free_memory()
        raise MemoryError("every policy ran out of memory with fewer tokens")

    return step


def prepare_hf(job: Job) -> Step:
    """Load the model as plain transformers and peft do, and return a step of Trainer."""
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from benchmarks.peers import hf

    tokenizer = AutoTokenizer.from_pretrained(job.model)
    model = hf.load(job)

    def step(tokens: int) -> dict[str, Any]:
        ids, clock = ids_of(tokens), _clock(job.device)
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**hf.arguments(job)),
            train_dataset=[{"input_ids": ids, "labels": ids}],  # type: ignore[arg-type]
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            callbacks=[clock],
        )
        return _train(trainer.train, model, clock)

    return step


def prepare_trl(job: Job) -> Step:
    """Load the model as trl's own examples do, and return a step of SFTTrainer."""
    from benchmarks.peers import hf, trl

    return _sft_step(job, hf.load(job), trl.tokenizer_of(job))


def prepare_unsloth(job: Job) -> Step:
    """Load the model as Unsloth's notebooks do, and return a step of the trainer it changed."""
    from unsloth import FastLanguageModel  # isort: skip  (before transformers)
    import torch
    from transformers import AutoConfig

    limit = AutoConfig.from_pretrained(job.model).max_position_embeddings
    checkpointing = job.settings["checkpointing"]
    model: Any
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=job.model,
        max_seq_length=min(limit, job.work.length),
        dtype=torch.bfloat16,
        load_in_4bit=job.work.load_in_4bit,
        use_gradient_checkpointing=checkpointing,
    )
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, lora_dropout=0, bias="none", target_modules=TARGETS,
        use_gradient_checkpointing=checkpointing,
    )  # fmt: skip
    # What is set for Trainer would replace its own checkpointing.
    return _sft_step(replace(job, settings={}), model, tokenizer)


def _sft_step(job: Job, model: Any, tokenizer: Any) -> Step:
    from benchmarks.peers import trl

    def step(tokens: int) -> dict[str, Any]:
        ids = ids_of(tokens)
        Path(job.rows).write_text(json.dumps({"input_ids": ids, "labels": ids}) + "\n")
        one = replace(job, work=replace(job.work, length=tokens))
        clock = _clock(job.device)
        watch: Any = _Clocked(clock)
        return _train(lambda: trl.train(one, watch, model, tokenizer), model, clock)

    return step


class _Clocked:
    """Stands for the harness's Watch: it has a callback for the trainer, and nobody waits."""

    def __init__(self, clock: Any) -> None:
        self.clock = clock

    def callback(self) -> Any:
        """Return the callback."""
        return self.clock


def _clock(device: str) -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Times the one step."""

        seconds = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            """Start."""
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            """Stop."""
            self.seconds = _since(self.began, device)

    return Clock()


def _train(train: Callable[[], Any], model: Any, clock: Any) -> dict[str, Any]:
    from accelerate.utils import extract_model_from_parallel

    try:
        train()
    finally:
        model.zero_grad(set_to_none=True)
        # A trainer wraps the model's forward in autocast, and the next one would wrap it again.
        extract_model_from_parallel(model, keep_fp32_wrapper=False)
    return {"seconds": clock.seconds}


def _since(began: float, device: str) -> float:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter() - began


def search(
    step: Step, task: dict[str, Any], memory: Any, tell: Callable[..., None], began: float
) -> None:
    """Try lengths until none is left or the time is up.

    Args:
        step: Trains on so many tokens.
        task: Where to begin and to end.
        memory: Is reset before each try, and asked for the peak after it.
        tell: Called with an event and its values.
        began: When the limit began to count, by `time.monotonic`.
    """
    import torch

    fits, fails, seconds = task["fits"], task["fails"], 0.0
    while (tokens := next_length(fits, fails, task["most"])) is not None:
        # Attention makes a step that is twice as long take up to four times as long.
        expected = seconds * (tokens / fits) ** 2 if fits else 0.0
        if time.monotonic() - began + expected > task["limit"]:
            tell("over", reason="time is up")
            return
        memory.mark_loaded()
        tell("trying", tokens=tokens)
        reason = ""
        try:
            result = step(tokens)
            peak = memory.peak()
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).split("\n")[0][:200]
            if not is_out_of_memory(error):
                # After a fault of another kind the device may be unusable: another process goes on.
                tell("fails", tokens=tokens, reason=f"{type(error).__name__}: {reason}")
                raise
        if reason:
            fails = tokens
            tell("fails", tokens=tokens, reason=reason)
        else:
            fits, seconds = tokens, result["seconds"]
            used = peak.get("reserved", peak["loaded"] + peak["above"])
            tell(
                "fits", tokens=tokens, peak_bytes=used, pinned_bytes=peak.get("pinned", 0), **result
            )
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    tell("over")


def main() -> None:
    """Do one search."""
    began = time.monotonic()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the framework prints is not an event
    task = json.loads(sys.argv[1])

    def tell(event: str, **values: Any) -> None:
        answers.write(json.dumps({"event": event, **values}) + "\n")
        answers.flush()

    # Unsloth writes generated code into the folder that it is run in.
    with tempfile.TemporaryDirectory(prefix="whet-contexts-") as folder:
        os.chdir(folder)
        run(task, folder, tell, began)


def run(task: dict[str, Any], folder: str, tell: Callable[..., None], began: float) -> None:
    """Load the model and search."""
    module, settings = CONTENDERS[task["peer"]]
    if module == "unsloth":
        import unsloth  # noqa: F401  (before anything imports transformers)
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    work = Workload(
        task["peer"], task["model"], load_in_4bit=task["nf4"], length=task["most"],
        batch_size=1, accumulation=1, warm=0, rounds=1,
    )  # fmt: skip
    rows = str(Path(folder) / "rows.jsonl")
    job = Job(module, "default", settings, work, task["model"], rows, folder, device)
    prepare = {
        "whet": prepare_whet, "hf": prepare_hf, "trl": prepare_trl, "unsloth": prepare_unsloth,
    }[module]  # fmt: skip
    bound_memory(task["memory"], device)
    try:
        step = prepare(job)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        tell("over", reason="the model alone does not fit")
        return
    search(step, task, Memory(device), tell, began)


if __name__ == "__main__":
    main()
