"""Luthier's side of `generate.py`: the embedded engine or a vLLM server of its own, opened as the commands open them.

It also measures what bounds decoding: the bytes of weights that a step reads, and how fast this machine reads memory.
"""

from __future__ import annotations

from luthier import runtime

if __name__ == "__main__":
    runtime.tune_allocator()  # as the command does, and as early

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from turns import Turns

from luthier import config, mesh
from luthier.rollout import opened
from luthier.rollout.chosen import Chosen
from luthier.rollout.engine import Engine, Request, Sampling
from luthier.rollout.local import LocalEngine
from luthier.rollout.opened import Opened

READ_BYTES = 2**30
"""Of the array that bandwidth is measured with: more than any cache holds."""


def device_peak() -> int | None:
    stats = None if mesh.platform() == "cpu" else jax.devices()[0].memory_stats()
    return stats and stats.get("peak_bytes_in_use")


def bandwidth() -> float:
    """Return bytes a second of a program that does nothing but read, the best of some runs."""
    array = jnp.ones((4096, READ_BYTES // 4096 // 4), jnp.float32)
    read = jax.jit(jnp.sum)
    read(array).block_until_ready()
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        read(array).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return array.nbytes / min(seconds)


def facts(model: Opened) -> dict[str, Any]:
    """What the parent prints beside the times. The embedding counts once: it is the head, and only rows are looked up.

    Raises ValueError for a model whose head is another matrix than its embedding, which this would count wrong.
    """
    if not model.source.config["tie_word_embeddings"]:
        raise ValueError("weights read in a step are counted for a model whose head is its embedding")
    return {
        "versions": {"jax": jax.__version__, "python": sys.version.split()[0]},
        "device": model.mesh.devices.flat[0].device_kind,
        "dtype": jnp.dtype(model.compute.dtype).name,
        "weight_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)),
        "bandwidth": bandwidth(),
    }


def main() -> None:
    turns = Turns(device_peak)
    plan = json.loads(Path(sys.argv[1]).read_text())
    keys = {
        "load_parameters_path": plan["model"],
        "dtype": plan["dtype"],
        "max_target_length": plan["length"],
        "max_num_seqs": plan["rows"],
        "max_new_tokens": plan["length"] - 1,
        "prompt": "given as tokens",
        **plan["engine"],
    }
    resolved = config.resolve("generate", [f"{key}={value}" for key, value in keys.items()], {})
    with Chosen(resolved, print) as chosen, contextlib.ExitStack() as stack:
        model = opened.open_model(resolved, lambda source, words: chosen.look(source, words, [[0] * plan["prompt"]]))
        stack.enter_context(mesh.use(model.mesh))
        turns.facts |= facts(model)
        engine = chosen.open(model)
        if isinstance(engine, LocalEngine):
            engine.reserve()
        while True:
            generate(engine, plan, turns.before_step())


def generate(engine: Engine, plan: dict[str, Any], job: dict[str, Any]) -> None:
    sampling = Sampling(temperature=plan["temperature"], max_new_tokens=job["new"])
    completions = list(engine.generate([Request(prompt, job["samples"], sampling) for prompt in job["prompts"]]))
    lengths = [len(completion.tokens_T) for completion in completions]
    if lengths != [job["new"]] * len(job["prompts"]) * job["samples"]:
        raise ValueError(
            f"{len(job['prompts'])} x {job['samples']} x {job['new']} tokens wanted, lengths {lengths} came"
        )


if __name__ == "__main__":
    main()
