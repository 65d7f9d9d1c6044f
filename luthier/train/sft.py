"""Supervised fine-tuning, whole: from a checkpoint and a dataset to a trained checkpoint.

``run`` reads top to bottom: what a user can get wrong is checked in the order of what it costs to check, rows are
tokenised, the step is compiled while weights are read, then comes the loop.

Left out on purpose: sampling from the model while it trains.
"""

from __future__ import annotations

if __name__ == "__main__":  # the command line is parsed before anything heavy is imported
    import sys

    from luthier.cli import main

    raise SystemExit(main(["sft", *sys.argv[1:]]))

import contextlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from luthier import mesh as mesh_lib
from luthier import runtime
from luthier.algorithms.sft import sft
from luthier.checkpoint import source as source_lib
from luthier.checkpoint import tokenizer as tokenizer_lib
from luthier.checkpoint.state import Checkpoints
from luthier.config import SftConfig
from luthier.data.source import Batches, TokenRows, batches
from luthier.data.source import load as load_rows
from luthier.errors import RunError
from luthier.model.model import Model
from luthier.model.param import Tree
from luthier.train import display, folder, metrics, optimizer, report, step
from luthier.train.evaluation import evaluate
from luthier.train.job import Job, Programs, compile_steps, load_state, prepare
from luthier.train.log import Log
from luthier.train.profile import Profile
from luthier.train.signals import Stop


@dataclass(frozen=True)
class Run:
    """A job with its rows, its programs and its place in the world."""

    job: Job
    rows: TokenRows
    held_out: TokenRows | None
    total: int
    programs: Programs
    place: Path
    console: Console
    stop: Stop


def run(config: SftConfig) -> None:
    """Run ``luthier sft``.

    Raises UserError for what the user can mend, RunError where training cannot go on, and SystemExit with 143 or 130
    after saving where a signal stopped it.
    """
    console = display.console()
    source = source_lib.resolve(config)
    place = folder.check(config)
    model = Model.from_hf(source.config, source.name)
    runtime.start(config)
    mesh = mesh_lib.make(config)
    with Stop() as stop, mesh_lib.use(mesh), ThreadPoolExecutor(1) as background:
        job = prepare(config, source, model, mesh)
        tokenizer = tokenizer_lib.load(source, config.tokenizer_path, config.hf_access_token)
        rows, held_out = load_rows(config, tokenizer)
        for split in (rows, held_out):
            if split is not None:
                split.check_vocabulary(model.config.vocab_size)
        total = total_steps(job, len(rows))
        folder.open_(config)
        report.header(console, job, rows, held_out, total, place, tokenizer)
        # Not sooner: compiling cannot be broken off, and nothing that a user mends should wait for it.
        programs = compile_steps(job, sft, background)
        this = Run(job, rows, held_out, total, programs, place, console, stop)
        with _checkpoints(config, place) as checkpoints, _out_of_memory(config):
            state, data_state = load_state(job, checkpoints)
            state, evaluations = train(this, checkpoints, state, data_state)
        report.export(job, state.params, tokenizer, place / "model")
        report.summary(console, place, evaluations)


def train(
    this: Run, checkpoints: Checkpoints | None, state: step.TrainState, data_state: dict[str, Any] | None
) -> tuple[step.TrainState, report.Evaluations]:
    """Take the steps that are left from ``state``; return the last state and the evaluations by step."""
    config, job, done = this.job.config, this.job, int(state.step)
    rate = optimizer.schedule(config, this.total)
    loader = _batches(job, this.rows, epochs=_epochs(this), shuffle=config.enable_data_shuffling)
    if data_state is not None:
        loader.set_state(data_state)
        this.console.print(f"Going on after step {done} of {this.total}.")
    evaluations: report.Evaluations = {}
    if done >= this.total:
        return state, evaluations
    profile = Profile(config, this.place / "profile", done)
    with metrics.Writer(this.place, done) as writer, display.Steps(this.console, this.total, done) as shown:
        log = Log(writer, shown, lambda rows: _names(this.rows, rows), period=config.log_period, **report.speeds(job))
        _look(this, log, evaluations, done, state.params)
        advance = this.programs.train.result()
        log.restart_clock()
        this.stop.armed = True
        for number in range(done + 1, this.total + 1):
            profile.before(number)
            item = next(loader)
            batch = step.place(item["batch"], job.mesh, accumulate=config.gradient_accumulation_steps)
            learning_rate = rate(number - 1)
            state, values = advance(state, batch, np.float32(learning_rate))
            log.push(number, values, item["rows"], learning_rate)
            last = number == this.total or this.stop.requested is not None
            if checkpoints is not None and (last or number % config.checkpoint_period == 0):
                log.flush()  # raises where the step is not finite: it must not be saved
                checkpoints.save(number, state, loader.get_state())
                log.restart_clock()
            if this.stop.requested is not None:
                log.flush()
                _leave(this, number, checkpoints is not None)
            if last or (config.eval_interval > 0 and number % config.eval_interval == 0):
                log.flush()
                _look(this, log, evaluations, number, state.params)
        profile.close()
    loader.close()
    return state, evaluations


