"""Routing against Transformers' routers, replay, and the router's losses."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_close

from luthier.errors import UserError
from luthier.model import router
from luthier.model.router import Routing
from luthier.model.segments import Prefixed

E, K, D = 8, 3, 16
ROUTINGS: dict[str, tuple[Routing, str, dict[str, Any]]] = {
    "mixtral": (Routing(experts=E, top_k=K, normalised=True), "mixtral.MixtralTopKRouter", {}),
    "qwen3_moe": (Routing(experts=E, top_k=K), "qwen3_moe.Qwen3MoeTopKRouter", {"norm_topk_prob": False}),
    "qwen3_moe-normalised": (
        Routing(experts=E, top_k=K, normalised=True),
        "qwen3_moe.Qwen3MoeTopKRouter",
        {"norm_topk_prob": True},
    ),
    "deepseek_v2-greedy": (
        Routing(experts=E, top_k=K, scaling=16.0),
        "deepseek_v2.DeepseekV2TopkRouter",
        {"topk_method": "greedy", "routed_scaling_factor": 16.0},
    ),
    "deepseek_v2": (
        Routing(experts=E, top_k=K, scaling=2.0, groups=4, top_groups=2),
        "deepseek_v2.DeepseekV2TopkRouter",
        {"topk_method": "group_limited_greedy", "routed_scaling_factor": 2.0, "n_group": 4, "topk_group": 2},
    ),
    "deepseek_v3": (
        Routing(
            experts=E,
            top_k=K,
            scoring="sigmoid",
            normalised=True,
            scaling=2.5,
            groups=4,
            top_groups=2,
            correction=True,
        ),
        "deepseek_v3.DeepseekV3TopkRouter",
        {"norm_topk_prob": True, "routed_scaling_factor": 2.5, "n_group": 4, "topk_group": 2},
    ),
    "gpt_oss": (
        Routing(experts=E, top_k=K, scoring="softmax_of_chosen", router_bias=True),
        "gpt_oss.GptOssTopKRouter",
        {},
    ),
}


def twin(path: str, fields: dict[str, Any]) -> Any:
    """Return Transformers' router with random weights."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    family, name = path.split(".")
    experts = {"qwen3_moe": "num_experts", "deepseek_v2": "n_routed_experts", "deepseek_v3": "n_routed_experts"}
    fields = fields | {experts.get(family, "num_local_experts"): E, "num_experts_per_tok": K}
    config = transformers.AutoConfig.for_model(family, hidden_size=D, num_attention_heads=2, **fields)
    module = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)(config)
    torch.manual_seed(0)
    for tensor in module.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape) * 0.5)
    return module


@pytest.mark.parametrize("name", ROUTINGS)
def test_choices_weights_and_gradients_equal_transformers(name: str) -> None:
    torch = pytest.importorskip("torch")
    routing, path, fields = ROUTINGS[name]
    theirs = twin(path, fields)
    state = {key: jnp.asarray(value.numpy()) for key, value in theirs.state_dict().items()}
    x_BTD = np.random.default_rng(1).normal(size=(2, 20, D)).astype(np.float32)
    logits, weights, chosen = theirs(torch.from_numpy(x_BTD).reshape(-1, D))

    def ours(w_ED: jax.Array):
        logits_BTE = router.router_logits(jnp.asarray(x_BTD), w_ED, state.get("bias"))
        weights_BTk, chosen_BTk = router.route(routing, logits_BTE, state.get("e_score_correction_bias"))
        by_expert_BTE = jnp.sum(jax.nn.one_hot(chosen_BTk, E) * weights_BTk[..., None], axis=-2)
        return jnp.sum(jnp.sin(by_expert_BTE)), (logits_BTE, by_expert_BTE)

    (_, (logits_BTE, by_expert_BTE)), dw_ED = jax.jit(jax.value_and_grad(ours, has_aux=True))(state["weight"])
    by_expert = torch.zeros(40, E).scatter(1, chosen, weights)
    by_expert.sin().sum().backward()
    assert_close(logits_BTE.reshape(-1, E), logits.detach())
    np.testing.assert_array_equal(by_expert_BTE.reshape(-1, E) != 0, by_expert.detach() != 0)
    assert_close(by_expert_BTE.reshape(-1, E), by_expert.detach())
    assert_close(dw_ED, theirs.weight.grad)


