"""Mixtures of experts against Transformers' own blocks by way of its checkpoints, replay, padding, and the mesh."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_close
from jax.sharding import PartitionSpec as P

from luthier import mesh
from luthier.config import ModelKeys
from luthier.errors import UserError
from luthier.model import dispatch, router
from luthier.model.compute import Compute
from luthier.model.context import Here
from luthier.model.mlp import Mlp
from luthier.model.moe import Clamp, Moe
from luthier.model.param import Param, initialise, map_spec, shardings, stacked

D, F, E, K = 16, 8, 8, 3
BLOCK = "model.layers.{layer}."
COMMON = {
    "vocab_size": 32,
    "hidden_size": D,
    "intermediate_size": F,
    "moe_intermediate_size": F,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": K,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 8,
    "pad_token_id": 0,
}
SHARED = Mlp(2 * F, prefix="mlp.shared_experts")
VARIANTS: dict[str, tuple[Moe, dict[str, Any]]] = {
    "mixtral": (
        Moe(experts=E, top_k=K, size=F, normalised=True, prefix="block_sparse_moe", names=("w1", "w3", "w2")),
        {"num_local_experts": E},
    ),
    "qwen3_moe": (
        Moe(experts=E, top_k=K, size=F, normalised=True),
        {"num_experts": E, "norm_topk_prob": True},
    ),
    "olmoe": (Moe(experts=E, top_k=K, size=F), {"num_experts": E, "norm_topk_prob": False}),
    "deepseek_v2": (
        Moe(experts=E, top_k=K, size=F, scaling=2.0, groups=4, top_groups=2, shared=SHARED),
        {"n_routed_experts": E, "n_shared_experts": 2, "topk_method": "group_limited_greedy", "n_group": 4}
        | {"topk_group": 2, "routed_scaling_factor": 2.0},
    ),
    "deepseek_v3": (
        Moe(
            experts=E, top_k=K, size=F, scoring="sigmoid", normalised=True, scaling=2.5, groups=4, top_groups=2,
            correction=True, shared=SHARED,
        ),
        {"n_routed_experts": E, "n_shared_experts": 2, "n_group": 4, "topk_group": 2, "norm_topk_prob": True}
        | {"routed_scaling_factor": 2.5},
    ),
    "gpt_oss": (
        Moe(
            experts=E, top_k=K, size=F, scoring="softmax_of_chosen", router="router", router_bias=True, fused=True,
            clamp=Clamp(limit=1.0),
        ),
        {"num_local_experts": E, "swiglu_limit": 1.0},
    ),
}  # fmt: skip
PLAIN = VARIANTS["deepseek_v3"][0]
EMPTY = Here(positions_BT=jnp.zeros((1, 1), jnp.int32), segments=None, compute=Compute(), ropes={})


def here(segments: Any = None, routes_BTk: jax.Array | None = None) -> Here:
    return dataclasses.replace(EMPTY, segments=segments, routes_BTk=routes_BTk)


def weights(moe: Moe, seed: int = 0) -> Any:
    """Return random weights, biases included, of one layer."""
    spec = map_spec(lambda param: dataclasses.replace(param, init="normal"), moe.spec(D, BLOCK))
    one = mesh.make(ModelKeys(), jax.devices()[:1])
    return jax.tree.map(np.asarray, initialise(spec, jax.random.key(seed), jnp.float32, one, scale=0.3))


def inputs(rows: int = 8, length: int = 6) -> tuple[jax.Array, jax.Array]:
    x_BTD, g_BTD = jax.random.normal(jax.random.key(1), (2, rows, length, D))
    return x_BTD, g_BTD


def with_gradients(moe: Moe, p: Any, x_BTD: jax.Array, g_BTD: jax.Array, told: Here) -> tuple[Any, ...]:
    """Return (output, Routed, gradient of the weights, gradient of the input)."""

    def loss(p: Any, x_BTD: jax.Array) -> Any:
        out_BTD, routed = moe.apply(p, x_BTD, told)
        return jnp.sum(out_BTD * g_BTD), (out_BTD, routed)

    (_, (out_BTD, routed)), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(p, x_BTD)
    return out_BTD, routed, *gradients


def saved(model: Any, spec: Any, folder: Path) -> Any:
    """Return our weights from the checkpoint that Transformers writes of its model; all of its experts' are used."""
    from safetensors.numpy import load_file

    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    used = set()

    def fill(param: Param) -> jax.Array:
        array = np.empty(param.shape, np.float32)
        for name, place in param.tensors().items():
            assert tensors[name].shape == param.tensor_shape
            array[place] = param.from_tensor(tensors[name])
            used.add(name)
        return jnp.asarray(array[0])

    filled = map_spec(fill, stacked(spec, "layer", [0]))
    of_block = {name for name in tensors if any(word in name for word in (".mlp.", ".block_sparse_moe."))}
    assert used == of_block
    return filled


