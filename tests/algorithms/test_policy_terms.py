"""What all policy losses share: the KL term's gradient, masks, sums over parts, metrics, settings."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from policy_batches import draw, rows
from pydantic import TypeAdapter

from luthier.algorithms import policy, policy_terms
from luthier.config import RlConfig
from luthier.types import Rollouts

THETA, REFERENCE, OLD, SAMPLER = (
    np.array(logits, np.float32) for logits in ([0.3, -0.8, 1.1], [-0.5, 0.4, 0.2], [1.0, -0.2, -0.4], [0.1, 0.9, -0.3])
)
TERMS = {"beta": 0.1, "entropy_coefficient": 0.03, "importance_sampling_correction": "token"}


def exact_kl(theta, reference):
    """KL of two softmaxes, whole."""
    logp, other = jax.nn.log_softmax(theta), jax.nn.log_softmax(reference)
    return jnp.sum(jnp.exp(logp) * (logp - other))


def expected_gradient(estimator: str, old, sampler=None, **settings) -> np.ndarray:
    """The mean gradient of grpo's KL term over single actions that the sampler draws, by enumerating the three."""
    sampler = old if sampler is None else sampler
    log_sampler, log_old, log_reference = (jax.nn.log_softmax(jnp.asarray(x)) for x in (sampler, old, REFERENCE))

    def expected(theta):
        logp = jax.nn.log_softmax(theta)
        losses = []
        for action in range(3):
            one = [x[action].reshape(1, 1) for x in (log_sampler, log_old, log_reference)]
            rollouts = Rollouts(jnp.ones((1, 1), bool), one[0], one[1], one[2], advantages_B=jnp.zeros(1))
            loss = policy.ALGORITHMS["grpo"](
                logp[action].reshape(1, 1), rollouts, beta=1.0, kl_estimator=estimator, **settings
            )
            losses.append(jnp.exp(log_sampler[action]) * loss.sum)
        return sum(losses)

    return np.asarray(jax.grad(expected)(jnp.asarray(THETA)))


EXACT = np.asarray(jax.grad(exact_kl)(jnp.asarray(THETA), jnp.asarray(REFERENCE)))


def test_the_mean_gradient_of_k1_is_zero():
    """The mistake: k1's mean is the KL divergence, but as a loss it pulls nowhere."""
    assert np.abs(EXACT).max() > 0.1
    np.testing.assert_allclose(expected_gradient("k1", THETA), 0, atol=1e-7)


@pytest.mark.parametrize(("estimator", "old"), [("k2", THETA), ("k3-iw", THETA), ("k3-iw", OLD)])
def test_the_mean_gradient_of_the_kl_term_is_exact(estimator, old):
    np.testing.assert_allclose(expected_gradient(estimator, old), EXACT, atol=1e-6)


def test_the_mean_gradient_of_k3_iw_is_exact_for_another_sampler_that_is_corrected_for():
    settings = {"importance_sampling_correction": "token", "importance_sampling_cap": 100.0}
    np.testing.assert_allclose(expected_gradient("k3-iw", OLD, SAMPLER, **settings), EXACT, atol=1e-6)
    assert np.abs(expected_gradient("k3-iw", OLD, SAMPLER) - EXACT).max() > 0.05


def test_the_mean_gradient_of_k3_is_that_of_the_divergence_the_other_way_round():
    reverse = jax.grad(lambda theta: exact_kl(jnp.asarray(REFERENCE), theta))(jnp.asarray(THETA))
    np.testing.assert_allclose(expected_gradient("k3", THETA), reverse, atol=1e-6)
    assert np.abs(np.asarray(reverse) - EXACT).max() > 0.05


@pytest.mark.parametrize("estimator", ["k1", "k3", "k3-iw"])
def test_the_mean_of_an_unbiased_estimate_is_the_divergence(estimator):
    logp, reference = (np.asarray(jax.nn.log_softmax(jnp.asarray(x))) for x in (THETA, REFERENCE))
    estimates = policy_terms.KL_ESTIMATORS[estimator](logp, reference, logp)
    np.testing.assert_allclose(np.sum(np.exp(logp) * estimates), exact_kl(THETA, REFERENCE), rtol=1e-5)


def whole_settings(name: str, **given) -> dict:
    return given | ({"completion_length": 11} if "completion_length" in policy.settings(name) else {})


AGGREGATIONS = [
    (name, kind)
    for name in policy.ALGORITHMS
    for kind in (
        ("sequence", "token", "constant", "sequence-sum") if "loss_aggregation" in policy.settings(name) else (None,)
    )
]


@pytest.mark.parametrize(("name", "kind"), AGGREGATIONS)
def test_a_batch_is_the_sum_of_its_parts(name, kind):
    logp_BT, rollouts, entropy_BT = draw()
    settings = whole_settings(name, **TERMS) | ({"loss_aggregation": kind} if kind else {})

    def loss(part):
        call = partial(policy.ALGORITHMS[name], batch=rows(rollouts, part), entropy_BT=entropy_BT[part], **settings)
        return call(jnp.asarray(logp_BT[part])), jax.grad(lambda x: call(x).sum)(jnp.asarray(logp_BT[part]))

    whole, gradient_BT = loss(slice(None))
    for size in (1, 3, 5):
        parts, gradients = zip(*(loss(slice(at, at + size)) for at in range(0, len(logp_BT), size)), strict=True)
        summed = jax.tree.map(lambda *values: np.sum(values), *parts)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), summed, whole)
        np.testing.assert_allclose(np.concatenate(gradients), gradient_BT, rtol=1e-6)