def test_a_correction_counts_for_being_chosen_alone_and_has_no_gradient() -> None:
    routing = Routing(experts=4, top_k=1, scoring="sigmoid", correction=True)
    logits_BTE = jnp.array([[[0.0, 1.0, 2.0, 3.0]]])
    correction_E = jnp.array([10.0, 0.0, 0.0, 0.0])
    weights_BTk, chosen_BTk = router.route(routing, logits_BTE, correction_E)
    assert chosen_BTk.item() == 0
    assert weights_BTk.item() == 0.5
    gradient_E = jax.grad(lambda c: jnp.sum(router.route(routing, logits_BTE, c)[0]))(correction_E)
    np.testing.assert_array_equal(gradient_E, 0)


@pytest.mark.parametrize("name", ROUTINGS)
def test_replayed_experts_are_weighed_by_the_router_as_it_is(name: str) -> None:
    routing = ROUTINGS[name][0]
    before, after = jax.random.normal(jax.random.key(0), (2, 2, 10, E))
    correction_E = jnp.zeros(E) if routing.correction else None
    _, old_BTk = router.route(routing, before, correction_E)
    _, chosen_BTk = router.route(routing, after, correction_E, old_BTk)
    np.testing.assert_array_equal(chosen_BTk, old_BTk)
    own_weights_BTk, own_BTk = router.route(routing, after, correction_E)
    assert (own_BTk != old_BTk).any()
    again_BTk, _ = router.route(routing, after, correction_E, own_BTk)
    assert_close(again_BTk, own_weights_BTk)
    gradient = jax.grad(lambda logits: jnp.sum(jnp.sin(router.route(routing, logits, correction_E, old_BTk)[0])))(after)
    hit_BTE = jnp.any(jax.nn.one_hot(old_BTk, E, dtype=bool), axis=-2)
    assert (gradient[hit_BTE] != 0).all()


def test_what_is_not_recorded_is_chosen_here() -> None:
    routing = Routing(experts=E, top_k=K)
    logits_BTE = jax.random.normal(jax.random.key(0), (1, 4, E))
    _, own_BTk = router.route(routing, logits_BTE)
    routes_BTk = jnp.full((1, 4, K), -1).at[0, 1].set(jnp.arange(K))
    _, chosen_BTk = router.route(routing, logits_BTE, None, routes_BTk)
    np.testing.assert_array_equal(chosen_BTk, own_BTk.at[0, 1].set(jnp.arange(K)))


@pytest.mark.parametrize("masked", [False, True])
def test_the_balance_loss_equals_transformers(masked: bool) -> None:
    torch = pytest.importorskip("torch")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    routing = Routing(experts=E, top_k=K, normalised=True)
    logits_BTE = jax.random.normal(jax.random.key(0), (2, 10, E))
    real_BT = jnp.arange(10) < jnp.array([[10], [6]]) if masked else None

    def ours(logits_BTE: jax.Array) -> jax.Array:
        _, chosen_BTk = router.route(routing, logits_BTE)
        total, weight = router.load_balance(router.routed(routing, logits_BTE, chosen_BTk, real_BT))
        return total / weight

    logits = torch.tensor(np.asarray(logits_BTE).reshape(-1, E), requires_grad=True)
    mask = torch.tensor(np.asarray(real_BT)) if masked else None
    theirs = load_balancing_loss_func((logits,), E, K, mask)
    theirs.backward()
    value, gradient = jax.value_and_grad(ours)(logits_BTE)
    assert_close(value, theirs.detach())
    assert_close(gradient.reshape(-1, E), logits.grad)


