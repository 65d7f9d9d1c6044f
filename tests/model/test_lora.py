"""Adapters against the weights that they stand for, on one device and on eight, and what of them is not computed."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import adapters as adapting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import TOLERANCE as ROUNDING
from compare import assert_close
from test_cached_forward import pieces_logp

import tiny
from luthier import mesh as mesh_lib
from luthier.config import ModelKeys
from luthier.errors import UserError
from luthier.model import cache, cross_entropy, lora, low_rank, param, quant, targets
from luthier.model.compute import Compute
from luthier.model.dense import dense
from luthier.model.experts import grouped
from luthier.model.lora import Adapter, Lora
from luthier.model.model import Model
from luthier.types import Batch

TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3
PLAIN = Adapter(4, 8.0)
# All but the routed experts, which have no DoRA and no dropout.
LINEAR = r".*layers\.\d+\.(?!mlp\.experts\.).*"
DORA = Adapter(4, 8.0, dora=True, targets=LINEAR)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
KINDS = [*tiny.KINDS]
kinds_first = pytest.mark.parametrize(
    "kind", [kind if kind == "llama" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
both_ways = pytest.mark.parametrize("adapter", [PLAIN, DORA], ids=["lora", "dora"])


@functools.cache
def base_of(kind: str) -> Any:
    return tiny.random_params(tiny.kind_model(kind).spec)


def one_device() -> Any:
    return mesh_lib.make(ModelKeys(), jax.devices()[:1])


def batch() -> Batch:
    return jax.tree.map(jnp.asarray, tiny.make_batch(8, 16))


def quantised(model: Model, base: Any, kind: str) -> Any:
    """Return a model's weights with those quantised that are."""

    def one(declared: param.Param, whole: jax.Array, kind: str) -> Any:
        if not kind:
            return whole
        lead = declared.shape[: len(declared.stack)]
        slices = [quant.quantised(declared, np.asarray(whole[place]), kind) for place in np.ndindex(*lead)]
        return jax.tree.map(lambda *fields: jnp.asarray(np.stack(fields).reshape(*lead, *fields[0].shape)), *slices)

    return param.map_spec(one, model.spec, base, quant.plan(model.spec, kind))


def logits(model: Model, params: Any) -> np.ndarray:
    return np.asarray(jax.jit(lambda p: model.logits(p, batch(), Compute()), compiler_options=QUICK)(params))


def loss(model: Model, params: Any, compute: Compute) -> jax.Array:
    here = batch()
    return -jnp.sum(model.score(params, here, compute).logp_BT * here.mask_BT) / jnp.sum(here.mask_BT)


COMPUTE = Compute()


def gradient(
    model: Model, base: Any, adapter: Adapter, adapters: Any, compute: Compute = COMPUTE, key: Any = None
) -> Any:
    """Return (loss, its gradient by the adapters)."""

    def of(adapters: Any, base: Any) -> jax.Array:
        return loss(model, lora.attach(model.spec, base, adapter, adapters, key), compute)

    return jax.jit(jax.value_and_grad(of), compiler_options=QUICK)(adapters, base)


def assert_gradients_close(found: Any, wanted: Any) -> None:
    for path, tensor in param.leaves(wanted).items():
        error, size = np.abs(param.leaves(found)[path] - np.asarray(tensor)).max(), np.abs(tensor).max()
        assert error <= GRADIENT_TOLERANCE * size + 1e-7, f"{path}: {error} of {size}"


def test_the_product_is_that_of_the_sum_by_hand() -> None:
    w_DF, a_RD, b_FR = jnp.ones((2, 3)), jnp.array([[1.0, -1.0]]), jnp.array([[1.0], [0.0], [2.0]])
    x_BTD = jnp.array([[[3.0, 1.0]]])
    plain = Lora(w_DF, a_RD, b_FR, scale=0.5)  # x sums to 4; a of x is 2, half of which is b's factor
    np.testing.assert_allclose(dense("BTD,DF->BTF", x_BTD, plain), [[[5.0, 4.0, 6.0]]])
    # The rows are (1.5, 0.5), (1, 1) and (2, 0).
    dora = dataclasses.replace(plain, magnitude=jnp.array([1.0, 1.0, 3.0]))
    np.testing.assert_allclose(dense("BTD,DF->BTF", x_BTD, dora), [[[5 / 2.5**0.5, 4 / 2**0.5, 9.0]]], rtol=1e-6)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 4.0)])
