"""What ``Compute.float32`` keeps: how near a bf16 pass comes to an fp32 one, and what its backward pass finds saved."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from luthier import mesh
from luthier.config import ModelKeys
from luthier.model import cost, param
from luthier.model.compute import Compute, chosen

KEPT = ("none", "residual", "attention")


def test_auto_is_for_a_trainer_that_scores_its_own_samples_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = lambda key, scored: chosen(ModelKeys(float32_activations=key), scored=scored).float32  # noqa: E731
    assert kept("auto", True) == "attention"
    assert kept("auto", False) == "none"
    assert [kept(each, True) for each in KEPT] == list(KEPT)
    monkeypatch.setattr(mesh, "platform", lambda: "tpu")
    assert kept("auto", True) == "none"


def test_types_in_words() -> None:
    said = [Compute(jnp.dtype("bfloat16"), float32=kept).described for kept in KEPT]
    assert said == [
        "bfloat16",
        "bfloat16 (residual stream in float32)",
        "bfloat16 (residual stream and attention in float32)",
    ]
    assert Compute(float32="attention").described == "float32"


@functools.cache
def scored(kind: str, dtype: str, kept: str, devices: int = 1) -> tuple[Any, Any]:
    """Return log-probs of random tokens under random weights that bf16 holds exactly, and the weights' gradients."""
    model, batch = tiny.kind_model(kind), tiny.make_batch(rows=4, length=64)
    compute = Compute(jnp.dtype(dtype), remat="dots", float32=kept)
    ways = 2 if devices == 8 else 1
    keys = ModelKeys(ici_tensor_parallelism=ways, ici_context_parallelism=ways)
    with mesh.use(mesh.make(keys, jax.devices()[:devices])) as here:
        params = param.initialise(model.spec, jax.random.key(0), jnp.float32, here)
        params = jax.tree.map(lambda w: (5 * w if w.ndim > 1 else w).astype(jnp.bfloat16).astype(w.dtype), params)

        def loss(params: Any) -> tuple[jax.Array, jax.Array]:
            logp_BT = model.score(params, batch, compute).logp_BT
            return jnp.sum(logp_BT * batch.mask_BT), logp_BT

        (_, logp_BT), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return np.asarray(logp_BT), gradients


# Of a mixture, what matters more is which tokens go to other experts.
KINDS = ["llama", pytest.param("gemma3-text", marks=pytest.mark.slow)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_more_is_kept_the_nearer_a_pass_is_to_fp32(kind: str) -> None:
    exact, _ = scored(kind, "float32", "none")
    none, residual, attention = (np.abs(scored(kind, "bfloat16", kept)[0] - exact).mean() for kept in KEPT)
    assert attention < 0.9 * residual < 0.8 * none
    np.testing.assert_array_equal(scored(kind, "float32", "attention")[0], exact)


@pytest.mark.parametrize("kept", ["none", "attention"])
def test_eight_devices_are_as_near_as_one(kept: str) -> None:
    exact = scored("llama", "float32", "none")
    alone, split = (errors(scored("llama", "bfloat16", kept, devices), exact) for devices in (1, 8))
    np.testing.assert_array_less(split, 1.2 * alone)


def errors(found: tuple[Any, Any], exact: tuple[Any, Any]) -> np.ndarray:
    """Return the distance of the log-probs and of each gradient, as a share of its size."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
    return np.array([np.linalg.norm(one - np.asarray(other)) / np.linalg.norm(other) for one, other in pairs])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_bf16(kind: str) -> None:
    exact = scored(kind, "float32", "none")
    none, attention = (scored(kind, "bfloat16", kept) for kept in ("none", "attention"))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(attention[1]))
    assert errors(attention, exact).max() < 1.1 * errors(none, exact).max()
    assert errors(attention, exact).mean() < errors(none, exact).mean()


@pytest.mark.parametrize(("kept", "longer"), [("none", 0), ("residual", 2), ("attention", 3)])
def test_little_more_is_saved_for_the_backward_pass(kept: str, longer: int) -> None:
    """In fp32 a layer's input and what attention gives to the stream, and with attention what that is made of."""
    model, batch = tiny.kind_model("llama"), tiny.make_batch(rows=8, length=64)
    compute = Compute(jnp.dtype("bfloat16"), remat="dots", float32=kept)
    with mesh.use(mesh.make(ModelKeys(), jax.devices()[:1])) as one:
        params = param.abstract(model.spec, jnp.float32, one)
        hidden = lambda params: model.hidden(params, batch, compute)  # noqa: E731
        _, backward = jax.eval_shape(lambda params: jax.vjp(hidden, params), params)
    weights = [x.shape for x in jax.tree.leaves(params["layers"])]
    saved = [x for x in jax.tree.leaves(backward) if x.ndim > 2 and x.shape[0] == 3 and x.shape not in weights]
    widths = {
        dtype: sorted(math.prod(x.shape) // (3 * 8 * 64) for x in saved if x.dtype == dtype)
        for dtype in (jnp.bfloat16, jnp.float32)
    }
    assert widths[jnp.float32] == [4, *[64] * longer]  # the log-sum-exp is fp32 always
    assert widths[jnp.bfloat16] == [32, 32, *[64] * (4 - longer), 128, 128]
    found = sum(x.size * x.dtype.itemsize for x in saved) / (8 * 64)
    assert 0.95 * found < cost.saved_bytes(model.config, compute) < 1.2 * found
