"""One process of several that save a state, or restore it: for test_state_processes.py.

python state_process.py FOLDER save|restore ADDRESS COUNT NUMBER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from luthier.checkpoint.state import Checkpoints


def main(place: str, what: str, address: str, count: str, number: str) -> None:
    if int(count) > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, int(count), int(number))
    mesh = Mesh(np.array(jax.devices()), ("all",))
    values = {"w": np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32), "n": np.float32(3)}
    over = {"w": NamedSharding(mesh, P("all")), "n": NamedSharding(mesh, P())}
    told: list[str] = []
    with Checkpoints(Path(place), keep=2, warn=told.append) as checkpoints:
        if what == "save":
            for step in (1, 2):
                scaled = {name: value * step for name, value in values.items()}
                state = {
                    name: jax.make_array_from_callback(value.shape, over[name], value.__getitem__)
                    for name, value in scaled.items()
                }
                checkpoints.save(step, state, {"row": step})
            return
        shape = {
            name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=over[name]) for name, value in values.items()
        }
        state, data = checkpoints.restore(shape)
        good = all(
            np.array_equal(shard.data, values[name][shard.index] * data["row"])
            for name in values
            for shard in state[name].addressable_shards
        )
        print(json.dumps({"row": data["row"], "good": bool(good), "told": told, "latest": checkpoints.latest()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