def test_the_scale_is_alpha_over_the_rank_or_its_root(rslora: bool, scale: float) -> None:
    assert Adapter(4, 8.0, rslora=rslora).scale == scale


@kinds_first
@both_ways
def test_adapted_is_merged(kind: str, adapter: Adapter) -> None:
    model, base = tiny.kind_model(kind), base_of(kind)
    adapters = adapting.random_adapters(model, adapter)
    found = logits(model, lora.attach(model.spec, base, adapter, adapters))
    assert_close(found, logits(model, adapting.merged(model, base, adapter, adapters)))
    assert np.abs(found - logits(model, base)).max() > 0.1


@pytest.mark.parametrize("adapter", [PLAIN, DORA], ids=["lora", "dora"])
@pytest.mark.parametrize("quantization", ["", pytest.param("nf4", marks=pytest.mark.slow)])
def test_latent_attention_with_a_past_is_that_without(adapter: Adapter, quantization: str) -> None:
    """Where queries go into the space of small vectors, adapters go with them."""
    model = tiny.kind_model("deepseek-v3")
    base = base_of("deepseek-v3")
    base = quantised(model, base, quantization) if quantization else base
    params = lora.attach(model.spec, base, adapter, adapting.random_adapters(model, adapter))
    tokens_BT = np.random.default_rng(0).integers(0, 272, (2, 12), dtype=np.int32)
    positions_BT, ones_BT = np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12)), np.ones_like(tokens_BT)
    with mesh_lib.use(one_device()):
        whole = Batch(tokens_BT, positions_BT, ones_BT, ones_BT)
        run = jax.jit(lambda p: jax.nn.log_softmax(model.logits(p, whole, Compute())), compiler_options=QUICK)
        wanted = run(params)
        empty = cache.make(model.cache_lines, 2, 16, jnp.float32, one_device())
        found = pieces_logp(model, params, tokens_BT, [[5, 7], [7, 5]], jnp.asarray([0, 1]), empty)
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE, rtol=0)


@kinds_first
def test_fresh_adapters_change_nothing(kind: str) -> None:
    model, base, key = tiny.kind_model(kind), base_of(kind), jax.random.key(0)
    wanted = logits(model, base)

    def start(adapter: Adapter, origin: bool = False) -> np.ndarray:
        adapters = lora.initialise(model.spec, base, adapter, key, one_device())
        params = lora.attach(model.spec, base, adapter, adapters, origin=adapters if origin else None)
        return logits(model, params)

    assert_close(start(PLAIN), wanted)
    assert_close(start(DORA), wanted)
    assert_close(start(dataclasses.replace(PLAIN, init="pissa"), origin=True), wanted)
    assert lora.attach(model.spec, base, PLAIN, None) is base


@kinds_first
def test_a_fresh_adapter_adds_exactly_nothing(kind: str) -> None:
    """Operation by operation: whole programs are fused in other ways with an adapter than without, and round so."""
    model, base = tiny.kind_model(kind), base_of(kind)
    adapters = lora.initialise(model.spec, base, PLAIN, jax.random.key(0), one_device())
    batch = tiny.make_batch(2, 16)
    with mesh_lib.use(one_device()), jax.disable_jit():
        adapted = model.logits(lora.attach(model.spec, base, PLAIN, adapters), batch, Compute())
        np.testing.assert_array_equal(adapted, model.logits(base, batch, Compute()))


