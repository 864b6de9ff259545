"""What makes runs of a second quicker."""

import pytest


@pytest.fixture(scope="session")
def machine_speed():
    """The machine's speed, measured once."""
    import torch

    from whet.plan.speed import measure_speed

    return measure_speed(torch.float32, torch.device("cpu"))


@pytest.fixture
def quick(monkeypatch, machine_speed):
    """No pictures, no collection of garbage before training, and no measuring of the machine."""
    from whet.plan import target
    from whet.train import callbacks, recipe

    monkeypatch.setattr(recipe, "plot_loss", lambda run: None)
    monkeypatch.setattr(callbacks, "forget_peak_memory", lambda: 0)
    monkeypatch.setattr(target, "measure_speed", lambda *_: machine_speed)
