"""The words around a run: the header before it, the model it saves, the summary after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from luthier import keys
from luthier.checkpoint import huggingface, peft
from luthier.checkpoint.card import model_card
from luthier.config import SftConfig
from luthier.data.chat import prompt_rendering
from luthier.data.preview import preview
from luthier.data.source import TokenRows
from luthier.memory import GIB, available, peak_resident
from luthier.model import cost, param
from luthier.train import display, memory, metrics
from luthier.train.job import Job, step_rows
from luthier.train.tuning import Base, Tuning

Evaluations = dict[int, dict[str, float]]


def header(
    console: Console,
    job: Job[SftConfig],
    plan: memory.Plan,
    rows: TokenRows,
    held_out: TokenRows | None,
    total: int,
    place: Path,
    tokenizer: Any,
) -> None:
    """Print what is about to happen, and one example with its trained tokens marked."""
    config = job.config
    free, needed = available(job.mesh), plan.total(config.per_device_batch_size)
    lines = {
        "model": f"{job.source.name} ({job.model.config.num_hidden_layers} layers)",
        "parameters": parameters(job),
        "devices": devices(job.mesh),
        "data": rows.report.summary(),
    }
    if held_out is not None:
        lines["held out"] = held_out.report.summary()
    lines |= {
        "step": f"{step_rows(job)} rows x {config.max_target_length} = "
        f"{step_rows(job) * config.max_target_length:,} tokens",
        "training": f"{total} steps of {config.opt_type}, learning rate {config.learning_rate:g} "
        f"({config.lr_schedule_type})",
        "memory": f"about {needed / GIB:.1f} GiB a device expected" + (f", {free / GIB:.1f} GiB free" if free else ""),
        "output": str(place),
    }
    lines |= left_out(job)
    display.table(console, "luthier sft", lines)
    if not config.scan_layers:
        console.print("scan_layers=false is accepted and changes nothing: layers are always stacked and scanned.")
    for split in (rows, held_out):
        for warning in split.report.warnings if split else ():
            display.warn(console, warning)
    positions = job.source.context_length or config.max_target_length
    if config.max_target_length > positions:
        words = f"max_target_length={config.max_target_length} is over the {positions} positions that the model knows."
        display.warn(console, words)
    console.print("\n[bold]First example[/bold], trained tokens between ⟦ and ⟧")
    console.print(preview(tokenizer, rows.example(0)), end="\n\n")


def parameters(job: Job[Any]) -> str:
    """Return how many weights there are, how many of them are trained, and in which types."""
    tuning, computed = job.tuning, job.compute.described
    count = display.quantity(param.count(job.model.spec))
    if tuning.adapter is None:
        return f"{count}, all trained, {jnp.dtype(tuning.weight_dtype).name}; computed in {computed}"
    size = tuning.base_bytes(job.mesh) / GIB
    kept = f"{tuning.quantization or jnp.dtype(tuning.dtype).name}, {size:.2f} GiB a device"
    trained = display.quantity(param.count(tuning.spec))
    return f"{count} that stay ({kept}), {trained} trained (an adapter of rank {tuning.adapter.rank}); in {computed}"


def left_out(job: Job[Any]) -> dict[str, str]:
    """Return the line that says what of the checkpoint the model leaves out, if anything."""
    words = huggingface.left_out(job.source, job.model.spec, job.model.config.ignored)
    return {"left out": f"{words}: no part of this model, and saved as they are"} if words else {}


def compiled(console: Console, program: Any) -> None:
    """Print the memory that a compiled step (``jax.stages.Compiled``) takes, where the backend says."""
    size = memory.of_program(program)
    if size is not None:
        console.print(f"The compiled step takes {size / GIB:.1f} GiB on each device.")


def result(tuning: Tuning, place: Path) -> Path:
    """Return the folder of what a run in ``place`` has trained."""
    return place / ("model" if tuning.adapter is None else "adapter")


def export(job: Job, command: str, base: Base | None, trained: param.Tree, tokenizer: Any, place: Path) -> None:
    """Save what ``command`` trained, with a card of the keys that were set: a model as Transformers reads it, or an
    adapter as PEFT does.
    """
    config, folder = job.config, result(job.tuning, place)
    set_ = keys.saved(config, defaults=False)
    words: dict[str, Any] = {
        "chat_template": prompt_rendering(config, tokenizer).template,
        "card": model_card(job.source, command, config.hf_path, set_),
    }
    if base is None or job.tuning.adapter is None:
        huggingface.save(folder, trained, job.model.spec, job.source, tokenizer, dtype=config.save_dtype, **words)
        return
    spec, adapter = job.tuning.spec, job.tuning.adapter
    peft.save(folder, trained, spec, adapter, job.source, tokenizer, origin=base.begun, **words)


def summary(console: Console, place: Path, evaluations: Evaluations, tuning: Tuning) -> None:
    """Print what came of it and where it lies."""
    lines = {}
    if len(evaluations) > 1:
        before, after = evaluations[min(evaluations)], evaluations[max(evaluations)]
        name = "mean_token_accuracy"
        lines["held-out loss"] = f"{before['loss']:.4f} before, {after['loss']:.4f} after"
        lines["held-out token accuracy"] = f"{before[name]:.1%} before, {after[name]:.1%} after"
    lines["peak memory"] = f"{peak_resident() / GIB:.1f} GiB in this process"
    lines["metrics"] = str(place / "metrics.jsonl")
    folder = result(tuning, place)
    lines[folder.name] = str(folder)
    display.table(console, "Done", lines)


def speeds(job: Job[SftConfig]) -> dict[str, Any]:
    """Return what MFU is made of: the FLOPs of a token, and of all devices in a second where that is known."""
    peak = metrics.peak_flops(job.mesh.devices.flat[0].device_kind)
    return {
        "flops_per_token": cost.flops_per_token(
            job.model.config, job.config.max_target_length, frozen=job.tuning.adapter is not None
        ),
        "peak_flops": peak and peak * job.mesh.size,
    }


def devices(mesh: Mesh) -> str:
    """Return the devices of a mesh in words."""
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind}" + (f" ({axes})" if axes else "")