def test_fresh_adapters_are_drawn_as_pefts() -> None:
    model = tiny.kind_model("llama")
    draw = functools.partial(lora.initialise, model.spec, base_of("llama"), PLAIN, mesh=one_device())
    adapters, again, other = draw(key=jax.random.key(0)), draw(key=jax.random.key(0)), draw(key=jax.random.key(1))
    a = np.asarray(adapters["layers"]["0"]["mlp"]["down_proj"]["a"])
    assert a.shape == (3, 4, 128)
    assert a.dtype == np.float32
    assert np.abs(a).max() <= 128**-0.5 < 1.05 * np.abs(a).max()
    assert abs(a.std() - (3 * 128) ** -0.5) < 0.05 * a.std()
    assert not np.asarray(adapters["layers"]["0"]["mlp"]["down_proj"]["b"]).any()
    np.testing.assert_array_equal(a, again["layers"]["0"]["mlp"]["down_proj"]["a"])
    assert not np.array_equal(a, other["layers"]["0"]["mlp"]["down_proj"]["a"])
    assert not np.array_equal(a[0], a[1])


def test_pissa_takes_the_greatest_part_of_a_matrix() -> None:
    random = np.random.default_rng(0)
    left, right = (np.linalg.qr(random.normal(size=(size, 40)))[0] for size in (60, 90))
    matrix = (left * 0.8 ** np.arange(40)) @ right.T
    a, b = low_rank.factors(jnp.asarray(matrix, jnp.float32), 6, jax.random.key(0))
    nearest = (left[:, :6] * 0.8 ** np.arange(6)) @ right[:, :6].T
    assert_close(b @ a, nearest)
    np.testing.assert_allclose(jnp.sum(a**2, axis=1), jnp.sum(b**2, axis=0), rtol=1e-4)  # each has half of it
    few, many = low_rank.factors(jnp.asarray(matrix[:3], jnp.float32), 5, jax.random.key(0))
    assert_close(many @ few, matrix[:3])


def test_pissa_and_its_origin_train_from_the_base() -> None:
    """As PEFT, whose base is less what the adapter begins as: the gradients are the same."""
    model, base = tiny.kind_model("llama"), base_of("llama")
    adapter = dataclasses.replace(PLAIN, init="pissa")
    adapters = lora.initialise(model.spec, base, adapter, jax.random.key(0), one_device())
    negated = jax.tree.map(lambda x: x, adapters)
    for unit in lora.units(model.spec, adapter):
        own = negated
        for name in unit.path:
            own = own[name]
        own["b"] = -own["b"]
    residual = adapting.merged(model, base, adapter, negated)

    def of(adapters: Any, base: Any, origin: Any) -> Any:
        return loss(model, lora.attach(model.spec, base, adapter, adapters, origin=origin), Compute())

    run = jax.jit(jax.value_and_grad(of), compiler_options=QUICK)
    (found, found_gradient), (wanted, wanted_gradient) = run(adapters, base, adapters), run(adapters, residual, None)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert_gradients_close(found_gradient, wanted_gradient)


def test_loftq_gives_back_some_of_what_quantising_took() -> None:
    model, base = tiny.kind_model("llama"), base_of("llama")
    packed = quantised(model, base, "nf4")
    by_name = dict(zip((p.tensor for p in param.leaves(model.spec).values()), jax.tree.leaves(base), strict=True))
    adapter = Adapter(8, 4.0, init="loftq", dora=True)
    key = jax.random.key(0)
    adapters = lora.initialise(
        model.spec, packed, adapter, key, one_device(), weights=lambda declared: by_name[declared.tensor]
    )
    wanted = logits(model, base)
    plain = np.abs(logits(model, packed) - wanted).mean()
    mended = np.abs(logits(model, lora.attach(model.spec, packed, adapter, adapters)) - wanted).mean()
    assert mended < 0.9 * plain
    with pytest.raises(UserError, match=r"lora_init=loftq is for a quantised base"):
        lora.initialise(model.spec, base, adapter, key, one_device(), weights=lambda declared: None)


PARALLEL = {
    "llama": ModelKeys(ici_fsdp_parallelism=4, ici_tensor_parallelism=2),
    "deepseek-v3": ModelKeys(ici_fsdp_parallelism=2, ici_tensor_parallelism=2, ici_expert_parallelism=2),
}


