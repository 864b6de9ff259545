import json
import resource
import subprocess
import sys

import pytest
import torch
from benchmarks.contexts import FINE, START, Found, next_length
from benchmarks.shapes import make_model

from benchmarks import contexts, contexts_worker


def run_search(longest, most=1 << 20):
    """Search where `longest` tokens fit; return what fits, what does not, and the lengths tried."""
    fits, fails, tried = 0, None, []
    while (tokens := next_length(fits, fails, most)) is not None:
        tried.append(tokens)
        if tokens <= longest:
            fits = tokens
        else:
            fails = tokens
    return fits, fails, tried


class NoMemory:
    """Stands for the meter of memory."""

    def mark_loaded(self):
        pass

    def peak(self):
        return {"loaded": 1, "above": 2}


def events_of(step, **task):
    events = []
    task = {"fits": 0, "fails": None, "most": 4096, "limit": 1e9, **task}

    def tell(event, **values):
        events.append((event, values.get("tokens")))

    contexts_worker.search(step, task, NoMemory(), tell, 0.0)
    return events


@pytest.mark.parametrize("longest", [40, 511, 512, 700, 5000, 77_777, 342_733])
def test_a_search_ends_within_five_percent_of_the_truth(longest):
    fits, fails, tried = run_search(longest)
    assert fits <= longest < fails
    assert fails <= FINE * fits + 2
    assert len(tried) == len(set(tried)) <= 20


def test_a_search_ends_at_the_most_tokens_or_at_none():
    assert run_search(10**9, most=3000) == (3000, None, [START, 1024, 2048, 3000])
    assert run_search(0)[0] == 0


def test_running_out_of_memory_never_ends_a_search():
    def step(tokens):
        if tokens > 1500:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"seconds": 0.0}

    events = events_of(step)
    fits = [tokens for event, tokens in events if event == "fits"]
    assert 1500 / FINE <= max(fits) <= 1500
    assert ("fails", 2048) in events
    assert events[-1][0] == "over"


def test_another_error_counts_as_a_length_that_fails_and_ends_the_process():
    def step(tokens):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError):
        events_of(step)


def test_a_step_that_would_take_too_long_is_not_begun():
    assert events_of(lambda tokens: {"seconds": 1e12}) == [
        ("trying", START), ("fits", START), ("over", None),
    ]  # fmt: skip


def test_memory_that_ran_out_is_known_by_what_an_error_was_raised_from():
    def raised_from(error):
        try:
            raise ValueError("the step failed") from error
        except ValueError as found:
            return found

    is_out_of_memory = contexts_worker.is_out_of_memory
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert is_out_of_memory(raised_from(RuntimeError("Triton Error [CUDA]: out of memory")))
    assert not is_out_of_memory(ValueError("a shape is wrong"))


def test_a_process_that_dies_is_followed_by_another_that_knows_what_failed(monkeypatch, tmp_path):
    tasks = []

    def run(task, python, found, limit):
        tasks.append(task)
        if len(tasks) == 1:
            found.fits, found.fails = 512, 1024
        return len(tasks) == 2

    monkeypatch.setattr(contexts, "_run", run)
    arguments = contexts.parse(["--here"])
    contexts.measure("whet", 8.0, tmp_path, arguments)
    assert [(task["fits"], task["fails"]) for task in tasks] == [(0, None), (512, 1024)]


def test_the_table_tells_bounds_from_results():
    fits = {"tokens": 2048, "policy": "offload", "seconds": 1.0}
    found = [Found("whet", 8.0, 2048, 3000, "out of memory", [fits]), Found("hf", 8.0)]
    lines = contexts.table(found).splitlines()
    assert lines[1].split(None, 1) == ["whet", "2,048 (offload)"]
    assert lines[2].split() == ["hf", "none"]
    assert contexts.cell(Found("hf", 8.0, 512)) == ">512"


def test_whet_on_the_cpu_goes_through_the_policies_as_memory_runs_out(
    tmp_path, tiny_model, monkeypatch
):
    from benchmarks.peers.job import Job, Workload

    folder = make_model("tiny", tmp_path, quantised=True, tokenizer=str(tiny_model))
    work = Workload("whet", str(folder), load_in_4bit=True)
    ways = {"policies": ["keep", "recompute", "offload"]}
    job = Job("whet", "default", ways, work, str(folder), "", str(tmp_path), "cpu")
    step = contexts_worker.prepare_whet(job)
    assert step(64)["policy"] == "keep"

    from whet.engine import swap

    set_policies = swap.set_policies

    def scarce(model, policies):
        if policies[0].hidden == "keep":
            raise torch.OutOfMemoryError("CUDA out of memory")
        set_policies(model, policies)

    monkeypatch.setattr(swap, "set_policies", scarce)
    assert step(96)["policy"] == "offload"
    monkeypatch.undo()
    assert step(80)["policy"] == "keep"  # fewer tokens may be kept again
    assert step(96)["policy"] == "offload"  # what failed once is not tried again


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_DATA"), reason="no RLIMIT_DATA")
def test_a_bound_on_the_cpu_is_felt_as_running_out_of_memory():
    code = (
        "import torch; from benchmarks.contexts_worker import bound_memory, is_out_of_memory\n"
        "bound_memory(0.6, 'cpu')\n"
        "try: torch.ones(2**28)\n"
        "except Exception as error: print(is_out_of_memory(error))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


def test_results_in_the_file_are_not_measured_again(monkeypatch, tmp_path, capsys):
    measured = []

    def measure(peer, memory, folder, arguments):
        measured.append((peer, memory))
        return Found(peer, memory, 512, 600)

    monkeypatch.setattr(contexts, "measure", measure)
    words = ["--model", str(tmp_path), "--peers", "whet,hf", "--json", str(tmp_path / "found.json")]
    assert contexts.main([*words, "--memory", "8"]) == 0
    assert contexts.main([*words, "--memory", "8,12"]) == 0
    assert measured == [("whet", 8.0), ("hf", 8.0), ("whet", 12.0), ("hf", 12.0)]
    assert len(json.loads((tmp_path / "found.json").read_text())["found"]) == 4
    assert "12 GiB" in capsys.readouterr().out