@pytest.mark.parametrize("name", policy.ALGORITHMS)
def test_what_is_outside_the_mask_does_not_count(name):
    logp_BT, rollouts, entropy_BT = draw()
    settings = whole_settings(name, **TERMS)
    loss = partial(policy.ALGORITHMS[name], **settings)
    gradient = jax.grad(lambda x, entropy, *rest: loss(x, *rest, entropy).sum, argnums=(0, 1))
    found = loss(logp_BT, rollouts, entropy_BT)
    logp_gradient_BT, entropy_gradient_BT = gradient(jnp.asarray(logp_BT), jnp.asarray(entropy_BT), rollouts)
    for gradient_BT in (logp_gradient_BT, entropy_gradient_BT):
        assert np.isfinite(gradient_BT).all()
        assert (np.asarray(gradient_BT)[~rollouts.mask_BT] == 0).all()

    filled = jax.tree.map(lambda x: np.where(np.isnan(x), 7.0, x) if x.dtype == np.float32 else x, rollouts)
    other = loss(np.nan_to_num(logp_BT, nan=-3.0), filled, np.nan_to_num(entropy_BT, nan=1e9))
    jax.tree.map(np.testing.assert_array_equal, found, other)

    nothing = loss(logp_BT, dataclasses.replace(rollouts, mask_BT=np.zeros_like(rollouts.mask_BT)), entropy_BT)
    assert all(leaf == 0 for leaf in jax.tree.leaves(nothing))


@pytest.mark.parametrize("name", policy.ALGORITHMS)
def test_it_compiles_to_the_same(name):
    logp_BT, rollouts, entropy_BT = draw()
    loss = partial(policy.ALGORITHMS[name], **whole_settings(name, **TERMS))
    eager, compiled = loss(logp_BT, rollouts, entropy_BT), jax.jit(loss)(logp_BT, rollouts, entropy_BT)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), compiled, eager)
    assert all(leaf.shape == () and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(compiled))


@pytest.mark.parametrize("far", [-300.0, 300.0])
@pytest.mark.parametrize("name", policy.ALGORITHMS)
def test_log_probs_far_apart_do_not_overflow(name, far):
    logp_BT, rollouts, entropy_BT = draw()
    apart = dataclasses.replace(
        rollouts,
        old_logp_BT=rollouts.old_logp_BT + far,
        sampler_logp_BT=rollouts.sampler_logp_BT - far,
        reference_logp_BT=rollouts.reference_logp_BT - far,
    )
    loss = partial(policy.ALGORITHMS[name], batch=apart, entropy_BT=entropy_BT, **whole_settings(name, **TERMS))
    found, gradient_BT = jax.value_and_grad(lambda x: loss(x).sum)(jnp.asarray(logp_BT))
    assert np.isfinite(found)
    assert np.isfinite(gradient_BT).all()


def by_hand() -> tuple[np.ndarray, Rollouts, np.ndarray]:
    """Two sequences of 3 and 2 tokens with ratios (0.5, 1.5, 1) and (0.5, 4), of advantages 1 and -2."""
    mask_BT = np.array([[True, True, True], [True, True, False]])
    logp_BT = np.full((2, 3), -1.0, np.float32)
    old_logp_BT = logp_BT - np.log(np.array([[0.5, 1.5, 1.0], [0.5, 4.0, 9.0]], np.float32))
    sampler_logp_BT = old_logp_BT - np.log(np.array([[3.0, 0.5, 1.0], [1.0, 2.5, 9.0]], np.float32))
    reference_logp_BT = logp_BT + np.log(np.array([[1.0, 2.0, 1.0], [4.0, 1.0, 9.0]], np.float32))
    entropy_BT = np.array([[0.5, 1.0, 1.5], [2.0, 0.0, 9.0]], np.float32)
    advantages_B = np.array([1.0, -2.0], np.float32)
    return logp_BT, Rollouts(mask_BT, sampler_logp_BT, old_logp_BT, reference_logp_BT, advantages_B), entropy_BT


