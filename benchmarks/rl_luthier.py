"""Luthier's side of `rl.py`: the whole real run, `train.rl.run`, whose loop waits for its turn before each step.

Every step passes through the loop that users run, its reward workers, its log and its `rollouts/`. Checkpoints are off,
as on the other side. With vLLM as the engine, its server is one that the run starts, and new weights are sent to it
after each step.
"""

from __future__ import annotations

from luthier import runtime

if __name__ == "__main__":
    runtime.tune_allocator()  # as the command does, and as early

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rl_rewards import even_tokens
from turns import Turns

from luthier import config, mesh
from luthier.train import rl
from luthier.train.feed import InTurn
from luthier.train.feed_apart import ApartInTurn
from luthier.train.sampler import Collected


def device_peak() -> int | None:
    stats = None if mesh.platform() == "cpu" else jax.devices()[0].memory_stats()
    return stats and stats.get("peak_bytes_in_use")


class Waiting(InTurn):
    """Waits before each step, and tells sampling, rewards, training and the way of new weights apart."""

    turns: Turns
    new: int
    dtype: str
    _params: Any = None
    _marked: float | None = None

    def next(self) -> Collected:
        """Take the turn, then the step's completions."""
        jax.block_until_ready(self._params)
        self._count("training", time.perf_counter() - (self._marked or time.perf_counter()))
        self.turns.before_step()
        collected = super().next()
        self._marked = time.perf_counter()
        for part, seconds in collected.seconds.items():
            self._count(part, seconds)
        lengths = {len(episode.tokens_T) for group in collected.groups for episode in group.episodes}
        if lengths != {self.new}:
            raise ValueError(f"completions of {self.new} tokens wanted, lengths {lengths} came")
        return collected

    def publish(self, trained: Any, version: int, *, now: bool = False) -> None:
        """Keep hold of the weights, to know when they are there."""
        self._params = trained
        super().publish(trained, version, now=now)

    def _count(self, part: str, seconds: float) -> None:
        self.turns.parts[part] = self.turns.parts.get(part, 0.0) + seconds


class WaitingApart(Waiting, ApartInTurn):
    """The same of an engine that weights are sent to."""

    def publish(self, trained: Any, version: int, *, now: bool = False) -> None:
        """Send the weights, once they are there."""
        jax.block_until_ready(trained)
        begun = time.perf_counter()
        self._count("training", begun - (self._marked or begun))
        super().publish(trained, version, now=now)
        self._marked = time.perf_counter()
        self._count("sync", self._marked - begun)
        sizes = (leaf.size * jnp.dtype(self.dtype).itemsize for leaf in jax.tree.leaves(trained))
        self._count("sync_bytes", sum(sizes))


def main() -> None:
    Waiting.turns = Turns(device_peak)
    plan = json.loads(Path(sys.argv[1]).read_text())
    Waiting.new, Waiting.dtype = plan["new"], plan["dtype"]
    rl.InTurn, rl.ApartInTurn = Waiting, WaitingApart  # type: ignore[misc]
    keys = {
        "model_name": plan["model"],
        "load_parameters_path": plan["model"],
        "hf_path": plan["rows"],
        "base_output_directory": plan["output"],
        "reward_functions": json.dumps([f"{Path(__file__).with_name('rl_rewards.py')}:{even_tokens.__name__}"]),
        "prompts_per_step": plan["prompts"],
        "num_generations": plan["samples"],
        "max_new_tokens": plan["new"],
        "ignore_eos": True,
        "learning_rate": plan["learning_rate"],
        "dtype": plan["dtype"],
        "steps": 1_000_000,
        "num_epoch": 1_000_000,
        "enable_checkpointing": False,
        "log_completions_steps": 0,
        **plan["engine"],
    }
    resolved = config.resolve("rl", [f"{key}={value}" for key, value in keys.items()], {})
    Waiting.turns.facts |= {
        "versions": {"jax": jax.__version__, "python": sys.version.split()[0]},
        "dtype": plan["dtype"],
    }
    rl.run(resolved)


if __name__ == "__main__":
    main()
