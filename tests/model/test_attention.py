"""Each form of attention against whole scores, against torch, and on eight devices against one."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import TOLERANCE, assert_close

from luthier import mesh
from luthier.config import ModelKeys
from luthier.errors import UserError
from luthier.model import attention_blockwise
from luthier.model.attention import attention, cudnn, shares_prompts
from luthier.model.attention_splash import splash
from luthier.model.segments import Prefixed


def whole(q_BTNH, k_BSKH, v_BSKH, segments_BT, *, scale=None, window=None):
    """Attention by its definition, scores whole and in fp32."""
    q, k, v = (x.astype(jnp.float32) for x in (q_BTNH, k_BSKH, v_BSKH))
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    distance = jnp.arange(q.shape[1])[:, None] - jnp.arange(q.shape[1])
    allowed = (distance >= 0) & (distance < (window or q.shape[1]))
    allowed = jnp.broadcast_to(allowed, (q.shape[0], *allowed.shape))
    if isinstance(segments_BT, Prefixed):
        own, prefix = (ids_BT[:, :, None] for ids_BT in segments_BT)
        allowed &= (own == own.mT) | (prefix == own.mT)
    elif segments_BT is not None:
        allowed &= segments_BT[:, :, None] == segments_BT[:, None, :]
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    p = jax.nn.softmax(jnp.where(allowed[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", p, v)


def arrays(T: int, B: int = 2, N: int = 4, K: int = 2, H: int = 16, dtype: str = "float32"):
    """Return q, k, v, segments (three and padding in each row), and a direction to differentiate along."""
    keys = jax.random.split(jax.random.key(T), 4)
    q, k, v, g = (jax.random.normal(key, (B, T, n, H)) for key, n in zip(keys, (N, K, K, N), strict=True))
    edges = np.linspace(0, T, 5).astype(int)[1:]
    segments_BT = np.stack([(np.searchsorted(edges + row, np.arange(T), side="right") + 1) % 4 for row in range(B)])
    return *(x.astype(dtype) for x in (q, k, v)), jnp.asarray(segments_BT, jnp.int32), g


def prefixed(T: int, B: int = 2) -> Prefixed:
    """Return rows of two prompts with three and two completions, then padding."""
    edges = np.linspace(0, T, 9).astype(int)[1:]
    rows = [np.searchsorted(edges + row, np.arange(T), side="right") for row in range(B)]
    own_BT = np.stack([np.asarray([1, 2, 3, 4, 5, 6, 7, 0, 0])[row] for row in rows])
    prefix_BT = np.stack([np.asarray([1, 1, 1, 1, 5, 5, 5, 0, 0])[row] for row in rows])
    return Prefixed(jnp.asarray(own_BT, jnp.int32), jnp.asarray(prefix_BT, jnp.int32))


def value_and_gradients(function, q, k, v, segments_BT, g):
    def loss(q, k, v):
        o = function(q, k, v, segments_BT)
        return jnp.sum(o.astype(jnp.float32) * g), o

    (_, o), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return o, *gradients


def assert_equal(function, reference, q, k, v, segments_BT, g, tolerance: float = TOLERANCE["float32"]) -> None:
    ours = value_and_gradients(function, q, k, v, segments_BT, g)
    theirs = value_and_gradients(reference, *(x.astype(jnp.float32) for x in (q, k, v)), segments_BT, g)
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other, tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("T", "heads", "window"),
    [
        (9, (4, 2), None),
        (37, (3, 3), 5),
        (257, (4, 1), None),
        (300, (4, 2), 100),
    ],
)
def test_blockwise_equals_whole_scores(T: int, heads: tuple[int, int], window: int | None, dtype: str) -> None:
    kernels = (functools.partial(function, window=window) for function in (attention, whole))
    assert_equal(*kernels, *arrays(T, N=heads[0], K=heads[1], dtype=dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("window", [None, 2, 70])
def test_looped_blocks_equal_whole_scores(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    monkeypatch.setattr(attention_blockwise, "MAX_BLOCK", 16)
    monkeypatch.setattr(attention_blockwise, "MAX_SPANS", 3)
    kernels = (functools.partial(function, window=window, scale=0.7) for function in (attention, whole))
    assert_equal(*kernels, *arrays(203, H=10))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block", [128, 16])
def test_completions_see_the_prompt_they_share(monkeypatch: pytest.MonkeyPatch, block: int, dtype: str) -> None:
    monkeypatch.setattr(attention_blockwise, "MAX_BLOCK", block)
    monkeypatch.setattr(attention_blockwise, "MAX_SPANS", 3)
    q, k, v, _, g = arrays(150, dtype=dtype)
    assert_equal(attention, whole, q, k, v, prefixed(150), g, TOLERANCE[dtype])


@pytest.mark.parametrize("segments", ["whole", "prefixed"])
@pytest.mark.parametrize("T", [64, 37])
def test_the_mask_given_to_cudnn_is_the_same(monkeypatch: pytest.MonkeyPatch, T: int, segments: str) -> None:
    """The kernel itself needs a GPU: here XLA takes its place, with the same arguments."""
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, **k: plain(*a, **k | {"implementation": "xla"}))
    q, k, v, segments_BT, g = arrays(T)
    kernel = functools.partial(cudnn, scale=0.25, window=None)
    given = segments_BT if segments == "whole" else prefixed(T)
    assert_equal(kernel, functools.partial(whole, scale=0.25), q, k, v, given, g)


def test_what_cannot_share_prompts_says_so() -> None:
    q, k, v, _, _ = arrays(32)
    assert shares_prompts("auto", jnp.float32, 16)
    assert shares_prompts("cudnn", jnp.bfloat16, 16)
    assert not shares_prompts("splash", jnp.float32, 16)
    with pytest.raises(ValueError, match="without sharing"):
        splash(q, k, v, prefixed(32), scale=0.25, window=None, interpret=True)
    with pytest.raises(ValueError, match="window"):
        attention(q, k, v, prefixed(32), window=8)


def test_rows_of_one_segment_need_no_ids() -> None:
    q, k, v, _, g = arrays(150)
    assert_equal(attention, whole, q, k, v, None, g)


def test_padding_gives_numbers_and_is_seen_by_no_one() -> None:
    q, k, v, segments_BT, g = arrays(64)
    real = (segments_BT > 0)[:, :, None, None]
    spoiled = [jnp.where(real, x, 1e4) for x in (q, k, v)]
    clean, dirty = (value_and_gradients(attention, *qkv, segments_BT, g * real) for qkv in ((q, k, v), spoiled))
    for one, other in zip(clean, dirty, strict=True):
        assert np.isfinite(other).all()
        np.testing.assert_allclose(jnp.where(real, other, 0), jnp.where(real, one, 0), atol=1e-6)


def test_scores_are_never_whole() -> None:
    q = jax.ShapeDtypeStruct((1, 4096, 4, 16), jnp.float32)
    gradient = jax.grad(lambda q, k, v: attention(q, k, v, None).sum(), (0, 1, 2))
    compiled = jax.jit(gradient).lower(q, q, q).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 4096 * 4096 * 4 / 4


def test_equals_torch() -> None:
    torch = pytest.importorskip("torch")
    q, k, v, _, g = arrays(200)
    tensors = [torch.tensor(np.asarray(x)).transpose(1, 2).requires_grad_() for x in (q, k, v)]
    o = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True)
    o.backward(torch.tensor(np.asarray(g)).transpose(1, 2))
    theirs = [x.transpose(1, 2).detach().numpy() for x in (o, *(tensor.grad for tensor in tensors))]
    for one, other in zip(value_and_gradients(attention, q, k, v, None, g), theirs, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("axes", [(1, 8, 1), (2, 2, 2), (1, 2, 4)], ids=str)
def test_eight_devices_equal_one(axes: tuple[int, int, int]) -> None:
    """Two KV heads over four devices, too: each then serves two of them."""
    q, k, v, segments_BT, g = arrays(40, B=8, N=8, K=2)
    expected = value_and_gradients(attention, q, k, v, segments_BT, g)
    keys = ModelKeys(ici_data_parallelism=axes[0], ici_fsdp_parallelism=axes[1], ici_tensor_parallelism=axes[2])
    shared = value_and_gradients(attention, q, k, v, prefixed(40, B=8), g)
    with mesh.use(mesh.make(keys)):
        for one, other in zip(value_and_gradients(attention, q, k, v, segments_BT, g), expected, strict=True):
            assert_close(one, other)
        for one, other in zip(value_and_gradients(attention, q, k, v, prefixed(40, B=8), g), shared, strict=True):
            assert_close(one, other)


@pytest.mark.parametrize(("B", "N"), [(3, 8), (8, 3)])
def test_rows_or_heads_that_do_not_divide_stay_whole(B: int, N: int) -> None:
    q, k, v, segments_BT, g = arrays(24, B=B, N=N, K=1)
    expected = value_and_gradients(attention, q, k, v, segments_BT, g)
    with mesh.use(mesh.make(ModelKeys(ici_fsdp_parallelism=4, ici_tensor_parallelism=2))):
        for one, other in zip(value_and_gradients(attention, q, k, v, segments_BT, g), expected, strict=True):
            assert_close(one, other)


@pytest.mark.parametrize(("implementation", "device"), [("cudnn", "NVIDIA GPU"), ("splash", "TPU")])
def test_a_kernel_of_another_platform_is_refused(implementation: str, device: str) -> None:
    q, k, v, segments_BT, _ = arrays(8)
    with pytest.raises(UserError, match=rf"attention={implementation}.*{device}.*cpu.*attention=auto"):
        attention(q, k, v, segments_BT, implementation=implementation)


@pytest.mark.parametrize(("T", "window"), [(128, None), (150, None), (256, 40)])
def test_splash_interpreted_equals_whole_scores(T: int, window: int | None) -> None:
    kernel = functools.partial(splash, scale=0.25, window=window, interpret=True)
    reference = functools.partial(whole, scale=0.25, window=window)
    assert_equal(kernel, reference, *arrays(T))