@pytest.mark.parametrize("name", VARIANTS)
def test_values_and_gradients_equal_transformers(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    moe, fields = VARIANTS[name]
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(name, **COMMON | fields))
    model = model.float().train()  # evaluation may take kernels without a gradient
    block = model.model.layers[0].mlp
    torch.manual_seed(0)
    for tensor in block.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape) * 0.3)
    spec = moe.spec(D, BLOCK)
    p = saved(model, spec, tmp_path / "weights")
    x_BTD, g_BTD = inputs(2, 10)
    x = torch.tensor(np.asarray(x_BTD), requires_grad=True)
    out = block(x)
    out = out[0] if isinstance(out, tuple) else out
    (out * torch.tensor(np.asarray(g_BTD))).sum().backward()
    ours, _, dp, dx_BTD = with_gradients(moe, p, x_BTD, g_BTD, here())
    assert_close(ours, out.detach())
    assert_close(dx_BTD, x.grad)
    for weight in block.parameters():
        weight.data = weight.grad
    gradients = saved(model, spec, tmp_path / "gradients")
    correction = dp.pop("correction", None)
    assert correction is None or not correction.any()
    gradients.pop("correction", None)
    jax.tree.map(assert_close, dp, gradients)


def test_axes_are_those_of_the_mesh() -> None:
    spec = stacked(VARIANTS["gpt_oss"][0].spec(D, BLOCK), "layer", range(2))
    split = stacked(VARIANTS["mixtral"][0].spec(D, BLOCK), "layer", range(2))
    devices = mesh.make(ModelKeys(ici_fsdp_parallelism=2, ici_expert_parallelism=2, ici_tensor_parallelism=2))
    for tree in (spec, split):
        placed = {name: sharding.spec for name, sharding in shardings(tree, devices).items()}
        assert placed["gate"] == placed["up"] == P(None, ("expert",), ("fsdp",), ("tensor",))
        assert placed["down"] == P(None, ("expert",), ("tensor",), ("fsdp",))
    assert split["gate"].tensors()["model.layers.1.block_sparse_moe.experts.5.w1.weight"] == (1, 5)
    odd = dataclasses.replace(PLAIN, experts=6, groups=1, top_groups=1).spec(D, BLOCK)
    eight = mesh.make(ModelKeys(ici_expert_parallelism=8))
    with pytest.raises(UserError, match="expert=8 does not divide the 6 of axis `expert`"):
        shardings(odd, eight)


def test_replay_sends_tokens_where_they_went_before() -> None:
    x_BTD, g_BTD = inputs()
    before, after = weights(PLAIN), weights(PLAIN, seed=1)
    apply = jax.jit(lambda p, routes_BTk: PLAIN.apply(p, x_BTD, here(None, routes_BTk)))
    _, old = apply(before, None)
    mixed = after | {"router": before["router"], "correction": before["correction"]}
    out_BTD, routed, dp, _ = with_gradients(PLAIN, mixed, x_BTD, g_BTD, here(None, old.chosen_BTk))
    np.testing.assert_array_equal(routed.chosen_BTk, old.chosen_BTk)
    expected_BTD, _, expected, _ = with_gradients(PLAIN, mixed, x_BTD, g_BTD, here())
    assert_close(out_BTD, expected_BTD)  # the router that chose chooses the same again
    jax.tree.map(assert_close, dp, expected)
    elsewhere_BTD, routed = apply(after, old.chosen_BTk)
    np.testing.assert_array_equal(routed.chosen_BTk, old.chosen_BTk)
    assert not np.allclose(elsewhere_BTD, apply(after, None)[0])