@pytest.mark.parametrize(
    ("kind", "adapter", "quantization"),
    [
        ("llama", DORA, ""),
        pytest.param("deepseek-v3", PLAIN, "", marks=pytest.mark.slow),
        pytest.param("deepseek-v3", PLAIN, "nf4", marks=pytest.mark.slow),
        pytest.param("deepseek-v3", DORA, "int8", marks=pytest.mark.slow),
        pytest.param("llama", PLAIN, "int4", marks=pytest.mark.slow),
    ],
)
def test_eight_devices_equal_one(kind: str, adapter: Adapter, quantization: str) -> None:
    model, base = tiny.kind_model(kind), base_of(kind)
    base = quantised(model, base, quantization) if quantization else base
    adapters = adapting.random_adapters(model, adapter)
    wanted_loss, wanted = gradient(model, base, adapter, adapters)
    eight = mesh_lib.make(PARALLEL[kind])
    with mesh_lib.use(eight):
        base = jax.device_put(base, quant.shardings(model.spec, quantization, eight))
        placed = jax.device_put(adapters, param.shardings(lora.spec(model.spec, adapter), eight))
        found_loss, found = gradient(model, base, adapter, placed)
    np.testing.assert_allclose(found_loss, wanted_loss, rtol=1e-5)
    assert_gradients_close(found, wanted)


def test_fresh_adapters_are_the_same_on_eight_devices() -> None:
    model, eight = tiny.kind_model("llama"), mesh_lib.make(PARALLEL["llama"])
    adapter = dataclasses.replace(DORA, targets="all-linear")
    wanted = lora.initialise(model.spec, base_of("llama"), adapter, jax.random.key(0), one_device())
    with mesh_lib.use(eight):
        base = jax.device_put(base_of("llama"), param.shardings(model.spec, eight))
        found = lora.initialise(model.spec, base, adapter, jax.random.key(0), eight)
    declared = lora.spec(model.spec, adapter)
    for path, tensor in param.leaves(found).items():
        np.testing.assert_allclose(tensor, param.leaves(wanted)[path], rtol=1e-6)
        axes = param.leaves(declared)[path]
        assert tensor.sharding.is_equivalent_to(mesh_lib.sharding(axes.axes, axes.shape, eight), tensor.ndim)


@pytest.mark.parametrize(
    ("kind", "quantization"),
    [
        ("qwen3-moe", "nf4"),
        *(pytest.param("qwen3-moe", kind, marks=pytest.mark.slow) for kind in ("int8", "int4")),
        *(pytest.param("llama", kind, marks=pytest.mark.slow) for kind in quant.KINDS),
    ],
)
def test_a_quantised_base_is_the_one_that_it_stands_for(kind: str, quantization: str) -> None:
    """Values and gradients, with adapters and through the product with the codes."""
    model = tiny.kind_model(kind)
    packed = quantised(model, base_of(kind), quantization)
    floats = jax.tree.map(
        lambda leaf: leaf.materialised(jnp.float32) if hasattr(leaf, "matrix") else leaf,
        packed,
        is_leaf=lambda leaf: hasattr(leaf, "matrix"),
    )
    adapters = adapting.random_adapters(model, PLAIN)
    (found_loss, found), (wanted_loss, wanted) = (gradient(model, base, PLAIN, adapters) for base in (packed, floats))
    np.testing.assert_allclose(found_loss, wanted_loss, rtol=1e-5)
    assert_gradients_close(found, wanted)


@pytest.mark.parametrize("remat", ["dots", pytest.param("full", marks=pytest.mark.slow)])
def test_what_is_computed_again_changes_nothing(remat: str) -> None:
    model, base = tiny.kind_model("llama"), base_of("llama")
    adapter = dataclasses.replace(DORA, dropout=0.5)
    adapters, key = adapting.random_adapters(model, adapter), jax.random.key(3)
    wanted_loss, wanted = gradient(model, base, adapter, adapters, key=key)
    found_loss, found = gradient(model, base, adapter, adapters, Compute(remat=remat), key)
    np.testing.assert_allclose(found_loss, wanted_loss, rtol=1e-6)
    assert_gradients_close(found, wanted)


