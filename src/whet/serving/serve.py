"""Start the server: where it listens, who may ask, and how it ends."""

from __future__ import annotations

import logging
import signal
import socket
from typing import TYPE_CHECKING, Any

from whet.decoding import Batch, make_decoder
from whet.errors import InputError
from whet.generate import end_token_ids
from whet.serving.limits import LOOPBACK_NAMES, Address, Limits
from whet.serving.worker import Worker
from whet.trained import Loaded

if TYPE_CHECKING:
    from fastapi import FastAPI

logger = logging.getLogger(__name__)


def require_server() -> None:
    """Check that the packages of the server are installed.

    Raises:
        InputError: They are not.
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(
            "whet serve needs FastAPI and uvicorn", error.name, "pip install 'whet[serve]'"
        ) from error


def build_app(loaded: Loaded, name: str, limits: Limits, address: Address) -> FastAPI:
    """Make the application for a loaded model.

    Args:
        loaded: The model.
        name: What clients call it.
        limits: What is taken.
        address: Where it will listen.
    """
    from whet.serving.app import Served, make_app

    model, tokenizer = loaded.model, loaded.tokenizer
    batch = Batch(make_decoder(model, tokenizer), tokenizer, end_token_ids(model, tokenizer))
    worker = Worker(batch, limits.num_slots, limits.num_waiting)
    served = Served(name, model, tokenizer, worker, limits, loaded.config.data.system)
    own_names = LOOPBACK_NAMES if address.host in LOOPBACK_NAMES else ["*"]
    return make_app(served, address.api_key, own_names)


def listen(address: Address) -> socket.socket:
    """Take the address, before a model is loaded for it.

    Args:
        address: Where.

    Raises:
        InputError: It is taken, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    made = socket.socket(family)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((address.host, address.port))
    except OSError as error:
        made.close()
        place = f"{address.host}:{address.port}"
        raise InputError(
            f"cannot listen there: {error.strerror}", place, "choose another --port or --host"
        ) from error
    return made


def serve(app: Any, place: socket.socket, drain_seconds: int) -> None:
    """Listen until SIGTERM or Ctrl-C, then answer what has begun, and end.

    Args:
        app: Of `build_app`.
        place: Of `listen`; closed at the end.
        drain_seconds: How long requests that have begun may take then.
    """
    import uvicorn

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False,
        timeout_graceful_shutdown=drain_seconds,
    )  # fmt: skip
    # uvicorn ends in good order on SIGTERM, and sends it again to who was there before: to nobody.
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        uvicorn.Server(config).run(sockets=[place])
    finally:
        signal.signal(signal.SIGTERM, before)
        place.close()