def test_balanced_routing_has_the_least_loss() -> None:
    routing = Routing(experts=E, top_k=K)

    def loss(chosen_BTk: jax.Array, logits_BTE: jax.Array) -> float:
        total, weight = router.load_balance(router.routed(routing, logits_BTE, chosen_BTk, None))
        return float(total / weight)

    even = (jnp.arange(E)[None, :, None] + jnp.arange(K)) % E
    assert loss(even, jnp.zeros((1, E, E))) == pytest.approx(K)
    one = jnp.zeros((1, E, K), jnp.int32) + jnp.arange(K)
    assert loss(one, jnp.where(jnp.arange(E) < K, 9.0, 0.0) * jnp.ones((1, E, E))) > 2 * K


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "softmax_of_chosen"])
def test_padding_is_left_out_and_micro_batches_add_up(scoring: Any) -> None:
    routing = Routing(experts=E, top_k=K, scoring=scoring)
    logits_BTE = jax.random.normal(jax.random.key(0), (4, 6, E))
    segments_BT = jnp.where(jnp.arange(6) < jnp.array([[6], [4], [1], [0]]), 2, 0)

    def sums(rows: slice, junk: float) -> router.Routed:
        segments = segments_BT[rows]
        real_BT = router.real_tokens(Prefixed(segments, segments))
        logits = jnp.where(real_BT[..., None], logits_BTE[rows], junk)
        return router.routed(routing, logits, router.route(routing, logits)[1], real_BT)

    whole = sums(slice(None), 0.0)
    parts = [sums(slice(0, 2), 50.0), sums(slice(2, 4), -50.0)]
    assert whole.tokens == 11
    assert float(jnp.sum(whole.counts_E)) == pytest.approx(11 * K)
    assert float(jnp.sum(whole.probabilities_E)) == pytest.approx(11, rel=1e-5)
    for field in ("counts_E", "probabilities_E", "squared_lse", "tokens"):
        assert_close(sum(getattr(part, field) for part in parts), getattr(whole, field))
    total, weight = router.router_z(whole)
    real = np.asarray(logits_BTE, np.float64)[np.asarray(segments_BT) > 0]
    assert float(total / weight) == pytest.approx((np.log(np.exp(real).sum(-1)) ** 2).mean(), rel=1e-5)
    assert router.real_tokens(None) is None


def test_layers_are_averaged() -> None:
    routing = Routing(experts=E, top_k=K)
    layers = []
    for key in jax.random.split(jax.random.key(0), 3):
        logits_BTE = jax.random.normal(key, (2, 5, E))
        layers.append(router.routed(routing, logits_BTE, router.route(routing, logits_BTE)[1], None))
    stacked = jax.tree.map(lambda *fields: jnp.stack(fields), *layers)
    for loss in (router.load_balance, router.router_z):
        each = [loss(layer) for layer in layers]
        assert_close(loss(stacked)[0], np.mean([total for total, _ in each]))
        assert loss(stacked)[1] == 10


def test_nothing_but_padding_gives_no_loss() -> None:
    routing = Routing(experts=E, top_k=K)
    logits_BTE = jnp.ones((1, 3, E))
    empty = router.routed(routing, logits_BTE, router.route(routing, logits_BTE)[1], jnp.zeros((1, 3), bool))
    assert router.load_balance(empty) == (0, 0)
    assert router.router_z(empty) == (0, 0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"top_k": 9},
            "num_experts_per_tok=9 is not between 1 and the 8 experts of topk_group=1 out of n_group=1 groups",
        ),
        ({"top_k": 0}, "num_experts_per_tok=0"),
        ({"groups": 3}, "8 experts do not divide into n_group=3 groups"),
        (
            {"groups": 4, "top_groups": 1},
            "num_experts_per_tok=3 is not between 1 and the 2 experts of topk_group=1 out of n_group=4",
        ),
    ],
)
def test_choices_that_cannot_be_made_are_refused(fields: dict[str, int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        dataclasses.replace(Routing(experts=E, top_k=K), **fields)