def test_gradients_of_a_bf16_product_are_fp32() -> None:
    random = np.random.default_rng(0)
    w, a, b, x = (jnp.asarray(random.normal(size=size), jnp.float32) for size in ((6, 5), (2, 6), (5, 2), (1, 64, 6)))

    def of(a: Any, b: Any, dtype: Any) -> Any:
        y = dense("BTD,DF->BTF", x.astype(dtype), Lora(w.astype(jnp.bfloat16).astype(dtype), a, b, scale=0.5))
        return jnp.sum(jnp.sin(y.astype(jnp.float32)))

    for ours, exact in zip(*(jax.grad(of, (0, 1))(a, b, dtype) for dtype in (jnp.bfloat16, jnp.float32)), strict=True):
        assert ours.dtype == jnp.float32
        assert_close(ours, exact, ROUNDING["bfloat16"])


def test_dropout_drops_what_it_says() -> None:
    model, base = tiny.kind_model("llama"), base_of("llama")
    adapter = Adapter(4, 8.0, dropout=0.25)
    adapters = adapting.random_adapters(model, adapter)
    params = lora.attach(model.spec, base, adapter, adapters, jax.random.key(0))
    leaf = params["layers"]["0"]["attention"]["q"]
    seen = {tuple(row) for path in ("q", "k") for row in np.asarray(params["layers"]["0"]["attention"][path].key)}
    assert len(seen) == 6  # a key for each target and layer
    one = jax.tree.map(lambda field: field[0], leaf)
    # Where the adapter passes on its input, what it adds shows what was dropped.
    wide = dataclasses.replace(one, base=jnp.zeros((64, 64)), a=jnp.eye(64), b=jnp.eye(64), scale=1.0)
    x_BTD = jnp.ones((64, 64, 64))
    y = np.asarray(dense("BTD,DF->BTF", x_BTD, wide))
    np.testing.assert_allclose(np.unique(y), [0.0, 4 / 3], rtol=1e-6)
    assert abs((y == 0).mean() - 0.25) < 0.005
    assert abs(np.corrcoef(y[0, :, 0], y[1, :, 0])[0, 1]) < 0.5
    np.testing.assert_array_equal(y, dense("BTD,DF->BTF", x_BTD, wide))
    assert lora.attach(model.spec, base, adapter, adapters)["layers"]["0"]["attention"]["q"].key is None


def test_dropout_with_dora_drops_of_the_base_what_dora_adds() -> None:
    """PEFT: y = W x + (m / |W'| - 1) W d(x) + m / |W'| s B A d(x)."""
    random = np.random.default_rng(0)
    W, A, B = (random.normal(size=size) for size in ((5, 7), (2, 7), (5, 2)))
    m, x, s = random.uniform(1, 2, 5), random.normal(size=(3, 7)), 1.5
    key = jax.random.key_data(jax.random.key(4))
    kept = np.asarray(jax.random.bernoulli(jax.random.key(4), 0.6, (1, 3, 7)))[0]
    assert 0 < kept.sum() < kept.size
    dropped = np.where(kept, x / 0.6, 0)
    factor = m / np.linalg.norm(W + s * B @ A, axis=1)
    wanted = x @ W.T + (factor - 1) * (dropped @ W.T) + factor * s * (dropped @ A.T @ B.T)
    leaf = Lora(*(jnp.asarray(v, jnp.float32) for v in (W, A, B, m)), key=key, scale=s, rate=0.4)
    assert_close(dense("BTD,FD->BTF", jnp.asarray(x, jnp.float32)[None], leaf)[0], wanted)


