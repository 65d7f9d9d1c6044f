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
from luthier.model import attention as attention_module
from luthier.model import attention_blockwise, attention_context, zigzag
from luthier.model.attention import Needs, attention, choose, cudnn, shares_prompts
from luthier.model.attention_splash import splash
from luthier.model.segments import Prefixed


def whole(q_BTNH, k_BSKH, v_BSKH, segments_BT, sinks_N=None, *, scale=None, window=None, softcap=None):
    """Attention by its definition, scores whole and in fp32."""
    q, k, v = (x.astype(jnp.float32) for x in (q_BTNH, k_BSKH, v_BSKH))
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    distance = jnp.arange(q.shape[1])[:, None] - jnp.arange(q.shape[1])
    allowed = jnp.broadcast_to(distance >= 0, (q.shape[0], *distance.shape))
    if isinstance(segments_BT, Prefixed):
        own, prefix, positions = (ids_BT[:, :, None] for ids_BT in segments_BT)
        allowed &= (own == own.mT) | (prefix == own.mT)
        distance = positions - positions.mT
    elif segments_BT is not None:
        allowed &= segments_BT[:, :, None] == segments_BT[:, None, :]
    if window is not None:
        allowed &= distance < window
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(allowed[:, None], scores, -jnp.inf)
    if sinks_N is not None:
        sinks = jnp.broadcast_to(sinks_N[:, None, None], (*scores.shape[:3], 1))
        scores, v = jnp.concatenate([scores, sinks], axis=-1), jnp.pad(v, ((0, 0), (0, 1), (0, 0), (0, 0)))
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, axis=-1), v)


def arrays(T: int, B: int = 2, N: int = 4, K: int = 2, H: int = 16, V: int | None = None, dtype: str = "float32"):
    """Return q, k, v, segments (three and padding in each row), and a direction to differentiate along."""
    keys = jax.random.split(jax.random.key(T), 4)
    sizes = ((N, H), (K, H), (K, V or H), (N, V or H))
    q, k, v, g = (jax.random.normal(key, (B, T, *size)) for key, size in zip(keys, sizes, strict=True))
    edges = np.linspace(0, T, 5).astype(int)[1:]
    segments_BT = np.stack([(np.searchsorted(edges + row, np.arange(T), side="right") + 1) % 4 for row in range(B)])
    return *(x.astype(dtype) for x in (q, k, v)), jnp.asarray(segments_BT, jnp.int32), g


def prefixed(T: int, B: int = 2) -> Prefixed:
    """Return rows of two prompts with three and two completions, then padding."""
    edges = np.linspace(0, T, 9).astype(int)[1:]
    rows = [np.searchsorted(edges + row, np.arange(T), side="right") for row in range(B)]
    own_BT = np.stack([np.asarray([1, 2, 3, 4, 5, 6, 7, 0, 0])[row] for row in rows])
    prefix_BT = np.stack([np.asarray([1, 1, 1, 1, 5, 5, 5, 0, 0])[row] for row in rows])
    positions_BT = np.zeros_like(own_BT)
    for b, t in np.ndindex(own_BT.shape):
        own, prefix = own_BT[b, t], prefix_BT[b, t]
        before = (own_BT[b] == prefix).sum() if own != prefix else 0
        positions_BT[b, t] = before + (own_BT[b, :t] == own).sum()
    return Prefixed(*(jnp.asarray(x_BT, jnp.int32) for x_BT in (own_BT, prefix_BT, positions_BT)))


def value_and_gradients(function, q, k, v, segments_BT, g, *sinks):
    """Return the output, and the gradients by q, k, v and the sinks, if any."""

    def loss(q, k, v, *sinks):
        o = function(q, k, v, segments_BT, **dict(zip(["sinks_N"], sinks, strict=False)))
        return jnp.sum(o.astype(jnp.float32) * g), o

    inputs = (q, k, v, *sinks)
    (_, o), gradients = jax.jit(jax.value_and_grad(loss, range(len(inputs)), has_aux=True))(*inputs)
    return o, *gradients


def assert_equal(function, reference, q, k, v, segments_BT, g, *sinks, tolerance: float = TOLERANCE["float32"]) -> None:
    ours = value_and_gradients(function, q, k, v, segments_BT, g, *sinks)
    theirs = value_and_gradients(reference, *(x.astype(jnp.float32) for x in (q, k, v)), segments_BT, g, *sinks)
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
    assert_equal(*kernels, *arrays(T, N=heads[0], K=heads[1], dtype=dtype), tolerance=TOLERANCE[dtype])


