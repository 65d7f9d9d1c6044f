"""Send a model's weights to vLLM's servers again and again, and print the seconds that a GB takes.

    python benchmarks/sync.py --vllm-python /path/to/its/python

What is timed is what `luthier rl` does after a step: servers are paused, each tensor is gathered, checksummed, sent and
loaded, what arrived is compared with what was sent, and the servers go on. `gathering` is the part that takes place
without any server: tensors made from the trainer's arrays, one at a time, in the names and the type that vLLM loads.

Both ways are measured on this host: by shared memory, and by a socket as between hosts, where the network would add its
own time. Left out on purpose: sampling beside it, and adapters, which are small.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import smollm2
from sft import hardware

from luthier import config, mesh
from luthier.checkpoint import huggingface, tokenizer
from luthier.checkpoint.source import Source, resolve
from luthier.model.model import Model
from luthier.model.param import Tree
from luthier.rollout.vllm import devices, named, stream
from luthier.rollout.vllm.client import Client
from luthier.rollout.vllm.command import Wanted
from luthier.rollout.vllm.fleet import Fleet
from luthier.rollout.vllm.loop import Loop
from luthier.rollout.vllm.servers import Children
from luthier.rollout.vllm.weights import Transfer

GB = 1e9
NOWHERE = Path("/no/shared/memory")


def main() -> None:
    options = read_options()
    sys.stdout.reconfigure(line_buffering=True)  # rows appear as they are measured, in a file too
    with tempfile.TemporaryDirectory() as name:
        place = Path(options.model or Path(name) / "model")
        if not options.model:
            smollm2.write_model(place)
            smollm2.write_weights(place)
        for dtype in options.dtypes.split(","):
            measure(options, place, dtype)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--vllm-python", default=sys.executable, help="the interpreter of the environment that has vLLM")
    add("--model", default="", help="a folder or file with a model; empty: SmolLM2-135M's shape")
    add("--dtypes", default="float32,bfloat16", help="what the servers compute in, and are sent")
    add("--servers", type=int, default=1, help="servers that take the weights at once")
    add("--rounds", type=int, default=5)
    add("--json", default="", help="a file to add a line to for each row")
    return parser.parse_args()


def measure(options: argparse.Namespace, place: Path, dtype: str) -> None:
    """Print a row for each way in one type."""
    keys = [f"load_parameters_path={place}", "prompt=none", "rollout_engine=vllm", "max_num_seqs=4"]
    keys += [f"vllm_python={options.vllm_python}", "vllm_arguments=--enforce-eager", "kv_cache_gib=0.25"]
    resolved = config.resolve("generate", keys, {})
    source = resolve(resolved)
    with mesh.use(mesh.make(resolved, jax.devices()[:1])) as one, served(options, resolved, source, dtype) as clients:
        model = Model.from_hf(source.config, source.name)
        params = huggingface.load(source, model.spec, jnp.float32, one, model.config.ignored)
        tensors = named.full(model.spec, jnp.dtype(dtype))
        gathering = statistics.median(gathered(tensors, params) for _ in range(options.rounds))
        rows = {way: sync(options, way, clients, tensors, params) for way in ("shared memory", "socket")}
    print(f"\n{source.name}, {dtype}, {options.servers} server(s); {hardware()}")
    for way, transfers in rows.items():
        seconds, size = statistics.median(each.seconds for each in transfers), transfers[0].bytes / GB
        print(
            f"{way:>14}: {size:.3f} GB in {seconds:.2f} s ({', '.join(f'{each.seconds:.2f}' for each in transfers)}), "
            f"{seconds / size:.2f} s a GB; gathering {gathering / size:.2f} s a GB"
        )
        line = {"way": way, "dtype": dtype, "GB": size, "seconds": [each.seconds for each in transfers]}
        line |= {"gathering": gathering, "options": vars(options), "seconds_per_GB": seconds / size}
        if options.json:
            with Path(options.json).open("a") as file:
                file.write(json.dumps(line) + "\n")


class Served:
    """Servers' clients, and the loop that they live on."""

    def __init__(self, loop: Loop, clients: list[Client]) -> None:
        self.loop, self.clients = loop, clients


@contextmanager
def served(options: argparse.Namespace, keys: Any, source: Source, dtype: str) -> Iterator[Served]:
    """Start servers and wait until they answer."""
    shares = devices.take(options.servers, sampling=1.0, training=0.0, together=False)
    children = Children(Wanted(keys, dtype, length=256, max_num_seqs=4), source, tokenizer.load(source), shares)
    loop = Loop("sync")
    try:
        fleet = loop.call(made(children))
        loop.call(fleet.open())
        yield Served(loop, [server.client for server in fleet.members])
        loop.call(fleet.close())
    finally:
        loop.close()
        children.close()


async def made(children: Children) -> Fleet:
    return Fleet(children, Client, wait=600, say=print)


def gathered(tensors: named.Tensors, params: Tree) -> float:
    """Return the seconds that it takes to make all tensors."""
    start = time.perf_counter()
    for _ in tensors(params):
        pass
    return time.perf_counter() - start


def sync(options: argparse.Namespace, way: str, to: Served, tensors: named.Tensors, params: Tree) -> list[Transfer]:
    """Send the weights round by round. Raises RuntimeError where a server does not take them."""
    shared, done = stream._SHARED, []
    stream._SHARED = shared if way == "shared memory" else NOWHERE  # no key says this: who shares memory uses it
    for version in range(options.rounds + 1):
        with Transfer(to.clients, to.loop.call, version) as transfer:
            for name, array in tensors(params):
                transfer.put(name, array)
        for failure in transfer.failed.values():
            raise RuntimeError(str(failure))
        done.append(transfer)
    stream._SHARED = shared
    return done[1:]  # the first is not like the others: it loads over what a server began with


if __name__ == "__main__":
    main()