@pytest.mark.parametrize("kind", ["llama", pytest.param("deepseek-v3", marks=pytest.mark.slow)])
def test_rows_of_a_batch_have_adapters_of_their_own(kind: str) -> None:
    """Two adapters as one of both ranks, and a gate that opens for each row its own."""
    model, base = tiny.kind_model(kind), base_of(kind)
    ways = [Adapter(4, 8.0, targets=LINEAR), Adapter(2, 3.0, rslora=True, targets=LINEAR)]
    trees = [adapting.random_adapters(model, adapter, seed) for seed, adapter in enumerate(ways)]
    attached = [lora.attach(model.spec, base, *both) for both in zip(ways, trees, strict=True)]
    which_B = np.arange(8) % 3  # the third is the base
    gate_BR = np.zeros((8, 6), np.float32)
    gate_BR[which_B == 0, :4], gate_BR[which_B == 1, 4:] = ways[0].scale, ways[1].scale

    def joined(one: Any, other: Any) -> Any:
        if not isinstance(one, Lora):
            return one
        gates = jnp.broadcast_to(gate_BR, (one.a.shape[0], *gate_BR.shape))
        a, b = jnp.concatenate([one.a, other.a], -2), jnp.concatenate([one.b, other.b], -1)
        return Lora(one.base, a, b, gate_BR=gates)

    both = jax.tree.map(joined, *attached, is_leaf=lambda leaf: isinstance(leaf, Lora))
    alone = [logits(model, params) for params in (*attached, base)]
    wanted = np.stack([alone[which][row] for row, which in enumerate(which_B)])
    assert_close(logits(model, both), wanted)


def test_an_expert_that_gets_no_rows_has_no_gradient() -> None:
    random = np.random.default_rng(0)
    w, a, b = (jnp.asarray(random.normal(size=size), jnp.float32) for size in ((3, 6, 5), (3, 2, 6), (3, 5, 2)))
    x, sizes = jnp.asarray(random.normal(size=(16, 6)), jnp.float32), jnp.array([9, 0, 5])

    def of(a: Any, b: Any) -> Any:
        return jnp.sum(jnp.sin(grouped(x, Lora(w, a, b, scale=0.5), sizes)))

    def plainly(a: Any, b: Any) -> Any:
        return jnp.sum(jnp.sin(grouped(x, w + 0.5 * jnp.einsum("eor,eri->eio", b, a), sizes)))

    found, wanted = (jax.grad(function, (0, 1))(a, b) for function in (of, plainly))
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours, theirs)
        assert not np.asarray(ours[1]).any()


# Sizes that occur once, so that a product's shape says what it is the gradient of.
ODD = {"vocab_size": 331, "hidden_size": 44, "intermediate_size": 76, "head_dim": 12}
DOT = re.compile(r"= f32\[([\d,]+)\]\S* dot\(")


def products(model: Model, remat: str, announced: bool, adapter: Adapter | None) -> set[frozenset[int]]:
    """Return the shapes of the products in the compiled gradient, of the adapters or else of the weights."""
    base, here = tiny.random_params(model.spec), tiny.make_batch(2, 20)
    cotangent_BT = jnp.where(here.mask_BT, 1.0, 0.0) if announced else None

    def of(trained: Any, base: Any) -> Any:
        params = trained if adapter is None else lora.attach(model.spec, base, adapter, trained)
        return jnp.sum(model.score(params, here, Compute(remat=remat), cotangent_BT).logp_BT * here.mask_BT)

    trained = base if adapter is None else adapting.random_adapters(model, adapter)
    program = jax.jit(jax.grad(of)).lower(trained, base).compile(QUICK).as_text()
    return {frozenset(map(int, shape.split(","))) for shape in DOT.findall(program)}


