"""Devices to mesh, logical axes to mesh axes."""

from dataclasses import dataclass

import jax
import pytest
from jax.sharding import PartitionSpec as P

from luthier import mesh
from luthier.config import ModelKeys
from luthier.errors import UserError
from tiny import make_batch


def make(data: int = 1, fsdp: int = -1, tensor: int = 1, expert: int = 1, context: int = 1) -> jax.sharding.Mesh:
    keys = ModelKeys(
        ici_data_parallelism=data,
        ici_fsdp_parallelism=fsdp,
        ici_expert_parallelism=expert,
        ici_context_parallelism=context,
        ici_tensor_parallelism=tensor,
    )
    return mesh.make(keys)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((1, -1, 1), (1, 8, 1, 1, 1)),
        ((2, -1, 2), (2, 2, 1, 1, 2)),
        ((-1, 1, 4), (2, 1, 1, 1, 4)),
        ((8, 1, 1), (8, 1, 1, 1, 1)),
        ((1, -1, 2, 2), (1, 2, 2, 1, 2)),
        ((1, 1, 1, -1), (1, 1, 8, 1, 1)),
        ((1, 2, 1, 1, -1), (1, 2, 1, 4, 1)),
    ],
)
def test_minus_one_takes_the_rest(sizes: tuple[int, ...], shape: tuple[int, ...]) -> None:
    assert tuple(make(*sizes).shape.values()) == shape
    assert mesh.batch_shards(make(*sizes)) == shape[0] * shape[1] * shape[2]


@pytest.mark.parametrize("sizes", [(3, -1, 1), (1, 4, 1), (2, 2, 4), (1, 1, 1)])
def test_axes_that_do_not_make_the_devices_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=rf"ici_data_parallelism={sizes[0]}, .* 8 are here"):
        make(*sizes)


@dataclass(frozen=True)
class Chip:
    """A device that is not there: the first half of eight lies in one slice, the second in another."""

    id: int
    slice_index: int | None = None
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "of a kind whose network is a torus"
    core_on_chip: int = 0

    @property
    def coords(self) -> tuple[int, int, int]:
        return self.id % 2, self.id // 2 % 2, 0


def chips(**what: object) -> list[Chip]:
    return [Chip(i, **{name: i // 4 if value == "halves" else value for name, value in what.items()}) for i in range(8)]


SLICES = {"slices": chips(slice_index="halves"), "processes": chips(process_index="halves", platform="gpu")}


def ids(devices: jax.sharding.Mesh, **at: slice) -> set[int]:
    """Return the numbers of the devices at these places of these axes."""
    places = tuple(at.get(axis, slice(None)) for axis in mesh.AXES)
    return {chip.id for chip in devices.devices[places].flat}


@pytest.mark.parametrize("devices", SLICES.values(), ids=SLICES)
def test_axes_over_slices_stand_outside_those_within(devices: list[Chip]) -> None:
    copies = mesh.make(ModelKeys(dcn_data_parallelism=2), devices)
    assert tuple(copies.shape.values()) == (2, 4, 1, 1, 1)
    assert ids(copies, data=slice(1)) == {0, 1, 2, 3}
    both = mesh.make(ModelKeys(dcn_fsdp_parallelism=-1, ici_fsdp_parallelism=2, ici_tensor_parallelism=2), devices)
    assert tuple(both.shape.values()) == (1, 4, 1, 1, 2)
    assert ids(both, fsdp=slice(2)) == {0, 1, 2, 3}


def test_slices_are_never_joined_unasked() -> None:
    with pytest.raises(UserError, match=r"2 slices are here.*dcn_data_parallelism=2 .*dcn_fsdp_parallelism=2"):
        mesh.make(ModelKeys(), SLICES["slices"])
    assert mesh.make(ModelKeys(), SLICES["processes"]).shape["fsdp"] == 8  # no slow network is known of


def test_slices_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"dcn_data_parallelism=4, .*: 4 slices asked for, 2 are here"):
        mesh.make(ModelKeys(dcn_data_parallelism=4), SLICES["slices"])
    with pytest.raises(UserError, match=r"ici_tensor_parallelism=3: 3 devices in a slice asked for, 4 are here"):
        mesh.make(ModelKeys(dcn_data_parallelism=2, ici_tensor_parallelism=3), SLICES["slices"])
    with pytest.raises(UserError, match="slices of 4, 3 devices are here"):
        mesh.make(ModelKeys(dcn_data_parallelism=2), SLICES["slices"][:7])


@pytest.mark.parametrize(
    ("name", "slices", "keys"),
    [
        ("v5p:2x2x1", 1, {}),
        ("v5p:4x4x4", 1, {"ici_tensor_parallelism": 2}),  # shorter than any axis of the torus
        ("v6e:2x4", 1, {"ici_context_parallelism": 4, "ici_tensor_parallelism": 2}),
        ("v5p:2x2x1", 2, {"dcn_data_parallelism": 2}),
    ],
)
@pytest.mark.slow
@pytest.mark.usefixtures("tpu_compiler")
def test_chips_that_are_not_there_make_a_mesh(name: str, slices: int, keys: dict[str, int]) -> None:
    from jax.experimental import topologies

    chips = topologies.get_topology_desc(platform="tpu", topology_name=name, num_slices=slices).devices
    made = mesh.make(ModelKeys(**keys), chips)
    assert {chip.id for chip in made.devices.flat} == {chip.id for chip in chips}
    with mesh.use(made):
        assert mesh.platform() == "tpu"


def test_tokens_of_rows_are_split_over_context_and_weights_too() -> None:
    devices = make(1, 2, 1, 1, 4)
    assert mesh.partition(("batch", "time", "norm"), (8, 32, 64), devices) == P(("fsdp",), ("context",), None)
    assert mesh.partition(("batch", "slots"), (8, 32), devices) == P(("fsdp",), None)
    assert mesh.partition(("embed", "mlp"), (64, 32), devices) == P(("fsdp", "context"), None)
    assert mesh.batch_shards(devices) == 2


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
    with pytest.raises(UserError, match="expert=2 does not divide the 9 of axis `expert`"):
        mesh.partition(("expert",), (9,), devices)


def test_two_dimensions_on_one_mesh_axis_are_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        mesh.partition(("heads", "mlp"), (4, 128), make(1, 4, 2))


def test_a_dimension_that_is_not_divided_is_refused_or_kept_whole() -> None:
    with pytest.raises(UserError, match=r"tensor=8 does not divide the 9 of axis `heads`"):
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
