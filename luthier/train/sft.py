"""Supervised fine-tuning, whole: from a checkpoint and a dataset to a trained checkpoint.

``run`` reads top to bottom: what a user can get wrong is checked in the order of what it costs to check, rows are
tokenised, the step is compiled while weights are read, then comes the loop.

Left out on purpose: sampling from the model while it trains.
"""

from __future__ import annotations

if __name__ == "__main__":  # the command line is parsed before anything heavy is imported
    from luthier.cli import entry

    entry("sft")

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from luthier import mesh as mesh_lib
from luthier import parting, processes, runtime
from luthier.algorithms.sft import sft
from luthier.checkpoint import source as source_lib
from luthier.checkpoint import tokenizer as tokenizer_lib
from luthier.checkpoint.state import Checkpoints
from luthier.config import SftConfig
from luthier.data.batches import import_reader
from luthier.data.source import Batches, TokenRows, batches
from luthier.data.source import load as load_rows
from luthier.model.model import Model
from luthier.model.param import Tree
from luthier.train import display, folder, metrics, optimizer, report, saving, step
from luthier.train.evaluation import evaluate
from luthier.train.job import Job, Programs, compile_steps, load, plan_memory, prepare, step_rows
from luthier.train.log import Log
from luthier.train.profile import Profile
from luthier.train.signals import EXIT_CODES, Stop
from luthier.train.tuning import Base


@dataclass(frozen=True)
class Run:
    """A job with the weights that stay, its rows, its programs and its place in the world."""

    job: Job[SftConfig]
    base: Base | None
    rows: TokenRows
    held_out: TokenRows | None
    programs: Programs
    place: Path
    console: Console
    stop: Stop


def run(config: SftConfig) -> None:
    """Run ``luthier sft``.

    Raises UserError for what the user can mend, RunError where training cannot go on, and SystemExit with 143 or 130
    after saving where a signal stopped it.
    """
    processes.start(config)
    source = source_lib.resolve(config)
    place = folder.check(config)
    model = Model.from_hf(source.config, source.name)
    runtime.start(config)
    console, mesh = display.console(), mesh_lib.make(config)
    with Stop() as stop, mesh_lib.use(mesh), parting.losses_named(), ThreadPoolExecutor(1) as background:
        job = prepare(config, source, model, mesh)
        plan = plan_memory(job)
        tokenizer = tokenizer_lib.load(source, config.tokenizer_path, config.hf_access_token)
        with display.counting(console, "Tokenising") as counted:
            rows, held_out = load_rows(config, tokenizer, counted)
        _check_rows(model, rows, held_out)
        total = total_steps(job, len(rows))
        processes.by_first(lambda: folder.open_(config))
        report.header(console, job, plan, rows, held_out, total, place, tokenizer)
        with saving.checkpoints(config, place) as checkpoints, saving.out_of_memory(*_memory(config)):
            saving.check_done(checkpoints, total, place)
            saving.check_rows(checkpoints, config, mesh_lib.batch_shards(mesh), place)
            # Not sooner: compiling cannot be broken off, and nothing that a user mends should wait for it.
            import_reader()
            programs = compile_steps(job, sft, background)
            base, state, data_state = load(job, checkpoints)
            this = Run(job, base, rows, held_out, programs, place, console, stop)
            state, evaluations = train(this, checkpoints, state, data_state)
        report.export(job, "sft", base, state.params, tokenizer, place)
        report.summary(console, place, evaluations, job.tuning)