@pytest.mark.parametrize(
    ("kind", "remat", "announced"),
    [
        ("llama", "dots", True),
        *(
            pytest.param(kind, remat, announced, marks=pytest.mark.slow)
            for kind in ("llama", "qwen3-moe", "deepseek-v3")
            for remat in ("none", "full", "dots")
            for announced in (False, True)
            if (kind, remat, announced) != ("llama", "dots", True)
        ),
    ],
)
def test_no_gradient_of_the_base_is_computed(
    kind: str, remat: str, announced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in the loop over layers, nor in that over chunks of the vocabulary, nor in that over tiles of experts."""
    monkeypatch.setitem(cross_entropy.LOGITS_LIMIT, "cpu", 331 * 4 * 11)
    sizes = ODD | ({"moe_intermediate_size": 28} if "moe_intermediate_size" in tiny.KINDS[kind] else {})
    model = Model.from_hf(tiny.KINDS[kind] | sizes, kind)
    weights = [p for name, p in param.leaves(model.spec).items() if p.decays and name != "embed"]
    shapes = _matrix_shapes(weights)
    assert shapes & products(model, remat, announced, None), "the shapes are not those that gradients have"
    for adapter in (PLAIN, Adapter(5, 8.0, targets=("o_proj",))):
        assert not shapes & products(model, remat, announced, adapter)


def _matrix_shapes(weights: list[param.Param]) -> set[frozenset[int]]:
    """Return the sizes of the weights' matrices, in any order."""
    return {frozenset(weight.tensor_shape[-2:]) for weight in weights if "router" not in weight.axes}


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        (("q_proj", "self_attn.v_proj"), {"self_attn.q_proj", "self_attn.v_proj"}),
        (r".*\.(gate|up)_proj", {"mlp.gate_proj", "mlp.up_proj"}),
        (tuple(f"model.layers.{layer}.mlp.down_proj" for layer in range(3)), {"mlp.down_proj"}),
        (
            "all-linear",
            {f"self_attn.{x}_proj" for x in "qkvo"} | {f"mlp.{x}_proj" for x in ("gate", "up", "down")},
        ),
    ],
)
def test_targets_are_named_as_in_peft(wanted: Any, names: set[str]) -> None:
    found = lora.units(tiny.kind_model("llama").spec, Adapter(4, 8.0, targets=wanted))
    assert {unit.module for unit in found} == {f"model.layers.{{layer}}.{name}" for name in names}


def test_experts_are_targets_by_their_own_name_alone() -> None:
    spec = tiny.kind_model("deepseek-v3").spec
    by_module = targets.chosen(spec, ("down_proj",))
    assert {unit.module.partition("}.")[2] for unit in by_module} == {"mlp.down_proj", "mlp.shared_experts.down_proj"}
    by_tensor = targets.chosen(spec, ("experts.down_proj",))
    assert [(unit.module.partition("}.")[2], unit.experts) for unit in by_tensor] == [("mlp.experts.down_proj", 8)]


@pytest.mark.parametrize(
    ("kind", "adapter", "message"),
    [
        (
            "llama",
            {"targets": ("q_porj",)},
            r"`q_porj` matches no module of the model\. Did you mean `q_proj`\?.*k_proj",
        ),
        ("llama", {"targets": "q_proj"}, r"the regular expression `q_proj` matches no module"),
        ("llama", {"targets": "(q"}, r"lora_target_modules=`\(q` is no regular expression"),
        ("llama", {"targets": ("q_proj", "lm_head")}, r"`lm_head` is lm_head, which cannot be adapted"),
        ("llama", {"targets": ("embed_tokens",)}, r"is model\.embed_tokens, which cannot be adapted"),
        ("qwen3-moe", {"targets": ("mlp.gate",)}, r"is model\.layers\.\*\.mlp\.gate, which cannot be adapted"),
        ("llama", {"targets": ("input_layernorm",)}, r"input_layernorm, which cannot be adapted"),
        ("llama", {"targets": r".*\.[01]\..*q_proj"}, r"names layers 0, 1 of model\.layers\.\*\.self_attn\.q_proj"),
        ("qwen3-moe", {"dora": True}, r"use_dora is set and .*experts\.gate_up_proj.* is adapted"),
        ("qwen3-moe", {"dropout": 0.1}, r"lora_dropout is set and .*experts"),
    ],
)
def test_targets_that_cannot_be_are_refused(kind: str, adapter: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        lora.spec(tiny.kind_model(kind).spec, Adapter(4, 8.0, **adapter))
