"""What a run does about its train state and its memory, whatever it trains by."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax

from luthier import processes, remote
from luthier.checkpoint.state import Checkpoints
from luthier.config import SftConfig, TrainKeys
from luthier.errors import RunError, UserError
from luthier.train import display, folder


@contextlib.contextmanager
def checkpoints(config: TrainKeys, place: Path) -> Iterator[Checkpoints | None]:
    """Give the run's checkpoints, or None where none are to be kept; meanwhile a run in a bucket is copied there.

    In a ``gs://`` bucket, Orbax writes them there itself, each process its own part. Raises UserError where several
    processes do not see the same folder.
    """
    warn, url = partial(display.warn, display.console()), folder.url(config)
    direct = url.startswith("gs://")
    with contextlib.ExitStack() as stack:
        if url and processes.is_first():
            stack.enter_context(remote.Mirror(place, url, warn))
            display.console().print(f"This run lies in {url}; {place} is this machine's copy.")
        if not direct:
            _check_shared(place, url)
        yield (
            None
            if not config.enable_checkpointing
            else stack.enter_context(
                Checkpoints(
                    f"{url}/checkpoints" if direct else place / "checkpoints",
                    keep=config.max_num_checkpoints_to_keep,
                    asynchronous=config.async_checkpointing,
                    warn=warn,
                )
            )
        )


def _check_shared(place: Path, url: str) -> None:
    blind = [number for number, sees in enumerate(processes.gather((place / "config.yml").is_file())) if not sees]
    if blind:
        named = f"base_output_directory={url or place.parent}"
        raise UserError(
            f"{named}: of the processes, {', '.join(map(str, blind[:8]))} see nothing of what process 0 wrote to "
            f"{place}. Give a folder that all machines share, or gs://BUCKET/PATH"
            + (", or mount the bucket on all of them." if url else ".")
        )


def check_done(kept: Checkpoints | None, total: int, place: Path) -> None:
    """Raise UserError where the run has gone further than it is now asked to go."""
    done = kept.latest() if kept is not None else None
    if done is not None and done > total:
        raise UserError(
            f"{place}: this run has taken {done} steps, and the command asks for {total}. "
            "Give more steps (or num_epoch), or another run_name."
        )


def check_rows(kept: Checkpoints | None, config: SftConfig, shards: int, place: Path) -> None:
    """Raise UserError where a run that is resumed would take other rows in a step than it was begun with.

    ``shards`` is over how many devices the rows of a batch are split. The message names what keeps the step as it was.
    """
    data = kept.data() if kept is not None else None
    rows, accumulate = config.per_device_batch_size, config.gradient_accumulation_steps
    if data is None or data["batch_size"] == rows * shards * accumulate:
        return
    begun = data["batch_size"]
    if begun % shards:
        fewer = next(count for count in range(shards - 1, 0, -1) if begun % count == 0)
        remedy = f"Split rows over {fewer} devices (the axes data, fsdp and expert; others take the rest)"
    else:
        rows = next(count for count in range(min(rows, begun // shards), 0, -1) if begun // shards % count == 0)
        remedy = f"Set per_device_batch_size={rows} gradient_accumulation_steps={begun // shards // rows}"
    raise UserError(
        f"{place}: begun with {begun} rows in a step, and this command has per_device_batch_size="
        f"{config.per_device_batch_size} x {shards} devices that share them x gradient_accumulation_steps={accumulate} "
        f"= {config.per_device_batch_size * shards * accumulate}. {remedy}, or another run_name."
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