def test_padding_reaches_no_expert_and_counts_for_nothing() -> None:
    moe, p = dataclasses.replace(PLAIN, shared=None), weights(dataclasses.replace(PLAIN, shared=None))
    x_BTD, g_BTD = inputs()
    segments_BT = (jnp.arange(6) < jnp.arange(8)[:, None]).astype(jnp.int32)
    out_BTD, routed, dp, dx_BTD = with_gradients(moe, p, x_BTD, g_BTD, here(segments_BT))
    assert not out_BTD[segments_BT == 0].any()
    assert not dx_BTD[segments_BT == 0].any()
    whole_BTD, everywhere, expected, _ = with_gradients(
        moe, p, x_BTD, jnp.where(segments_BT[..., None] > 0, g_BTD, 0), here()
    )
    assert_close(out_BTD, jnp.where(segments_BT[..., None] > 0, whole_BTD, 0))
    jax.tree.map(assert_close, dp, expected)
    assert routed.tokens == segments_BT.sum()
    assert everywhere.tokens == segments_BT.size
    assert routed.counts_E.sum() == K * segments_BT.sum()


def test_types_are_the_activations_and_the_weights() -> None:
    x_BTD, g_BTD = inputs()
    p = weights(PLAIN)
    short = dataclasses.replace(here(), compute=Compute(jnp.dtype("bfloat16")))
    out_BTD, routed, dp, dx_BTD = with_gradients(PLAIN, p, x_BTD.astype(jnp.bfloat16), g_BTD, short)
    assert out_BTD.dtype == dx_BTD.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(dp)} == {jnp.dtype("float32")}
    assert routed.squared_lse.dtype == jnp.float32
    assert routed.chosen_BTk.dtype == jnp.int32
    expected_BTD, *_ = with_gradients(PLAIN, p, x_BTD, g_BTD, here(None, routed.chosen_BTk))
    assert_close(out_BTD, expected_BTD, 2e-2)


def test_where_tokens_go_does_not_recompile() -> None:
    x_BTD, _ = inputs()
    traced = []

    @jax.jit
    def apply(p: Any, x_BTD: jax.Array) -> jax.Array:
        traced.append(x_BTD.shape)
        return PLAIN.apply(p, x_BTD, here())[0]

    for seed in range(3):
        apply(weights(PLAIN, seed), x_BTD * seed)
    assert len(traced) == 1


MESHES = {
    "expert 2 fsdp 4": {"ici_expert_parallelism": 2},
    "expert 4 tensor 2": {"ici_expert_parallelism": 4, "ici_tensor_parallelism": 2},
    "expert 8": {"ici_expert_parallelism": 8},
    "data 2 fsdp 2 expert 2": {"ici_data_parallelism": 2, "ici_expert_parallelism": 2},
    "fsdp 4 tensor 2": {"ici_tensor_parallelism": 2},
}
MIXED = {"ici_expert_parallelism": 2, "ici_tensor_parallelism": 2}


