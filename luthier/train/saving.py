"""What a run does about its train state and its memory, whatever it trains by."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax

from luthier.checkpoint.state import Checkpoints
from luthier.config import TrainKeys
from luthier.errors import RunError, UserError


def checkpoints(config: TrainKeys, place: Path) -> contextlib.AbstractContextManager[Checkpoints | None]:
    """Return the run's checkpoints, or None where none are to be kept."""
    if not config.enable_checkpointing:
        return contextlib.nullcontext()
    return Checkpoints(
        place / "checkpoints", keep=config.max_num_checkpoints_to_keep, asynchronous=config.async_checkpointing
    )


def check_done(kept: Checkpoints | None, total: int, place: Path) -> None:
    """Raise UserError where the run has gone further than it is now asked to go."""
    done = kept.latest() if kept is not None else None
    if done is not None and done > total:
        raise UserError(
            f"{place}: this run has taken {done} steps, and the command asks for {total}. "
            "Give more steps (or num_epoch), or another run_name."
        )


@contextlib.contextmanager
def out_of_memory(settings: str, remedy: str) -> Iterator[None]:
    """Turn the device's lack of memory into a RunError that names the ``settings`` that decide, and a remedy."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise RunError(f"out of device memory with {settings}. {remedy} ({str(error).splitlines()[0]})") from None
