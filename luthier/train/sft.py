"""Supervised fine-tuning, whole: from a checkpoint and a dataset to a trained checkpoint.

``run`` reads top to bottom: what a user can get wrong is checked in the order of what it costs to check, the step is
compiled while rows are tokenised and weights are read, then comes the loop.

Left out on purpose: sampling from the model while it trains.
"""

from __future__ import annotations

if __name__ == "__main__":  # the command line is parsed before anything heavy is imported
    import sys

    from luthier.cli import main

    raise SystemExit(main(["sft", *sys.argv[1:]]))

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from rich.console import Console

from luthier import mesh as mesh_lib
from luthier import runtime
from luthier.algorithms.sft import sft
from luthier.checkpoint import huggingface
from luthier.checkpoint import source as source_lib
from luthier.checkpoint import tokenizer as tokenizer_lib
from luthier.checkpoint.card import model_card
from luthier.checkpoint.source import Source
from luthier.checkpoint.state import Checkpoints
from luthier.config import SftConfig
from luthier.data.preview import preview
from luthier.data.source import TokenRows, batches
from luthier.data.source import load as load_rows
from luthier.model import param
from luthier.model.compute import Compute, fast_dtype
from luthier.model.model import Model
from luthier.train import display, folder, memory, metrics, optimizer, step
from luthier.train.evaluation import evaluate
from luthier.train.log import Log
from luthier.train.profile import Profile
from luthier.train.signals import Stop
from luthier.types import Batch

Evaluations = dict[int, dict[str, float]]


@dataclass(frozen=True)
class Job:
    """What a run is made of once its keys were found good; everything but rows and weights."""

    config: SftConfig
    source: Source
    model: Model
    mesh: Mesh
    compute: Compute
    optimizer: optax.GradientTransformation

    @property
    def batch_rows(self) -> int:
        """Rows of a micro-batch over all devices."""
        return self.config.per_device_batch_size * mesh_lib.batch_shards(self.mesh)

    @property
    def step_rows(self) -> int:
        """Rows of a whole step."""
        return self.batch_rows * self.config.gradient_accumulation_steps

    @property
    def abstract_state(self) -> step.TrainState:
        """The train state's shapes, types and shardings."""
        return step.abstract_state(self.optimizer, self.model.spec, jnp.dtype(self.config.weight_dtype), self.mesh)

    @property
    def holds_out(self) -> bool:
        """Whether there are held-out rows, and they are to be looked at."""
        keys = self.config
        return keys.eval_interval != 0 and bool(keys.hf_eval_path or keys.hf_eval_split or keys.eval_fraction)


@dataclass(frozen=True)
class Programs:
    """The compiled steps, or the promise of them."""

    train: Future[Callable[..., Any]]
    evaluate: Future[Callable[..., Any]] | None


def run(config: SftConfig) -> None:
    """Run ``luthier sft``.

    Raises UserError for what the user can mend, RunError where training cannot go on, and SystemExit with 143 or 130
    after saving where a signal stopped it.
    """
    console = display.console()
    source = source_lib.resolve(config)
    folder.check(config)
    model = Model.from_hf(source.config, source.name)
    runtime.start(config)
    mesh = mesh_lib.make(config)
    with Stop() as stop, mesh_lib.use(mesh), ThreadPoolExecutor(1) as background:
        job = prepare(config, source, model, mesh)
        tokenizer = tokenizer_lib.load(source, config.tokenizer_path, config.hf_access_token)
        programs = compile_steps(job, background)
        rows, held_out = load_rows(config, tokenizer)
        total = total_steps(job, len(rows))
        place = folder.open_(config)
        _header(console, job, rows, held_out, total, place)
        console.print("[bold]First example[/bold], trained tokens between ⟦ and ⟧")
        console.print(preview(tokenizer, rows.example(0)), end="\n\n")
        keep = config.max_num_checkpoints_to_keep
        with Checkpoints(place / "checkpoints", keep=keep, asynchronous=config.async_checkpointing) as checkpoints:
            state, data_state = load_state(job, checkpoints)
            done = int(state.step)
            if done:
                console.print(f"Going on after step {done} from {place / 'checkpoints'}.")
            state, evaluations = train(
                job, console, place, checkpoints, programs, stop, state, rows, held_out, data_state, total
            )
        _export(job, state.params, tokenizer, place / "model")
        _summary(console, job, place, evaluations)


def prepare(config: SftConfig, source: Source, model: Model, mesh: Mesh) -> Job:
    """Return the job, after checking that headers fit the model and that the batch fits the memory."""
    dtype = fast_dtype() if config.dtype == "auto" else jnp.dtype(config.dtype)
    compute = Compute(dtype, config.attention, config.remat_policy)
    if source.kind != "random":
        huggingface.check(source, model.spec)
    memory.check(config, memory.estimate(config, model, mesh, compute), memory.available(mesh))
    return Job(config, source, model, mesh, compute, optimizer.make(config, model.spec))