def ragged_by_gathering(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """``jax.lax.ragged_all_to_all`` as its documentation says it, which a CPU does not have."""
    me = jax.lax.axis_index(axis_name)
    arrays = (operand, input_offsets, send_sizes, output_offsets)
    operands, begins, sizes, places = (jax.lax.all_gather(array, axis_name) for array in arrays)
    for sender in range(len(operands)):
        row = jnp.arange(len(output)) - places[sender, me]
        arrives = (row >= 0) & (row < sizes[sender, me])
        sent = operands[sender].at[row + begins[sender, me]].get(mode="clip")
        output = jnp.where(arrives[:, None], sent, output)
    # What is said to come is what was sent.
    return jnp.where((recv_sizes == sizes[:, me]).all(), output, jnp.nan)


@functools.cache
def on_one_device(moe: Moe, rows: int) -> tuple[Any, ...]:
    """Return (weights, batch, what comes out) of a batch with some padding."""
    batch = (*inputs(rows), jnp.ones((rows, 6), jnp.int32).at[-1, 3:].set(0))
    p = weights(moe)
    return p, batch, with_gradients(moe, p, *batch[:2], here(batch[2]))


def assert_equal_on_mesh(moe: Moe, axes: dict[str, int], rows: int = 8) -> None:
    """Compare eight devices with one."""
    p, batch, expected = on_one_device(moe, rows)
    with mesh.use(mesh.make(ModelKeys(**axes))) as devices:
        p = jax.tree.map(jax.device_put, p, shardings(moe.spec(D, BLOCK), devices))
        x_BTD, g_BTD, segments_BT = (
            jax.device_put(array, mesh.sharding(("batch", "time", "norm")[: array.ndim], array.shape, devices))
            for array in batch
        )
        ours = with_gradients(moe, p, x_BTD, g_BTD, here(segments_BT))
    np.testing.assert_array_equal(ours[1].chosen_BTk, expected[1].chosen_BTk)
    jax.tree.map(assert_close, ours, expected)


@pytest.fixture
def travelling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are sent as on a GPU or TPU."""
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_by_gathering)
    monkeypatch.setattr(dispatch, "gathered", dispatch.exchanged)


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
def test_eight_devices_equal_one(axes: dict[str, int]) -> None:
    assert_equal_on_mesh(PLAIN, axes)


def test_eight_devices_equal_one_where_the_batch_does_not_split() -> None:
    assert_equal_on_mesh(PLAIN, MESHES["expert 4 tensor 2"], rows=2)


def test_eight_devices_equal_one_with_biases() -> None:
    assert_equal_on_mesh(VARIANTS["gpt_oss"][0], MIXED)


def test_rows_that_travel_alone_give_the_same_with_biases(travelling: None) -> None:
    assert_equal_on_mesh(VARIANTS["gpt_oss"][0], MIXED)


@pytest.mark.parametrize("name", ["expert 8", "data 2 fsdp 2 expert 2"])
def test_rows_that_travel_alone_give_the_same(name: str, travelling: None) -> None:
    assert_equal_on_mesh(PLAIN, MESHES[name])


@pytest.mark.parametrize("way", ["gathered", "exchanged"])
def test_nothing_is_dropped_where_all_go_to_one_device(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_by_gathering)
    monkeypatch.setattr(dispatch, "gathered", getattr(dispatch, way))
    moe = Moe(experts=E, top_k=2, size=F, router_bias=True)
    biased = weights(moe) | {"router_bias": jnp.where(jnp.arange(E) // 2 == 1, 50.0, 0.0)}
    x_BTD, _ = inputs()
    expected_BTD, routed = jax.jit(lambda p, x: moe.apply(p, x, here()))(biased, x_BTD)
    assert routed.counts_E[2] == routed.counts_E[3] == x_BTD.shape[0] * x_BTD.shape[1]
    with mesh.use(mesh.make(ModelKeys(ici_expert_parallelism=4))):
        assert_close(jax.jit(lambda p, x: moe.apply(p, x, here())[0])(biased, x_BTD), expected_BTD)


def test_other_platforms_lower_to_their_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    p, (x_BTD, g_BTD) = weights(PLAIN), inputs()
    with mesh.use(mesh.make(ModelKeys(ici_expert_parallelism=4))):
        monkeypatch.setattr(mesh, "platform", lambda: "tpu")
        loss = lambda p, x: jnp.sum(PLAIN.apply(p, x, here())[0] * g_BTD)  # noqa: E731
        text = jax.jit(jax.value_and_grad(loss, (0, 1))).trace(p, x_BTD).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("ragged_all_to_all") >= 4
    assert text.count("ragged_dot") >= 9


def test_a_scan_over_layers_sums_what_was_routed() -> None:
    layers = [weights(PLAIN, seed) for seed in range(2)]
    x_BTD, _ = inputs()

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("dense"))
    def layer(x_BTD: jax.Array, p: Any) -> tuple[jax.Array, router.Routed]:
        return PLAIN.apply(p, x_BTD, here())

    def loss(x_BTD: jax.Array) -> jax.Array:
        _, routed = jax.lax.scan(layer, x_BTD, jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers))
        assert routed.counts_E.shape == (2, E)
        return router.load_balance(routed)[0] + router.router_z(routed)[0]

    def expected(x_BTD: jax.Array) -> jax.Array:
        total = 0.0
        for p in layers:
            x_BTD, routed = PLAIN.apply(p, x_BTD, here())
            total += (router.load_balance(routed)[0] + router.router_z(routed)[0]) / 2
        return total

    ours, theirs = (jax.jit(jax.value_and_grad(function))(x_BTD) for function in (loss, expected))
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other)
