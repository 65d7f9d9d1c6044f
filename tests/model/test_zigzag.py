"""How rows are cut over the mesh's context axis, and put together again."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from luthier import mesh
from luthier.config import ModelKeys
from luthier.model import zigzag
from luthier.model.segments import Prefixed


def over(ways: int) -> jax.sharding.Mesh:
    return mesh.make(ModelKeys(ici_context_parallelism=ways, ici_fsdp_parallelism=8 // ways))


def test_the_order_is_from_both_ends() -> None:
    assert zigzag.order(16, 2).tolist() == [0, 1, 2, 3, 12, 13, 14, 15, 4, 5, 6, 7, 8, 9, 10, 11]
    assert zigzag.order(6, 1).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("ways", [2, 4, 8, 64])
def test_all_devices_have_as_much_to_see(ways: int) -> None:
    seen = (zigzag.order(1024, ways) + 1).reshape(ways, -1).sum(axis=1)
    assert len(set(seen.tolist())) == 1


@pytest.mark.parametrize("ways", [2, 8])
@pytest.mark.parametrize("length", [32, 37])
def test_what_is_spread_comes_back(ways: int, length: int) -> None:
    x_BTD = jax.random.normal(jax.random.key(0), (8, length, 4))
    with mesh.use(over(ways)):

        def square(x_BTD: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            spread = zigzag.spread(x_BTD)
            restored = zigzag.restored(spread, length)
            return jnp.sum(restored * x_BTD), (restored, zigzag.natural(spread, length))

        (_, back), gradient = jax.jit(jax.value_and_grad(square, has_aux=True))(x_BTD)
        for one in back:
            np.testing.assert_array_equal(one, x_BTD)
        np.testing.assert_array_equal(gradient, 2 * x_BTD)


def test_a_row_is_padded_by_nobodys_tokens_at_its_last_ones_place() -> None:
    tokens_BT = jnp.arange(10)[None]
    with mesh.use(over(4)):
        own_BT = zigzag.natural(zigzag.spread_segments(None, tokens_BT), 16)
        positions_BT = zigzag.natural(zigzag.spread(tokens_BT, repeat_last=True), 16)
        prefixed = zigzag.spread_segments(Prefixed(tokens_BT, tokens_BT, None), tokens_BT)
        assert zigzag.spread_segments(None, jnp.zeros((1, 16), jnp.int32)) is None
    assert own_BT[0].tolist() == [1] * 10 + [0] * 6
    assert positions_BT[0].tolist() == [*range(10), *[9] * 6]
    assert prefixed.own_BT.shape == (1, 16)


@pytest.mark.parametrize("ways", [2, 4])
def test_rows_are_gathered_in_their_own_order_and_sums_scattered(ways: int) -> None:
    x_BT = jax.random.normal(jax.random.key(0), (2, 16))

    def body(x_Bt: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        whole_BT = zigzag.gathered(x_Bt)
        return whole_BT, whole_BT[:, zigzag.own_places(16)] - x_Bt, zigzag.scattered(whole_BT)

    with mesh.use(over(ways)) as devices:
        split = P(None, zigzag.AXIS)
        run = jax.shard_map(body, mesh=devices, in_specs=split, out_specs=(P(), split, split), check_vma=False)
        whole_BT, nothing, summed = jax.jit(run)(zigzag.spread(x_BT))
        np.testing.assert_array_equal(whole_BT, x_BT)
        np.testing.assert_array_equal(nothing, 0)
        np.testing.assert_allclose(zigzag.natural(summed, 16), ways * x_BT, rtol=1e-6)
