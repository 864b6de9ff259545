"""What a server takes, and where it listens."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from whet.errors import InputError

# The environment variable that holds the API key, for who would not have it in a list of processes.
KEY_VARIABLE = "WHET_API_KEY"
LOOPBACK_NAMES = ["127.0.0.1", "localhost"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one server takes.

    Args:
        body_bytes: Longest body of a request.
        prompt_tokens: Longest prompt; None is what the model can take.
        num_slots: Answers at work together.
        num_waiting: Requests that may wait for a slot.
    """

    body_bytes: int = 1_000_000
    prompt_tokens: int | None = None
    num_slots: int = 16
    num_waiting: int = 256

    def __post_init__(self) -> None:
        least = {"body_bytes": 1, "num_slots": 1, "num_waiting": 0, "prompt_tokens": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise InputError(f"{name} must be at least {bound}", value)


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens.

    Args:
        host: An address of this machine; 0.0.0.0 is all of them.
        port: 0 takes a free one.
        api_key: What clients must show, or None.

    Raises:
        InputError: Other machines could ask, and no key is set.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None

    def __post_init__(self) -> None:
        if self.api_key is None and not self.is_local:
            raise InputError(
                "a server that other machines can reach needs an API key", f"host {self.host}",
                f"set --api-key, or the environment variable {KEY_VARIABLE}",
            )  # fmt: skip
        if self.api_key is not None and not self.api_key.strip():
            raise InputError("the API key is empty")
        if not 0 <= self.port < 65536:
            raise InputError("the port must be 0 to 65535", self.port)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
