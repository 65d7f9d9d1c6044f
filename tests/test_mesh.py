"""Devices to mesh, logical axes to mesh axes."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from luthier import mesh
from luthier.config import ModelKeys
from luthier.errors import UserError
from tiny import make_batch


def make(data: int = 1, fsdp: int = -1, tensor: int = 1, expert: int = 1) -> jax.sharding.Mesh:
    keys = ModelKeys(
        ici_data_parallelism=data,
        ici_fsdp_parallelism=fsdp,
        ici_expert_parallelism=expert,
        ici_tensor_parallelism=tensor,
    )
    return mesh.make(keys)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((1, -1, 1), (1, 8, 1, 1)),
        ((2, -1, 2), (2, 2, 1, 2)),
        ((-1, 1, 4), (2, 1, 1, 4)),
        ((8, 1, 1), (8, 1, 1, 1)),
        ((1, -1, 2, 2), (1, 2, 2, 2)),
        ((1, 1, 1, -1), (1, 1, 8, 1)),
    ],
)
def test_minus_one_takes_the_rest(sizes: tuple[int, ...], shape: tuple[int, ...]) -> None:
    assert tuple(make(*sizes).shape.values()) == shape
    assert mesh.batch_shards(make(*sizes)) == shape[0] * shape[1] * shape[2]


@pytest.mark.parametrize("sizes", [(3, -1, 1), (1, 4, 1), (2, 2, 4), (1, 1, 1)])
def test_axes_that_do_not_make_the_devices_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=rf"ici_data_parallelism={sizes[0]}, .* 8 are here"):
        make(*sizes)


def test_logical_axes_are_split_by_the_table() -> None:
    assert mesh.partition(("layer", "embed", "heads", "head_dim"), (3, 64, 4, 16), make(1, 4, 2)) == P(
        None, ("fsdp",), ("tensor",), None
    )
    assert mesh.partition(("batch", "time"), (8, 32), make(2, 4, 1)) == P(("data", "fsdp"), None)
    assert mesh.partition(("embed", "mlp"), (64, 128), make(8, 1, 1)) == P(None, None)


def test_experts_have_an_axis_that_dense_weights_are_split_over_too() -> None:
    devices = make(1, 2, 2, 2)
    assert mesh.partition(("expert", "expert_embed", "expert_mlp"), (8, 64, 32), devices) == P(
        ("expert",), ("fsdp",), ("tensor",)
    )
    assert mesh.partition(("embed", "mlp"), (64, 32), devices) == P(("fsdp", "expert"), ("tensor",))
    assert mesh.partition(("batch", "time"), (8, 32), devices) == P(("fsdp", "expert"), None)
    with pytest.raises(UserError, match="ici_expert_parallelism=2 does not divide the 9 of axis `expert`"):
        mesh.partition(("expert",), (9,), devices)


def test_two_dimensions_on_one_mesh_axis_are_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        mesh.partition(("heads", "mlp"), (4, 128), make(1, 4, 2))


def test_a_dimension_that_is_not_divided_is_refused_or_kept_whole() -> None:
    with pytest.raises(UserError, match=r"ici_tensor_parallelism=8 does not divide the 9 of axis `heads`"):
        mesh.partition(("heads",), (9,), make(1, 1, 8))
    assert mesh.partition(("kv_heads", "head_dim"), (2, 64), make(1, 1, 8)) == P(None, None)


def test_a_mesh_is_current_only_while_used() -> None:
    assert mesh.current() is None
    with mesh.use(make()) as current:
        assert mesh.current() is current
        tokens_BT = jax.jit(lambda x: mesh.constrain(x, "batch", "time"))(make_batch(rows=8).tokens_BT)
        assert tokens_BT.sharding.spec == P(("fsdp",), None) or len(tokens_BT.addressable_shards[0].data) == 1
    assert mesh.current() is None
    assert mesh.platform() == "cpu"
