"""``dense`` against einsum: values, both gradients, types, and the same on eight devices as on one."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import TOLERANCE, assert_close

from luthier import mesh
from luthier.config import ModelKeys
from luthier.model.dense import dense

CASES = {
    "BTD,DF->BTF": ((4, 6, 16), (16, 24)),
    "BTF,DF->BTD": ((4, 6, 24), (16, 24)),
    "BTD,DNH->BTNH": ((4, 6, 16), (16, 4, 8)),
    "BTNH,DNH->BTD": ((4, 6, 4, 8), (16, 4, 8)),
    "MD,DF->MF": ((10, 16), (16, 24)),
}


def arrays(einsum: str, dtype: str = "float32") -> tuple[jax.Array, jax.Array, jax.Array]:
    x_shape, w_shape = CASES[einsum]
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], x_shape).astype(dtype)
    w = jax.random.normal(keys[1], w_shape)
    y_shape = jax.eval_shape(lambda x, w: jnp.einsum(einsum, x, w), x, w).shape
    return x, w, jax.random.normal(keys[2], y_shape)


def value_and_gradients(function, einsum: str, x: jax.Array, w: jax.Array, g: jax.Array):
    def loss(x: jax.Array, w: jax.Array):
        y = function(einsum, x, w)
        return jnp.sum(y.astype(jnp.float32) * g), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, w)
    return y, *gradients


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("einsum", CASES)
def test_values_and_gradients_equal_einsum(einsum: str, dtype: str) -> None:
    x, w, g = arrays(einsum, dtype)
    ours = value_and_gradients(dense, einsum, x, w, g)
    theirs = value_and_gradients(jnp.einsum, einsum, x.astype(jnp.float32), w, g)
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other, TOLERANCE[dtype])


def test_each_result_has_its_own_type() -> None:
    x, w, g = arrays("BTD,DF->BTF", "bfloat16")
    y, dx, dw = value_and_gradients(dense, "BTD,DF->BTF", x, w, g)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    assert value_and_gradients(dense, "BTD,DF->BTF", x, w.astype(jnp.bfloat16), g)[2].dtype == jnp.bfloat16
    assert dense("BTD,DF->BTF", x, w, out_dtype=jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("einsum", CASES)
def test_a_longer_input_is_not_rounded(einsum: str, platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It meets a bf16 weight as it is, to the square of what bf16 rounds by; gradients are those of bf16."""
    monkeypatch.setattr(mesh, "platform", lambda: platform)
    x, w, g = arrays(einsum)
    w = w.astype(jnp.bfloat16)
    y, dx, dw = value_and_gradients(functools.partial(dense, dtype=jnp.bfloat16), einsum, x, w, g)
    theirs = value_and_gradients(jnp.einsum, einsum, x, w.astype(jnp.float32), g)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.float32, jnp.bfloat16)
    assert_close(y, theirs[0], 5e-5)
    rounded = jnp.einsum(einsum, x.astype(jnp.bfloat16).astype(jnp.float32), w.astype(jnp.float32))
    assert np.abs(rounded - theirs[0]).max() > 100 * np.abs(y - theirs[0]).max()
    for one, other in zip((dx, dw), theirs[1:], strict=True):
        assert_close(one, other, TOLERANCE["bfloat16"])


def test_the_gradient_of_an_fp32_weight_is_summed_in_fp32() -> None:
    """4,096 equal products: a bf16 sum would stall, and a bf16 result round, near 4,104.5."""
    x, w = jnp.ones((1, 4096, 2), jnp.bfloat16), jnp.zeros((2, 3))
    factor = jnp.bfloat16(1.0078125)
    dw = jax.grad(lambda w: jnp.sum(dense("BTD,DF->BTF", x, w).astype(jnp.float32)) * factor.astype(jnp.float32))(w)
    np.testing.assert_array_equal(dw, np.full((2, 3), 4096 * 1.0078125))


@pytest.mark.parametrize("einsum", ["BTD,FD", "BTD,DF->BFT", "BTD,FG->BTG", "BTNH,HND->BTD", "BD,BF->DF"])
def test_other_forms_are_refused(einsum: str) -> None:
    with pytest.raises(ValueError, match="dense: einsum"):
        dense(einsum, jnp.ones((2, 2, 2)), jnp.ones((2, 2)))


@pytest.mark.parametrize("axes", [(1, 8, 1), (2, 2, 2), (1, 1, 8)], ids=str)
@pytest.mark.parametrize("einsum", [*CASES][:4])
def test_eight_devices_equal_one(einsum: str, axes: tuple[int, int, int]) -> None:
    (x, w, g), logical = (
        arrays(einsum),
        {"B": "batch", "T": "time", "D": "embed", "F": "mlp", "N": "heads", "H": "head_dim"},
    )
    if axes[2] == 8:
        logical["N"] = "kv_heads"  # 4 heads over 8 devices stay whole
    x, g = (jnp.concatenate([array, array + 1]) for array in (x, g))  # 8 rows
    names = einsum.replace("->", ",").split(",")
    expected = value_and_gradients(dense, einsum, x, w, g)
    keys = ModelKeys(ici_data_parallelism=axes[0], ici_fsdp_parallelism=axes[1], ici_tensor_parallelism=axes[2])
    with mesh.use(mesh.make(keys)) as devices:

        def place(array: jax.Array, axes: str) -> jax.Array:
            named = [logical[axis] if axes != names[0] or axis != "D" else "norm" for axis in axes]
            return jax.device_put(array, mesh.sharding(named, array.shape, devices))

        x, w = place(x, names[0]), place(w, names[1])
        for one, other in zip(value_and_gradients(dense, einsum, x, w, g), expected, strict=True):
            assert_close(one, other)