SHARED = {
    "kl": (2 - 1 - np.log(2)) + (4 - 1 - np.log(4)),
    "entropy": 0.5 + 1.0 + 1.5 + 2.0 + 0.0,
    "importance_sampling/capped_mean": 2,
}
BY_HAND = {
    # The second token of the first is over 1.2; the first of the second under 0.8, its second over the dual clip.
    "grpo": ({"dual_clip": 3.0}, (1, 1, 2), {"clip_ratio/dual_mean": 1, "ratio/mean": 0.5 + 1.5 + 1 + 0.5 + 4}),
    # Sequence ratios are the roots (0.75) ** (1/3), above nothing, and 2 ** (1/2), where only a fall is clipped.
    "gspo": ({"epsilon_low": 0.2, "epsilon_high": 0.2}, (0, 0, 0), {"ratio/mean": 3 * 0.75 ** (1 / 3) + 2 * 2**0.5}),
    "gspo-token": ({"dual_clip": 1.2}, (0, 0, 0), {"clip_ratio/dual_mean": 2}),
    # Weights are clipped whatever the advantage.
    "cispo": ({"epsilon_low": 0.3, "epsilon_high": 1.0}, (2, 1, 3), {"ratio/mean": 7.5}),
    "rloo": ({}, None, {"ratio/mean": 7.5}),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_metrics_by_hand(name):
    logp_BT, rollouts, entropy_BT = by_hand()
    given, clips, expected = BY_HAND[name]
    loss = policy.ALGORITHMS[name](logp_BT, rollouts, entropy_BT, importance_sampling_correction="token", **given)
    keys = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")
    expected = SHARED | expected | (dict(zip(keys, clips, strict=True)) if clips else {})
    measured = {key: float(total) for key, (total, _) in loss.metrics.items()}
    assert {float(weight) for _, weight in loss.metrics.values()} == {5.0}
    assert {key: measured[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    assert set(measured) == set(expected) | {"ratio/mean"}
    assert loss.maxima == {}


def test_what_is_not_given_is_not_measured():
    logp_BT, rollouts, _ = by_hand()
    loss = policy.ALGORITHMS["rloo"](logp_BT, dataclasses.replace(rollouts, reference_logp_BT=None))
    assert set(loss.metrics) == {"ratio/mean"}


def test_a_sequence_over_the_cap_is_left_out():
    logp_BT, rollouts, _ = by_hand()  # products of the sampler's ratios: 1.5 and 2.5
    weight_BT, capped_BT = policy_terms.sampler_correction(
        policy_terms.cleaned(logp_BT, rollouts, None)[1], "sequence", cap=2.0
    )
    np.testing.assert_allclose(weight_BT, [[1.5] * 3, [0.0] * 3], rtol=1e-6)
    np.testing.assert_array_equal(capped_BT, [[False] * 3, [True] * 3])


SHARED_SETTINGS = {
    "beta": 0.0,
    "kl_estimator": "k3-iw",
    "entropy_coefficient": 0.0,
    "importance_sampling_correction": "none",
    "importance_sampling_cap": 2.0,
}
OWN_SETTINGS = {
    "grpo": {"epsilon_low": 0.2, "epsilon_high": 0.2, "dual_clip": None, "loss_aggregation": "sequence"},
    "dr-grpo": {"epsilon_low": 0.2, "epsilon_high": 0.2, "dual_clip": None, "loss_aggregation": "constant"},
    "dapo": {"epsilon_low": 0.2, "epsilon_high": 0.28, "dual_clip": None, "loss_aggregation": "token"},
    "gspo": {"epsilon_low": 3e-4, "epsilon_high": 4e-4, "dual_clip": None},
    "gspo-token": {"epsilon_low": 3e-4, "epsilon_high": 4e-4, "dual_clip": None},
    "cispo": {"epsilon_low": 1.0, "epsilon_high": 4.0, "loss_aggregation": "token"},
    "rloo": {"loss_aggregation": "sequence-sum"},
    "reinforce": {"loss_aggregation": "sequence-sum"},
}


def test_settings_are_the_keyword_defaults():
    assert list(policy.ALGORITHMS) == list(OWN_SETTINGS) == list(policy.HABITS)
    for name, own in OWN_SETTINGS.items():
        length = {"completion_length": None} if "loss_aggregation" in own else {}
        assert policy.settings(name) == SHARED_SETTINGS | own | length


@pytest.mark.parametrize("name", policy.ALGORITHMS)
def test_settings_and_habits_are_keys(name):
    assert set(policy.settings(name)) - {"completion_length"} <= set(RlConfig.model_fields)
    for key, value in dataclasses.asdict(policy.HABITS[name]).items():
        TypeAdapter(RlConfig.model_fields[key].annotation).validate_python(value)


@pytest.mark.parametrize(
    ("name", "given", "error", "words"),
    [
        ("rloo", {"epsilon_low": 0.2}, TypeError, "rloo has no setting epsilon_low"),
        ("gspo", {"loss_aggregation": "token"}, TypeError, "gspo has no setting loss_aggregation"),
        ("grpo", {"beta": 0.1}, ValueError, "beta=0.1 needs the reference"),
        ("grpo", {"entropy_coefficient": 0.1}, ValueError, "needs the entropy"),
        ("dr-grpo", {}, ValueError, "completion_length=None"),
        ("grpo", {"loss_aggregation": "mean"}, ValueError, "'mean'"),
        ("grpo", {"importance_sampling_correction": "auto"}, ValueError, "`auto`"),
    ],
)
def test_what_cannot_be_meant_is_refused(name, given, error, words):
    logp_BT, rollouts, _ = draw()
    with pytest.raises(error, match=words):
        policy.ALGORITHMS[name](logp_BT, dataclasses.replace(rollouts, reference_logp_BT=None), **given)