def compile_steps(job: Job, background: ThreadPoolExecutor) -> Programs:
    """Start compiling the steps from shapes alone, the first one needed first."""
    state, length = job.abstract_state, job.config.max_target_length

    def batch(*rows: int) -> Batch:
        sharding = step.batch_sharding(job.mesh, accumulated=len(rows) > 1)
        ids = jax.ShapeDtypeStruct((*rows, length), jnp.int32, sharding=sharding)
        mask = jax.ShapeDtypeStruct((*rows, length), jnp.bool, sharding=sharding)
        return Batch(ids, ids, ids, mask)

    def evaluation() -> Callable[..., Any]:
        with mesh_lib.use(job.mesh):
            program = step.make_eval_step(job.model, sft, job.compute)
            return program.lower(state.params, batch(job.batch_rows)).compile()

    def training() -> Callable[..., Any]:
        with mesh_lib.use(job.mesh):
            program = step.make_train_step(job.model, sft, job.optimizer, job.compute)
            rate = jax.ShapeDtypeStruct((), jnp.float32)
            return program.lower(state, batch(job.config.gradient_accumulation_steps, job.batch_rows), rate).compile()

    first = background.submit(evaluation) if job.holds_out else None
    return Programs(background.submit(training), first)


def total_steps(job: Job, rows: int) -> int:
    """Return the number of steps: ``steps`` or what ``num_epoch`` gives, whichever ends first."""
    config = job.config
    epochs = config.num_epoch or (1.0 if config.steps == -1 else math.inf)
    limits = [config.steps] if config.steps != -1 else []
    if math.isfinite(epochs):
        limits.append(math.ceil(math.ceil(epochs * rows) / job.step_rows))
    return max(min(limits), 1)


def load_state(job: Job, checkpoints: Checkpoints) -> tuple[step.TrainState, dict[str, Any] | None]:
    """Return the train state and the data's: the last checkpoint's, or that of a start."""
    if checkpoints.latest() is not None:
        return checkpoints.restore(job.abstract_state)
    dtype = jnp.dtype(job.config.weight_dtype)
    if job.source.kind == "random":
        params = param.initialise(job.model.spec, jax.random.key(job.config.seed), dtype, job.mesh)
    else:
        params = huggingface.load(job.source, job.model.spec, dtype, job.mesh)
    return step.init_state(params, job.optimizer, job.model.spec, job.mesh), None


def train(
    job: Job,
    console: Console,
    place: Path,
    checkpoints: Checkpoints,
    programs: Programs,
    stop: Stop,
    state: step.TrainState,
    rows: TokenRows,
    held_out: TokenRows | None,
    data_state: dict[str, Any] | None,
    total: int,
) -> tuple[step.TrainState, Evaluations]:
    """Train from ``state`` to step ``total``; return the last state and the evaluations by step."""
    config, done = job.config, int(state.step)
    rate = optimizer.schedule(config, total)
    loader = _batches(job, rows, train=True)
    if data_state is not None:
        loader.set_state(data_state)
    evaluations: Evaluations = {}
    profile = Profile(config, place / "profile", done)
    with metrics.Writer(place, done) as writer, display.Steps(console, total, done) as shown:
        log = Log(writer, shown, lambda batch: _names(rows, batch), **_speeds(job), period=config.log_period)

        def look(number: int) -> None:
            if held_out is not None and programs.evaluate is not None:
                evaluations[number] = _evaluate(job, programs.evaluate.result(), state.params, held_out)
                log.evaluation(number, evaluations[number])

        if done < total:
            look(done)
        advance = programs.train.result()
        stop.armed = True
        log.restart_clock()
        for number in range(done + 1, total + 1):
            profile.before(number)
            item = next(loader)
            batch = step.place(item["batch"], job.mesh, accumulate=config.gradient_accumulation_steps)
            learning_rate = rate(number - 1)
            state, values = advance(state, batch, np.float32(learning_rate))
            log.push(number, values, item["rows"], learning_rate)
            last = number == total or stop.requested is not None
            if config.enable_checkpointing and (last or number % config.checkpoint_period == 0):
                log.flush()  # a step that is not finite must not be saved
                checkpoints.save(number, state, loader.get_state())
                log.restart_clock()
            if stop.requested is not None:
                log.flush()
                profile.close()
                checkpoints.close()
                console.print(f"Stopped by {stop.requested.name} after step {number}. The same command goes on.")
                raise SystemExit(stop.exit_code)
            if number == total or (config.eval_interval > 0 and number % config.eval_interval == 0):
                log.flush()
                look(number)
        profile.close()
    loader.close()
    return state, evaluations


