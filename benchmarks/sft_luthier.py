"""Luthier's side of `sft.py` and `lora.py`: the whole real run, `train.sft.run`, with its compiled step taking turns.

Every step passes through the loop that users run, its reading ahead, its log and its files. Checkpoints are off, as on
the other sides.
"""

from __future__ import annotations

from luthier import runtime

if __name__ == "__main__":
    runtime.tune_allocator()  # as the command does, and as early

import json
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import numpy as np
from turns import Turns

from luthier import config, mesh
from luthier.train import report, sft
from luthier.train.job import Job, Programs


def facts(job: Job) -> dict[str, Any]:
    """What the parent prints beside the times, and what MFU is made of."""
    return {
        "versions": {"jax": jax.__version__, "python": sys.version.split()[0]},
        "device": job.mesh.devices.flat[0].device_kind,
        "dtype": np.dtype(job.compute.dtype).name,
        **report.speeds(job),
    }


def device_peak() -> int | None:
    stats = None if mesh.platform() == "cpu" else jax.devices()[0].memory_stats()
    return stats and stats.get("peak_bytes_in_use")


def in_turns(turns: Turns, programs: Programs) -> Programs:
    """Return the programs with a train step that waits for its turn."""

    checked = False

    def advance(state: Any, batch: Any, rate: Any, base: Any) -> Any:
        nonlocal checked
        if not checked and not np.asarray(batch.segments_BT).all():
            raise ValueError("a batch with padding: the rows were to fill it")
        checked = True
        turns.before_step(lambda: jax.block_until_ready(state))
        return programs.train.result()(state, batch, rate, base)

    advance.memory_analysis = lambda: None  # what a compiled program has, and the run's header asks for
    ready: Future[Any] = Future()
    programs.train.add_done_callback(lambda _: ready.set_result(advance))
    return Programs(ready, None)


def main() -> None:
    turns = Turns(device_peak)
    plan = json.loads(Path(sys.argv[1]).read_text())
    compile_steps = sft.compile_steps

    def compile_in_turns(job: Job, *arguments: Any) -> Programs:
        turns.facts |= facts(job)
        return in_turns(turns, compile_steps(job, *arguments))

    sft.compile_steps = compile_in_turns
    keys = {
        "model_name": plan["model"],
        "load_parameters_path": "random",
        "hf_path": plan["rows"],
        "base_output_directory": plan["output"],
        "per_device_batch_size": plan["batch"],
        "max_target_length": plan["length"],
        "dtype": plan["dtype"],
        "steps": 1_000_000,
        "enable_checkpointing": False,
    }
    if plan["rank"]:
        keys |= {"enable_lora": True, "lora_rank": plan["rank"], "lora_alpha": 2 * plan["rank"]}
        keys |= {"quantization": plan["quantization"]}
    sft.run(config.resolve("sft", [f"{key}={value}" for key, value in keys.items()], {}))


if __name__ == "__main__":
    main()
