"""Loading a checkpoint into eight shards: time and peak memory, against safetensors' own load of the same files.

    python benchmarks/load.py
    python benchmarks/load.py --model llama3.1-8b

The checkpoint is a folder of random bfloat16 in the model's shape, in shards of 5 GB. Luthier loads it into the arrays
of `--devices` simulated devices, its fsdp axis; safetensors' side reads one file after another whole, as
`safetensors.numpy.load_file` does, and lets go of it. Each side is a process of its own, and they take turns. Both read
from the machine's page cache where that holds the files. Left out on purpose: devices with memory of their own, where
the copy to them comes on top.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

SMALL = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
}
SIDES = ("luthier", "safetensors")


def main() -> None:
    options = read_options()
    if options.side:
        print(json.dumps({"luthier": load_here, "safetensors": load_there}[options.side](options)))
        return
    with tempfile.TemporaryDirectory(dir=options.scratch or None) as name:
        folder = Path(name)
        size = write(folder, options.model)
        print(f"{options.model or 'a small Llama'}: {size / 1e9:.2f} GB of bfloat16, {options.devices} devices")
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for _ in range(options.rounds):
            for side in SIDES:
                found[side].append(run(side, folder, options))
                print(
                    f"{side:>11}: {found[side][-1]['seconds']:.1f} s, peak {found[side][-1]['grown'] / 1e9:.2f} GB more"
                )
    ratios = [ours["seconds"] / theirs["seconds"] for ours, theirs in zip(*found.values(), strict=True)]
    peak = max(one["grown"] for one in found["luthier"])
    print(f"time: {statistics.median(ratios):.2f} of safetensors' (median of {options.rounds} rounds)")
    print(f"peak memory of loading: {peak / found['luthier'][0]['held']:.3f} of the model's size")
    if options.json:
        Path(options.json).write_text(json.dumps({"bytes": size, **found}, indent=2) + "\n")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="", help="a released model's name, such as llama3.1-8b; default: 1 GB")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16", help="of the weights in memory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", default="", help="a folder for the checkpoint")
    parser.add_argument("--json", default="", help="a file to write all figures to")
    parser.add_argument("--side", default="", choices=["", *SIDES], help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def run(side: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--dtype", options.dtype]
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={options.devices}",
        "MALLOC_MMAP_THRESHOLD_": "1048576",  # what is freed goes back at once, so that the peak is what was held
    }
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def write(folder: Path, name: str) -> int:
    """Write the checkpoint and return the bytes of its tensors."""
    import ml_dtypes
    import numpy as np

    from luthier.checkpoint import folder as whole
    from luthier.checkpoint import maxtext_names, tensors
    from luthier.model import param, published
    from luthier.model.model import Model

    known = published.find(maxtext_names.HUB_IDS.get(name, name)) if name else None
    config = SMALL if known is None else dict(known.config)
    random, kind = np.random.default_rng(0), np.dtype(ml_dtypes.bfloat16)

    def values(shape: tuple[int, ...]) -> np.ndarray:
        return random.integers(0, 2**16, shape, np.uint16).view(kind)

    shapes = param.tensor_shapes(Model.from_hf(config, "random").spec)
    stored = {key: tensors.Stored(shape, kind, partial(values, shape)) for key, shape in shapes.items()}
    shards = tensors.shard(stored, 5 * 10**9)
    documents: dict[str, Any] = {"config.json": config}
    if len(shards) > 1:
        documents[tensors.INDEX] = tensors.index(shards)
    whole.write(folder, shards, documents, lambda _: None)
    return sum(tensor.nbytes for tensor in stored.values())


def load_here(options: argparse.Namespace) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from luthier import mesh as mesh_lib
    from luthier.checkpoint import huggingface
    from luthier.checkpoint.source import resolve
    from luthier.config import ModelKeys
    from luthier.model.model import Model

    keys = ModelKeys(load_parameters_path=options.folder)
    source = resolve(keys)
    mesh, spec = mesh_lib.make(keys), Model.from_hf(source.config, source.name).spec
    before, started = peak(), time.perf_counter()
    params = huggingface.load(source, spec, jnp.dtype(options.dtype), mesh)
    seconds = time.perf_counter() - started
    held = sum(array.nbytes for array in jax.tree.leaves(params))
    return {"seconds": seconds, "grown": peak() - before, "peak": peak(), "held": held}


def load_there(options: argparse.Namespace) -> dict[str, Any]:
    import ml_dtypes  # noqa: F401  numpy has no bfloat16 without it
    from safetensors.numpy import load_file

    before, started, held = peak(), time.perf_counter(), 0
    for path in sorted(Path(options.folder).glob("*.safetensors")):
        held += sum(array.nbytes for array in load_file(path).values())
    return {"seconds": time.perf_counter() - started, "grown": peak() - before, "peak": peak(), "held": held}


def peak() -> int:
    """The most memory that this process has had, in bytes, as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


if __name__ == "__main__":
    main()