def total_steps(job: Job, rows: int) -> int:
    """Return the number of steps: ``steps`` or what ``num_epoch`` gives, whichever ends first."""
    steps, epochs = job.config.steps, job.config.num_epoch
    if epochs is None and steps != -1:
        return steps
    in_epochs = math.ceil(math.ceil((epochs or 1.0) * rows) / job.step_rows)
    return in_epochs if steps == -1 else min(steps, in_epochs)


def _look(this: Run, log: Log, evaluations: report.Evaluations, number: int, params: Tree) -> None:
    """Evaluate on the held-out rows, if there are any."""
    if this.held_out is None or this.programs.evaluate is None:
        return
    loader = _batches(this.job, this.held_out, epochs=1.0, shuffle=False, accumulate=1)
    placed = (step.place(item["batch"], this.job.mesh) for item in loader)
    evaluations[number] = evaluate(this.programs.evaluate.result(), params, placed, this.job.config.eval_steps)
    log.evaluation(number, evaluations[number])


def _epochs(this: Run) -> float:
    """Return the passes over the rows: as asked for, or enough for the number of steps."""
    config = this.job.config
    if config.num_epoch is not None or config.steps == -1:
        return config.num_epoch or 1.0
    return math.ceil(this.total * this.job.step_rows / len(this.rows))


def _batches(job: Job, rows: TokenRows, *, epochs: float, shuffle: bool, accumulate: int | None = None) -> Batches:
    accumulate = accumulate or job.config.gradient_accumulation_steps
    return batches(
        rows.packed,
        batch_size=job.batch_rows * accumulate // jax.process_count(),
        seed=job.config.seed,
        shuffle=shuffle,
        num_epochs=epochs,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        worker_count=job.config.grain_worker_count,
    )


def _leave(this: Run, number: int, saved: bool) -> None:
    """End a run that a signal stopped, after its checkpoint (written on the way out) was started."""
    assert this.stop.requested is not None
    after = "The same command goes on from there." if saved else "Nothing is saved: enable_checkpointing is off."
    this.console.print(f"Stopped by {this.stop.requested.name} after step {number}. {after}")
    raise SystemExit(this.stop.exit_code)


def _names(rows: TokenRows, batch_rows: Any) -> str:
    places = [place for row in batch_rows.tolist() if row >= 0 for place in rows.places(row)]
    return ", ".join(places[:8]) + (f" and {len(places) - 8} more" if len(places) > 8 else "")


def _checkpoints(config: SftConfig, place: Path) -> contextlib.AbstractContextManager[Checkpoints | None]:
    if not config.enable_checkpointing:
        return contextlib.nullcontext()
    return Checkpoints(
        place / "checkpoints", keep=config.max_num_checkpoints_to_keep, asynchronous=config.async_checkpointing
    )


@contextlib.contextmanager
def _out_of_memory(config: SftConfig) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise RunError(
            f"out of device memory with per_device_batch_size={config.per_device_batch_size}, max_target_length="
            f"{config.max_target_length}, remat_policy={config.remat_policy}. Lower the batch size (and raise "
            f"gradient_accumulation_steps), or set remat_policy=full. ({str(error).splitlines()[0]})"
        ) from None
