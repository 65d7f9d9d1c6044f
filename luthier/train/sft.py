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
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from luthier import __version__, runtime
from luthier import mesh as mesh_lib
from luthier.algorithms.sft import sft
from luthier.checkpoint import huggingface, tokenizer as tokenizer_lib
from luthier.checkpoint import source as source_lib
from luthier.checkpoint.state import Checkpoints
from luthier.config import SftConfig
from luthier.data import source as data
from luthier.data.chat import preview
from luthier.errors import RunError
from luthier.model import param
from luthier.model.compute import Compute, fast_dtype
from luthier.model.model import Model
from luthier.train import display, folder, memory, metrics, optimizer, step
from luthier.train.signals import Stop
from luthier.types import Batch


@dataclass(frozen=True)
class Job:
    """What a run is made of once its keys were found good; no weights yet."""

    config: SftConfig
    source: source_lib.Source
    model: Model
    mesh: Mesh
    compute: Compute
    optimizer: optax.GradientTransformation
    rows_per_step: int

    @property
    def abstract(self) -> step.TrainState:
        """The train state's shapes and shardings."""
        return step.abstract_state(self.optimizer, self.model.spec, jnp.dtype(self.config.weight_dtype), self.mesh)


def run(config: SftConfig) -> None:
    """Run ``luthier sft``.

    Raises UserError for what the user can mend, RunError where training cannot go on, and SystemExit with 143 or 130
    after saving where a signal stopped it.
    """
    console = display.console()
    source = source_lib.resolve(config)
    place = folder.check(config)
    model = Model.from_hf(source.hf_config, source.name)
    runtime.start(config)
    mesh = mesh_lib.make(config)
    with mesh_lib.use(mesh), Stop() as stop, ThreadPoolExecutor(1) as background:
        job = _prepare(config, source, model, mesh)
        tokenizer = tokenizer_lib.load(source, config.tokenizer_path, config.hf_access_token)
        programs = _compile(job, background)
        rows, held_out = data.load(config, tokenizer)
        total = _total_steps(config, len(rows), job.rows_per_step)
        place = folder.open_(config)
        _header(console, job, rows, held_out, total, place)
        console.print(preview(tokenizer, rows.example(0)))
        checkpoints = Checkpoints(place / "checkpoints", config)
        state, data_state, done = _load_state(console, job, checkpoints)
        training = _Training(job, console, place, checkpoints, programs, stop)
        state = training.run(state, rows, held_out, data_state, done, total)
        huggingface.save(
            place / "model", state.params, model.spec, source, tokenizer, dtype=config.save_dtype, card=_card(job, rows)
        )
        _summary(console, job, place, training.evaluations)
