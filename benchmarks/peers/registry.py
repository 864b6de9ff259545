"""The peers, and each one's settings: its defaults, and the best that its documentation offers.

`tuned` names the variant that was the fastest valid one when all were tried on that kind of device
(`--variants all`, Alpaca rows in bfloat16 on two CPU cores, 2026-11-21;
none was tried on a GPU). Only the standard library is used here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Peer:
    """A framework to be measured.

    Args:
        title: Its name in tables.
        requirements: Its pinned requirements file; None runs it in the harness's own environment.
        variants: Settings by name; `default` is what a user gets who sets nothing.
        tuned: The best variant, by device; where none is named the default is the best.
        methods: What it can train.
        needs_cuda: It does not run on a CPU.
    """

    title: str
    requirements: str | None
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"default": {}})
    tuned: Mapping[str, str] = field(default_factory=dict)
    methods: tuple[str, ...] = ("sft",)
    needs_cuda: bool = False

    def chosen(self, wish: str, device: str) -> list[str]:
        """Return the names of the variants to run.

        Args:
            wish: `default`, `tuned`, `both`, `all`, or a variant's name.
            device: `cpu` or `cuda`.
        """
        tuned = self.tuned.get(device, "default")
        if wish == "all":
            return list(self.variants)
        if wish == "both":
            return list(dict.fromkeys(["default", tuned]))
        return [tuned if wish == "tuned" or wish not in self.variants else wish]


_PLAIN = {
    # bitsandbytes' QLoRA recipe turns checkpointing on in `prepare_model_for_kbit_training`.
    "default": {"checkpointing": False},
    "autocast": {"autocast": True},
    "flattened": {"flatten": True},
    "flattened-whole": {"flatten": True, "batch_size": 1024},
    "whole": {"batch_size": 1024},
    "flash": {"flatten": True, "attention": "flash_attention_2", "autocast": True},
}

PEERS: dict[str, Peer] = {
    "whet": Peer(
        "whet",
        None,
        {"default": {}, "lean": {"plan": {"preset": "lean"}}},
        methods=("sft", "dpo"),
    ),
    "hf": Peer("transformers", "hf", _PLAIN, {"cpu": "flattened"}),
    "trl": Peer(
        "trl",
        "trl",
        {
            "default": {},
            "kept": {"checkpointing": False},
            "kept-float": {"checkpointing": False, "autocast": False},
            "padding-free": {"checkpointing": False, "padding_free": True},
            "padding-free-float": {
                "checkpointing": False,
                "padding_free": True,
                "autocast": False,
            },
        },
        {"cpu": "padding-free-float"},
        ("sft", "dpo"),
    ),
    "unsloth": Peer(
        "unsloth",
        "unsloth",
        {
            "default": {},
            "kept": {"checkpointing": False},
            "kept-float": {"checkpointing": False, "autocast": False},
            "padding-free": {"checkpointing": False, "padding_free": True},
        },
        {"cpu": "padding-free"},
        ("sft", "dpo"),
    ),
    "liger": Peer("liger", "liger", _PLAIN, needs_cuda=True),
}