def _batches(job: Job, rows: TokenRows, *, train: bool) -> Any:
    processes = jax.process_count()
    return batches(
        rows.packed,
        batch_size=(job.step_rows if train else job.batch_rows) // processes,
        seed=job.config.seed,
        shuffle=train and job.config.enable_data_shuffling,
        num_epochs=None if train else 1.0,
        process_index=jax.process_index(),
        process_count=processes,
        worker_count=job.config.grain_worker_count,
    )


def _evaluate(job: Job, program: Callable[..., Any], params: param.Tree, held_out: TokenRows) -> dict[str, float]:
    placed = (step.place(item["batch"], job.mesh) for item in _batches(job, held_out, train=False))
    return evaluate(program, params, placed, job.config.eval_steps)


def _speeds(job: Job) -> dict[str, float | None]:
    """Return what MFU is made of."""
    c = job.model.config
    embedding = 0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size
    flops = metrics.flops_per_token(
        param.count(job.model.spec) - embedding,
        c.num_hidden_layers,
        c.num_attention_heads,
        c.head_dim,
        job.config.max_target_length,
    )
    peak = metrics.peak_flops(job.mesh.devices.flat[0].device_kind)
    return {"flops_per_token": flops, "peak_flops": peak and peak * job.mesh.size}


def _names(rows: TokenRows, batch_rows: Any) -> str:
    places = [place for row in batch_rows.tolist() if row >= 0 for place in rows.places(row)]
    more = f" and {len(places) - 8} more" if len(places) > 8 else ""
    return ", ".join(places[:8]) + more


def _export(job: Job, params: param.Tree, tokenizer: Any, place: Path) -> None:
    config = job.config
    changed = {name: value for name, value in config.model_dump(exclude_defaults=True).items() if name != "hf_access_token"}
    huggingface.save(
        place,
        params,
        job.model.spec,
        job.source,
        tokenizer,
        dtype=config.save_dtype,
        chat_template=config.chat_template,
        card=model_card(job.source, "sft", config.hf_path, changed),
    )


def _header(
    console: Console, job: Job, rows: TokenRows, held_out: TokenRows | None, total: int, place: Path
) -> None:
    config, count = job.config, display.quantity(param.count(job.model.spec))
    shape = ", ".join(f"{axis} {size}" for axis, size in job.mesh.shape.items() if size > 1)
    kind = job.mesh.devices.flat[0].device_kind
    plan = memory.estimate(config, job.model, job.mesh, job.compute).total(config.per_device_batch_size)
    free = memory.available(job.mesh)
    lines = {
        "model": f"{job.source.name} ({job.model.config.num_hidden_layers} layers)",
        "parameters": f"{count}, all trained, {config.weight_dtype}; computed in {jnp.dtype(job.compute.dtype).name}",
        "devices": f"{job.mesh.size} x {kind}" + (f" ({shape})" if shape else ""),
        "data": rows.report.summary(),
        "step": f"{job.step_rows} rows x {config.max_target_length} = "
        f"{job.step_rows * config.max_target_length:,} tokens; {total} steps; {config.opt_type}, "
        f"learning rate {config.learning_rate:g} ({config.lr_schedule_type})",
        "memory": f"about {plan / memory.GIB:.1f} GiB a device expected"
        + (f", {free / memory.GIB:.1f} GiB free" if free else ""),
        "output": str(place),
    }
    if held_out is not None:
        lines["held out"] = held_out.report.summary()
    display.table(console, "luthier sft", lines)
    if not config.scan_layers:
        console.print("scan_layers=false: accepted, and without effect; layers are always stacked and scanned.")
    for report in (rows.report, held_out.report if held_out is not None else None):
        for warning in report.warnings if report else ():
            console.print(f"[yellow]Warning:[/yellow] {warning}")


def _summary(console: Console, job: Job, place: Path, evaluations: Evaluations) -> None:
    lines = {}
    if len(evaluations) > 1:
        before, after = evaluations[min(evaluations)], evaluations[max(evaluations)]
        lines["held-out loss"] = f"{before['loss']:.4f} before, {after['loss']:.4f} after"
        name = "mean_token_accuracy"
        lines["held-out token accuracy"] = f"{before[name]:.1%} before, {after[name]:.1%} after"
    lines["peak memory"] = f"{memory.peak_resident() / memory.GIB:.1f} GiB in this process"
    lines["metrics"] = str(place / "metrics.jsonl")
    lines["model"] = str(place / "model")
    display.table(console, "Done", lines)
