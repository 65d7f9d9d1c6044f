"""What is compiled for several TPU chips, of which none is here: the splash kernel, on each chip's own rows and heads.

A kernel is opaque to the compiler, which would gather all that it is given; so a gather of queries is what to look for.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from luthier import mesh as mesh_lib
from luthier.config import ModelKeys
from luthier.model import param
from luthier.model.attention import attention
from luthier.model.compute import Compute
from luthier.model.model import Model
from luthier.types import Batch
from tiny import TINY

KERNELS = ("splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv")
COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
V5P, V6E = "v5p:2x2x1", "v6e:2x4"  # v5p-8 is named by its cores

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tpu_compiler")]


def chips(name: str, **axes: int) -> jax.sharding.Mesh:
    from jax.experimental import topologies

    keys = ModelKeys().model_copy(update={f"ici_{axis}_parallelism": size for axis, size in axes.items()})
    return mesh_lib.make(keys, topologies.get_topology_desc(platform="tpu", topology_name=name).devices)


def compiled(function: Any, *arguments: Any) -> tuple[list[str], dict[str, set[str]]]:
    """Return the kernels of a program, and {collective: shapes of what it gives}."""
    hlo = jax.jit(function).lower(*arguments).compile().as_text()
    found: dict[str, set[str]] = {}
    for shapes, kind in COLLECTIVE.findall(hlo):
        found.setdefault(kind, set()).update(re.findall(r"\w+\[[\d,]+\]", shapes))
    return [name for name in KERNELS if re.search(rf"%{name}\w*[.\d]* = .* custom-call\(", hlo)], found


def heads(mesh: jax.sharding.Mesh, count: int, length: int, time: str) -> jax.ShapeDtypeStruct:
    shape = (8, length, count, 128)
    placed = mesh_lib.sharding(("batch", time, "kv_heads", "head_dim"), shape, mesh)
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=placed)


def gradient(context: str | None) -> Any:
    def loss(q: jax.Array, k: jax.Array, v: jax.Array, segments_BT: jax.Array) -> jax.Array:
        return attention(q, k, v, segments_BT, context=context).astype(jnp.float32).sum()

    return jax.grad(loss, (0, 1, 2))


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        (V5P, {"fsdp": 4}),
        (V5P, {"fsdp": 2, "tensor": 2}),
        (V6E, {"tensor": 4}),
    ],
    ids=str,
)
def test_each_chip_sees_to_its_own_rows_and_heads(name: str, axes: dict[str, int]) -> None:
    with mesh_lib.use(chips(name, **axes)) as mesh:
        segments = jax.ShapeDtypeStruct((8, 1024), jnp.int32, sharding=NamedSharding(mesh, jax.P(mesh_lib.BATCH_AXES)))
        q, kv = heads(mesh, 8, 1024, "slots"), heads(mesh, 4, 1024, "slots")
        assert compiled(gradient(None), q, kv, kv, segments) == ([*KERNELS], {})


def test_only_keys_and_values_are_gathered_over_context() -> None:
    with mesh_lib.use(chips(V6E, fsdp=1, context=4, tensor=2)) as mesh:
        segments = jax.ShapeDtypeStruct((8, 2048), jnp.int32)
        q, kv = heads(mesh, 8, 2048, "time"), heads(mesh, 4, 2048, "time")
        kernels, collectives = compiled(gradient("all_gather"), q, kv, kv, segments)
        assert kernels == [*KERNELS]
        gathered = {shape for shapes in collectives.values() for shape in shapes}
        assert collectives.keys() <= {"all-gather", "reduce-scatter", "all-reduce", "all-to-all"}
        assert gathered, "keys of other chips"
        assert not any(",8,128]" in shape or ",2048,8," in shape for shape in gathered), gathered


@pytest.mark.parametrize(("name", "axes"), [(V5P, {"fsdp": 4}), (V6E, {"fsdp": 2, "context": 2, "tensor": 2})], ids=str)
def test_a_model_trains_with_the_kernel(name: str, axes: dict[str, int]) -> None:
    model = Model.from_hf(TINY | {"head_dim": 128, "hidden_size": 256, "num_hidden_layers": 2}, "tiny")
    with mesh_lib.use(chips(name, **axes)) as mesh:
        ids_BT = jax.ShapeDtypeStruct((8, 1024), jnp.int32, sharding=NamedSharding(mesh, jax.P(mesh_lib.BATCH_AXES)))

        def loss(params: param.Tree, batch: Batch) -> jax.Array:
            return jnp.sum(model.score(params, batch, Compute(jnp.dtype("bfloat16"), remat="dots")).logp_BT)

        params = param.abstract(model.spec, jnp.float32, mesh)
        kernels, _ = compiled(jax.grad(loss), params, Batch(ids_BT, ids_BT, ids_BT, ids_BT))
        assert kernels == [*KERNELS]
