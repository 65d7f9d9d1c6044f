"""Reading parts: blocks of tensors, parts of weights from them, and no more than a process's devices hold."""

import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_variants import VARIANTS
from folders import keys, one_device, random_tensors, spec_of, write_folder
from jax.sharding import NamedSharding, PartitionSpec

import tiny
from luthier import mesh as mesh_lib
from luthier.checkpoint import huggingface, placing, tensors
from luthier.checkpoint.source import resolve
from luthier.errors import UserError
from luthier.model import param
from luthier.model.model import Model

BLOCKS = {
    "all": (slice(0, 7), slice(0, 3000)),
    "rows": (slice(2, 5), slice(0, 3000)),
    "long runs": (slice(1, 6), slice(100, 2900)),
    "short runs": (slice(1, 6), slice(100, 300)),
    "one value": (slice(6, 7), slice(2999, 3000)),
    "nothing": (slice(3, 3), slice(0, 3000)),
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_block_is_read_as_it_would_be_cut_from_the_whole(tmp_path, name, dtype):
    values = {"a": np.arange(5, dtype=np.int64), "b": np.arange(21000).reshape(7, 3000).astype(jnp.dtype(dtype))}
    tensors.write_safetensors(
        tmp_path / "x", {key: tensors.Stored(v.shape, v.dtype, v.copy) for key, v in values.items()}
    )
    found = tensors.read_safetensors(tmp_path / "x")["b"].cut(BLOCKS[name])
    np.testing.assert_array_equal(found, values["b"][BLOCKS[name]])


def test_a_file_that_was_cut_short_after_its_header_was_read_is_named(tmp_path):
    values = np.zeros((100, 100), np.float32)
    tensors.write_safetensors(tmp_path / "x", {"a": tensors.Stored(values.shape, values.dtype, values.copy)})
    found = tensors.read_safetensors(tmp_path / "x")["a"]
    os.truncate(tmp_path / "x", 30_000)
    with pytest.raises(UserError, match=r"x: ends at 30,000 bytes, sooner than it did"):
        found.read()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_weight_can_be_read_in_parts(name):
    random = np.random.default_rng(0)
    for weight in param.leaves(Model.from_hf(VARIANTS[name].config, name).spec).values():
        tensor = random.standard_normal(weight.tensor_shape).astype(np.float32)
        whole = weight.from_tensor(tensor)
        for _ in range(4):
            ends = [sorted(random.choice(size + 1, 2, replace=False).tolist()) for size in weight.slice_shape]
            where = tuple(slice(*pair) for pair in ends)
            part = weight.from_block(tensor[weight.block(where)], where)
            np.testing.assert_array_equal(part, whole[where], err_msg=weight.tensor)


MESHES = {
    "fsdp": {"ici_fsdp_parallelism": 8},
    "tensor": {"ici_fsdp_parallelism": 2, "ici_tensor_parallelism": 4},
    "data": {"ici_data_parallelism": 8, "ici_fsdp_parallelism": 1},
}
BIG = tiny.TINY | {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 640, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("big"), BIG, random_tensors(BIG, "bfloat16"))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("axes", MESHES)
def test_shards_hold_what_one_device_holds_whole(folder, axes, dtype, monkeypatch):
    monkeypatch.setattr(placing, "_PIECE", 1 << 17)  # several pieces a tensor
    monkeypatch.setattr(placing, "_PART", 3 << 17)  # and several parts
    source, spec = resolve(keys(folder)), spec_of(BIG)
    here = huggingface.load(source, spec, dtype, one_device())
    there = huggingface.load(source, spec, dtype, mesh_lib.make(keys(**MESHES[axes])))
    values = param.map_spec(lambda weight: weight.from_tensor, spec)
    assert jax.tree.structure(values) == jax.tree.structure(here)
    for ours, theirs in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_array_equal(np.asarray(ours).view(np.uint8), np.asarray(theirs).view(np.uint8))


@pytest.mark.parametrize("first", [[0, 1], [0, 7]])
@pytest.mark.parametrize("axes", ["fsdp", "tensor"])
def test_only_the_bytes_of_the_devices_here_are_read(folder, axes, first, monkeypatch):
    """As a process with two of the eight devices would: a quarter of the file, and what cannot be split."""
    read = []
    once = os.preadv
    monkeypatch.setattr(tensors.os, "preadv", lambda *where: (read.append(once(*where)), read[-1])[1])
    monkeypatch.setattr(tensors, "_PAGE", 1)  # the rows here are shorter than a page
    stored, mesh = resolve(keys(folder)).tensors, mesh_lib.make(keys(**MESHES[axes]))
    shardings = param.shardings(spec_of(BIG), mesh)
    held, devices = 0, [jax.devices()[number] for number in first]
    for weight, sharding in zip(param.leaves(spec_of(BIG)).values(), jax.tree.leaves(shardings), strict=True):
        over = sharding.spec[len(weight.stack) :]
        for name in weight.tensors():
            ways = placing._as_stored(weight, stored[name], over), placing._as_ours(weight, stored[name], over)
            for way in filter(None, ways):
                places = NamedSharding(mesh, PartitionSpec(*way.over)).devices_indices_map(way.shape)
                own = {placing._spans(places[device], way.shape, (0,) * len(way.shape)) for device in devices}
                held += sum(part.nbytes for part in placing._parts(way, jnp.bfloat16, own).values())
    total = 2 * sum(tensor.nbytes for tensor in stored.values())  # either way
    assert sum(read) == held
    assert held < total * 0.33


SLOW = ("deepseek-v3", "gpt-oss", "phi3", "qwen3-moe")
NEWER = [
    pytest.param(name, marks=pytest.mark.slow if name in SLOW else pytest.mark.exhaustive)
    for name in VARIANTS
    if not name.endswith("-old")
]


@pytest.mark.parametrize("name", NEWER)
def test_every_family_lies_on_eight_devices_as_in_its_tensors(tmp_path, name):
    config = VARIANTS[name].config
    model, values = Model.from_hf(config, name), random_tensors(config)
    source = resolve(keys(write_folder(tmp_path, config, values)))
    mesh = mesh_lib.make(keys(ici_fsdp_parallelism=8))
    loaded = huggingface.load(source, model.spec, jnp.float32, mesh, model.config.ignored)
    for weight, array in zip(param.leaves(model.spec).values(), jax.tree.leaves(loaded), strict=True):
        for tensor, index in weight.tensors().items():
            np.testing.assert_array_equal(np.asarray(array)[index], weight.from_tensor(values[tensor]), err_msg=tensor)


MEMORY = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from folders import keys, spec_of
from luthier import mesh as mesh_lib
from luthier.checkpoint import huggingface
from luthier.checkpoint.source import resolve

def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024

mesh = mesh_lib.make(keys(ici_fsdp_parallelism=4, ici_tensor_parallelism=2))
for name in ("small", "big"):  # the small one first brings in what is the same for any size
    source = resolve(keys(Path(sys.argv[1]) / name))
    before = peak()
    params = huggingface.load(source, spec_of(source.config), jnp.bfloat16, mesh)
    loaded = peak()
print(loaded - before, sum(x.nbytes for x in jax.tree.leaves(params)))
"""


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory from /proc")
def test_loading_into_eight_shards_takes_a_tenth_more_than_the_model(tmp_path):
    big = tiny.TINY | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 12, "vocab_size": 8192}
    for name, config in (("small", tiny.TINY), ("big", big)):
        write_folder(tmp_path / name, config, random_tensors(config, "bfloat16"))
    paths = {"PYTHONPATH": ":".join(sys.path), "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    paths["MALLOC_MMAP_THRESHOLD_"] = "1048576"  # what is freed goes back at once, so that the peak is what was held
    paths["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True, env=paths)
    grown, held = map(int, done.stdout.split())
    assert held == sum(math.prod(shape) for shape in param.tensor_shapes(spec_of(big)).values()) * 2
    assert grown < 1.1 * held, done.stdout