def test_the_backward_pass_in_a_shorter_type() -> None:
    q, k, v, segments_BT, g = arrays(37)
    short = functools.partial(attention, gradient_dtype=jnp.bfloat16)
    ours, exact = (value_and_gradients(function, q, k, v, segments_BT, g) for function in (short, attention))
    np.testing.assert_array_equal(ours[0], exact[0])
    for one, other in zip(ours[1:], exact[1:], strict=True):
        assert one.dtype == jnp.float32
        assert np.abs(one - other).max() > 0
        assert_close(one, other, TOLERANCE["bfloat16"])


SINKS = jnp.asarray([-3.0, 0.5, 2.0, 6.0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("softcap", "sinks", "window", "values"),
    [(0.8, [], None, 16), (None, [SINKS], None, 16), (None, [], None, 24), (2.5, [SINKS], 5, 8), (2.5, [], 40, 24)],
)
def test_soft_caps_sinks_and_sizes_of_values(
    monkeypatch: pytest.MonkeyPatch, softcap: float | None, sinks: list, window: int | None, values: int, dtype: str
) -> None:
    monkeypatch.setattr(attention_blockwise, "MAX_BLOCK", 16)
    monkeypatch.setattr(attention_blockwise, "MAX_SPANS", 3)
    settings = {"softcap": softcap, "window": window, "scale": 0.7}
    kernels = (functools.partial(function, **settings) for function in (attention, whole))
    assert_equal(*kernels, *arrays(87, V=values, dtype=dtype), *sinks, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("window", [None, 2, 17, 70, 400])
def test_looped_blocks_equal_whole_scores(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    monkeypatch.setattr(attention_blockwise, "MAX_BLOCK", 16)
    monkeypatch.setattr(attention_blockwise, "MAX_SPANS", 3)
    kernels = (functools.partial(function, window=window, scale=0.7) for function in (attention, whole))
    assert_equal(*kernels, *arrays(203, H=10))


def multiplications(jaxpr) -> int:
    """Return the multiplications in the products of a program, those in loops as often as they are made."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += equation.outvars[0].aval.size * int(np.prod([left[axis] for axis in contracted]))
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        inner = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr"))
        total += times * sum(
            multiplications(getattr(x, "jaxpr", x)) for x in inner if hasattr(x, "jaxpr") or hasattr(x, "eqns")
        )
    return total


@pytest.mark.parametrize(("window", "limit"), [(None, 0.6), (100, 0.07)])
def test_work_is_in_proportion_to_the_window(window: int | None, limit: float) -> None:
    """Against scores between all tokens, which a causal row needs half of."""

    def gradient(T: int) -> int:
        q = jax.ShapeDtypeStruct((1, T, 4, 16), jnp.float32)
        loss = jax.grad(lambda q, k, v: attention(q, k, v, None, window=window).sum(), (0, 1, 2))
        return multiplications(jax.make_jaxpr(loss)(q, q, q).jaxpr)

    assert gradient(4096) < limit * 7 * 4 * 16 * 4096**2
    if window is not None:
        assert gradient(8192) <= 2 * gradient(4096)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("block", "window"), [(128, None), (16, None), (16, 12)])
def test_completions_see_the_prompt_they_share(
    monkeypatch: pytest.MonkeyPatch, block: int, window: int | None, dtype: str
) -> None:
    monkeypatch.setattr(attention_blockwise, "MAX_BLOCK", block)
    monkeypatch.setattr(attention_blockwise, "MAX_SPANS", 3)
    q, k, v, _, g = arrays(150, dtype=dtype)
    kernels = (functools.partial(function, window=window) for function in (attention, whole))
    assert_equal(*kernels, q, k, v, prefixed(150), g, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("window", [None, 4, 12])
def test_shared_equals_unshared(window: int | None) -> None:
    """A completion behind a prompt that others share gets what it gets behind one of its own."""
    q, k, v, _, _ = arrays(60, B=1)
    segments = prefixed(60, B=1)
    own_T, prefix_T = (np.asarray(ids_BT[0]) for ids_BT in segments[:2])
    tokens_BT, lengths_B = np.zeros((7, 20), int), np.zeros(7, int)
    for b in range(7):
        tokens = np.flatnonzero((own_T == b + 1) | (own_T == prefix_T[own_T == b + 1][0]))
        tokens_BT[b, : len(tokens)], lengths_B[b] = tokens, len(tokens)
    kernel = jax.jit(functools.partial(attention, window=window, softcap=2.0))
    shared, alone = kernel(q, k, v, segments)[0], kernel(*(x[0, tokens_BT] for x in (q, k, v)), None)
    for b, length in enumerate(lengths_B):
        np.testing.assert_allclose(shared[tokens_BT[b, :length]], alone[b, :length], atol=1e-5)


@pytest.mark.parametrize("segments", ["whole", "prefixed"])
@pytest.mark.parametrize(("T", "window"), [(64, None), (37, None), (37, 6)])
def test_the_mask_given_to_cudnn_is_the_same(
    monkeypatch: pytest.MonkeyPatch, T: int, window: int | None, segments: str
) -> None:
    """The kernel itself needs a GPU: here XLA takes its place, with the same arguments."""
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, **k: plain(*a, **k | {"implementation": "xla"}))
    q, k, v, segments_BT, g = arrays(T)
    kernel = functools.partial(cudnn, scale=0.25, window=window)
    given = segments_BT if segments == "whole" else prefixed(T)
    assert_equal(kernel, functools.partial(whole, scale=0.25, window=window), q, k, v, given, g)


@pytest.mark.parametrize(
    ("needs", "best"),
    [
        (Needs(64), "cudnn"),
        (Needs(64, 64), "cudnn"),
        (Needs(256), "blockwise"),
        (Needs(192, 128), "blockwise"),
        (Needs(128, 64), "blockwise"),
        (Needs(64, softcap=True), "blockwise"),
        (Needs(64, sinks=True), "blockwise"),
    ],
)
def test_a_gpu_takes_the_kernel_that_knows_what_is_needed(
    monkeypatch: pytest.MonkeyPatch, needs: Needs, best: str
) -> None:
    monkeypatch.setattr(mesh, "platform", lambda: "gpu")
    assert choose("auto", jnp.bfloat16, needs).__name__ == best
    assert shares_prompts("auto", jnp.bfloat16, needs)
    if best != "cudnn":
        with pytest.raises(UserError, match=rf"attention=cudnn.*soft caps and sinks.*{needs.head_dim}.*attention=auto"):
            choose("cudnn", jnp.bfloat16, needs)


def test_what_cannot_share_prompts_says_so() -> None:
    q, k, v, _, _ = arrays(32)
    assert shares_prompts("auto", jnp.float32, Needs(16))
    assert shares_prompts("cudnn", jnp.bfloat16, Needs(16))
    assert not shares_prompts("splash", jnp.float32, Needs(16))
    with pytest.raises(ValueError, match="without sharing"):
        splash(q, k, v, prefixed(32), scale=0.25, window=None, interpret=True)
    with pytest.raises(ValueError, match="lack positions"):
        attention(q, k, v, prefixed(32)._replace(positions_BT=None), window=8)


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
    q, k, v, segments_BT, g = arrays(40, B=8, N=8, K=2, V=8)
    given = (q, k, v, segments_BT, g, jnp.linspace(-1.0, 2.0, 8))
    expected = value_and_gradients(attention, *given)
    keys = ModelKeys(ici_data_parallelism=axes[0], ici_fsdp_parallelism=axes[1], ici_tensor_parallelism=axes[2])
    windowed = functools.partial(attention, window=7)
    shared = value_and_gradients(windowed, q, k, v, prefixed(40, B=8), g)
    with mesh.use(mesh.make(keys)):
        for one, other in zip(value_and_gradients(attention, *given), expected, strict=True):
            assert_close(one, other)
        for one, other in zip(value_and_gradients(windowed, q, k, v, prefixed(40, B=8), g), shared, strict=True):
            assert_close(one, other)


@pytest.mark.parametrize(("B", "N"), [(3, 8), (8, 3)])
def test_rows_or_heads_that_do_not_divide_stay_whole(B: int, N: int) -> None:
    q, k, v, segments_BT, g = arrays(24, B=B, N=N, K=1)
    given = (q, k, v, segments_BT, g, jnp.linspace(-1.0, 2.0, N))
    expected = value_and_gradients(attention, *given)
    with mesh.use(mesh.make(ModelKeys(ici_fsdp_parallelism=4, ici_tensor_parallelism=2))):
        for one, other in zip(value_and_gradients(attention, *given), expected, strict=True):
            assert_close(one, other)


@pytest.mark.parametrize(("implementation", "device"), [("cudnn", "NVIDIA GPU"), ("splash", "TPU")])
def test_a_kernel_of_another_platform_is_refused(implementation: str, device: str) -> None:
    q, k, v, segments_BT, _ = arrays(8)
    with pytest.raises(UserError, match=rf"attention={implementation}.*{device}.*cpu.*attention=auto"):
        attention(q, k, v, segments_BT, implementation=implementation)


@pytest.mark.parametrize(
    ("T", "window", "softcap", "values", "sinks"),
    [(128, None, None, 16, []), (150, 40, None, 24, [SINKS]), (256, 40, 0.8, 16, []), (128, None, 2.5, 8, [SINKS])],
)
def test_splash_interpreted_equals_whole_scores(
    T: int, window: int | None, softcap: float | None, values: int, sinks: list
) -> None:
    kernel = functools.partial(splash, scale=0.25, window=window, softcap=softcap, interpret=True)
    reference = functools.partial(whole, scale=0.25, window=window, softcap=softcap)
    assert_equal(kernel, reference, *arrays(T, V=values), *sinks)


def over_context(strategy: str, **settings):
    """Return attention whose arrays are spread over the context axis and put together again."""

    def function(q, k, v, segments, **sinks):
        spread = (zigzag.spread(x) for x in (q, k, v))
        ids = zigzag.spread_segments(segments, q[:, :, 0, 0])
        return zigzag.natural(attention(*spread, ids, context=strategy, **settings, **sinks), q.shape[1])

    return function


CONTEXTS = {
    "plain": ({}, 64, None, []),
    "segments, a length that does not divide": ({}, 75, "whole", []),
    "window, soft cap, sinks": ({"window": 20, "softcap": 2.5}, 75, "whole", [jnp.linspace(-1.0, 2.0, 8)]),
    "window": ({"window": 20}, 75, "whole", []),
    "shared prompts": ({}, 75, "prefixed", []),
    "shared prompts, window": ({"window": 9}, 75, "prefixed", []),
}
FIRST_CONTEXT = {("ring", "shared prompts, window"), ("all_gather", "window, soft cap, sinks")}


def knows(kernel: str, case: str) -> bool:
    """Say whether a kernel can be asked for this."""
    return not (kernel == "splash" and "shared" in case) and not (kernel == "cudnn" and "sinks" in case)


@pytest.mark.parametrize(
    ("strategy", "case"),
    [
        pytest.param(strategy, case, marks=[] if (strategy, case) in FIRST_CONTEXT else pytest.mark.slow)
        for strategy in ("ring", "all_gather", "splash", "cudnn")
        for case in CONTEXTS
        if knows(strategy, case)
    ],
)
def test_rows_over_several_devices_equal_one(monkeypatch: pytest.MonkeyPatch, strategy: str, case: str) -> None:
    """By each kernel: splash interpreted, cuDNN's place taken by XLA with the same arguments."""
    settings, T, kind, sinks = CONTEXTS[case]
    q, k, v, segments, g = arrays(T, B=4, N=8, K=2, V=None if strategy == "cudnn" else 8)
    segments = {None: None, "whole": segments, "prefixed": prefixed(T, B=4)}[kind]
    expected = value_and_gradients(functools.partial(attention, **settings), q, k, v, segments, g, *sinks)
    monkeypatch.setattr(attention_context, "MAX_BLOCK", 16)
    if strategy in ("splash", "cudnn"):
        plain = jax.nn.dot_product_attention
        monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, **k: plain(*a, **k | {"implementation": "xla"}))
        kernel = {"splash": functools.partial(splash, interpret=True), "cudnn": cudnn}[strategy]
        monkeypatch.setattr(attention_module, "choose", lambda *_: kernel)
        strategy = "all_gather"
    keys = ModelKeys(ici_context_parallelism=4, ici_fsdp_parallelism=1, ici_tensor_parallelism=2)
    with mesh.use(mesh.make(keys)):
        found = value_and_gradients(over_context(strategy, **settings), q, k, v, segments, g, *sinks)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("strategy", [pytest.param("ring", marks=pytest.mark.slow), "all_gather"])
def test_blocks_that_no_token_sees_are_left_out(monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    """Were they multiplied, what is spoiled in them would spoil all."""
    monkeypatch.setattr(attention_context, "MAX_BLOCK", 16)
    q, k, v, *_ = arrays(128, B=1, N=8)
    first = (jnp.arange(128) < 64)[None]
    spoiled = [jnp.where(first[:, :, None, None], x, jnp.nan) for x in (k, v)]
    with mesh.use(mesh.make(ModelKeys(ici_context_parallelism=4, ici_fsdp_parallelism=1, ici_tensor_parallelism=2))):
        for segments in (None, jnp.where(first, 1, 2)):
            o = jax.jit(over_context(strategy))(q, *spoiled, segments)
            assert np.isfinite(o[:, :64]).all()
        o = jax.jit(over_context(strategy))(q, *(x[:, ::-1] for x in spoiled), jnp.where(first, 1, 2))
        assert np.isfinite(o[:, 64:]).all()