def train(
    this: Run, checkpoints: Checkpoints | None, state: step.TrainState, data_state: Any
) -> tuple[step.TrainState, report.Evaluations]:
    """Take the steps that are left from ``state``; return the last state and the evaluations by step."""
    config, job, done = this.job.config, this.job, int(state.step)
    loader = _batches(job, this.rows, epochs=_epochs(job, len(this.rows)), shuffle=config.enable_data_shuffling)
    if data_state is not None:
        loader.set_state(data_state)
    total = done + len(loader) if config.steps == -1 else min(config.steps, done + len(loader))
    if done:
        this.console.print(f"Going on after step {done} of {total}.")
    rate = optimizer.schedule(config, total)
    profile = Profile(config, this.place / "profile", done + 1)
    with metrics.Writer(this.place, done) as writer, display.Steps(this.console, total, done) as shown:
        log = Log(writer, shown, lambda rows: _names(this.rows, rows), period=config.log_period, **report.speeds(job))
        if done == total:
            return state, writer.evaluations
        _look(this, log, writer.evaluations, done, state.params)
        advance = this.programs.train.result()
        runtime.release_free_memory()
        report.compiled(this.console, advance)
        log.restart_clock()
        this.stop.armed = True
        for number in range(done + 1, total + 1):
            profile.before(number, state)
            item = next(loader)
            batch = step.place(item["batch"], job.mesh, accumulate=config.gradient_accumulation_steps)
            learning_rate = rate(number - 1)
            state, values = advance(state, batch, np.float32(learning_rate), this.base)
            log.push(number, values, item["rows"], learning_rate)
            stopped = this.stop.agreed(late=True)  # asked once: a signal that comes later is for the next step
            last = number == total or stopped is not None
            if checkpoints is not None and (last or number % config.checkpoint_period == 0):
                log.flush()  # raises where the step is not finite: it must not be saved
                checkpoints.save(number, state, dict(loader.get_state()))
                log.restart_clock()
            if stopped is not None:
                log.flush()
                saved = "Nothing is saved" if checkpoints is None else "Saved: the same command goes on"
                this.console.print(f"Stopped by {stopped.name} after step {number}. {saved}.")
                raise SystemExit(EXIT_CODES[stopped])
            if last or (config.eval_interval > 0 and number % config.eval_interval == 0):
                log.flush()
                _look(this, log, writer.evaluations, number, state.params)
        this.stop.armed = False
        profile.close(state)
    stopped = this.stop.agreed()
    if stopped is not None:  # during the last step, which is saved
        raise SystemExit(EXIT_CODES[stopped])
    if profile.due:
        display.warn(this.console, "no trace was written: the run ended within skip_first_n_steps_for_profiler.")
    loader.close()
    return state, writer.evaluations


def total_steps(job: Job[SftConfig], rows: int) -> int:
    """Return the number of steps: ``steps`` or what ``num_epoch`` gives, whichever ends first."""
    in_epochs = math.ceil(math.ceil(_epochs(job, rows) * rows) / step_rows(job))
    return in_epochs if job.config.steps == -1 else min(job.config.steps, in_epochs)


def _look(this: Run, log: Log, evaluations: report.Evaluations, number: int, params: Tree) -> None:
    """Evaluate on the held-out rows, if there are any, and this was not done before the run was resumed."""
    if this.held_out is None or this.programs.evaluate is None or number in evaluations:
        return
    loader = _batches(this.job, this.held_out, epochs=1.0, shuffle=False, accumulate=1)
    placed = (step.place(item["batch"], this.job.mesh) for item in loader)
    program, limit = this.programs.evaluate.result(), this.job.config.eval_steps
    evaluations[number] = evaluate(program, params, placed, limit, this.base)
    log.evaluation(number, evaluations[number])


def _epochs(job: Job[SftConfig], rows: int) -> float:
    """Return the passes over the rows: as asked for, or enough for the number of steps."""
    steps, epochs = job.config.steps, job.config.num_epoch
    if epochs is not None or steps == -1:
        return epochs or 1.0
    return math.ceil(steps * step_rows(job) / rows)


def _batches(
    job: Job[SftConfig], rows: TokenRows, *, epochs: float, shuffle: bool, accumulate: int | None = None
) -> Batches:
    accumulate = accumulate or job.config.gradient_accumulation_steps
    return batches(
        rows.packed,
        batch_size=job.batch_rows * accumulate,
        own=step.own_places(job.mesh, job.batch_rows, accumulate),
        seed=job.config.seed,
        shuffle=shuffle,
        num_epochs=epochs,
        worker_count=job.config.grain_worker_count,
    )


def _check_rows(model: Model, *splits: TokenRows | None) -> None:
    for split in splits:
        if split is not None:
            split.check_vocabulary(model.config.vocab_size)
            processes.check_alike("the tokenised rows", split.packed.fingerprint)


def _names(rows: TokenRows, batch_rows: Any) -> str:
    places = [place for row in batch_rows.tolist() if row >= 0 for place in rows.places(row)]
    return ", ".join(places[:8]) + (f" and {len(places) - 8} more" if len(places) > 8 else "")


def _memory(config: SftConfig) -> tuple[str, str]:
    """Return the settings that decide how much memory a step takes, and what to do about them."""
    return (
        f"per_device_batch_size={config.per_device_batch_size}, max_target_length={config.max_target_length}, "
        f"remat_policy={config.remat_policy}",
        "Lower the batch size (and raise gradient_accumulation_steps), or set remat_policy=full.",
    )
