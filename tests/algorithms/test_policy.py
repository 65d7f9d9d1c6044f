"""Policy losses against their papers' formulas, written out in float64 for one sequence, with finite differences.

Terms that a formula holds constant (``sg``) are taken at log-probs that are not moved.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from policy_batches import draw

from luthier.algorithms import policy

STEP = 1e-5
TERMS = {"beta": 0.1, "entropy_coefficient": 0.03, "importance_sampling_correction": "token"}
CLIPPED = ("grpo", "dr-grpo", "dapo", "gspo", "gspo-token")
CASES = [
    *((name, {}) for name in policy.ALGORITHMS),
    *((name, TERMS | {"importance_sampling_cap": 1.2}) for name in policy.ALGORITHMS),
    *((name, {"epsilon_low": 0.1, "epsilon_high": 0.15, "dual_clip": 1.4}) for name in ("grpo", "dapo", "dr-grpo")),
    *((name, {"epsilon_low": 0.1, "epsilon_high": 0.05, "dual_clip": 1.01}) for name in ("gspo", "gspo-token")),
    *(("grpo", {"beta": 0.5, "kl_estimator": estimator}) for estimator in ("k1", "k2", "k3", "k3-iw")),
    *(("gspo", {"beta": 0.5, "kl_estimator": estimator}) for estimator in ("k3", "k3-iw")),
    *(("dapo", {"importance_sampling_correction": level}) for level in ("token", "sequence")),
    *(("gspo", {"importance_sampling_correction": level, "beta": 0.2}) for level in ("token", "sequence")),
    *(("grpo", {"loss_aggregation": kind}) for kind in ("token", "constant", "sequence-sum")),
    *((name, {"loss_aggregation": "token", "entropy_coefficient": 0.1}) for name in ("rloo", "reinforce", "dr-grpo")),
    ("cispo", {"epsilon_low": 0.2, "epsilon_high": 0.1, "loss_aggregation": "sequence"}),
]


def case_id(case: object) -> str:
    return case if isinstance(case, str) else " ".join(f"{key}={value}" for key, value in case.items()) or "defaults"


def whole_settings(name: str, given: dict) -> dict:
    length = {"completion_length": 11} if "completion_length" in policy.settings(name) else {}
    return length | given


def objective(name: str, x: np.ndarray, sg: np.ndarray, old: np.ndarray, advantage: float, s: dict) -> list[float]:
    """What each paper maximises, for the trained tokens of one sequence."""
    if name in ("rloo", "reinforce"):
        return [np.exp(sg[t] - old[t]) * advantage * x[t] for t in range(len(x))]
    low, high = 1 - s["epsilon_low"], 1 + s["epsilon_high"]
    if name == "cispo":
        return [min(max(np.exp(sg[t] - old[t]), low), high) * advantage * x[t] for t in range(len(x))]
    if name == "gspo":
        ratios = [np.prod(np.exp(x - old)) ** (1 / len(x))] * len(x)
    elif name == "gspo-token":
        sequence = np.prod(np.exp(sg - old)) ** (1 / len(x))
        ratios = [sequence * np.exp(x[t]) / np.exp(sg[t]) for t in range(len(x))]
    else:
        ratios = [np.exp(x[t]) / np.exp(old[t]) for t in range(len(x))]
    gains = [min(r * advantage, min(max(r, low), high) * advantage) for r in ratios]
    if s["dual_clip"] is not None and advantage < 0:
        gains = [max(gain, s["dual_clip"] * advantage) for gain in gains]
    return gains


def divergence(estimator: str, x: float, reference: float, old: float) -> float:
    k3 = np.exp(reference) / np.exp(x) - 1 - (reference - x)
    return {"k1": x - reference, "k2": 0.5 * (x - reference) ** 2, "k3": k3, "k3-iw": np.exp(x) / np.exp(old) * k3}[
        estimator
    ]


def weights(old: np.ndarray, sampler: np.ndarray, s: dict) -> list[float]:
    level, cap = s["importance_sampling_correction"], s["importance_sampling_cap"]
    if level == "none":
        return [1.0] * len(old)
    if level == "token":
        return [min(np.exp(old[t]) / np.exp(sampler[t]), cap) for t in range(len(old))]
    product = np.prod(np.exp(old - sampler))
    return [product if product <= cap else 0.0] * len(old)


def written_out(name: str, x_BT: np.ndarray, sg_BT: np.ndarray, rollouts, entropy_BT: np.ndarray, s: dict):
    """The batch's (sum, weight)."""
    how = s.get("loss_aggregation", "sequence")
    total, sequences, tokens = 0.0, 0, 0
    for b, mask in enumerate(rollouts.mask_BT):
        if not mask.any():
            continue
        x, sg = x_BT[b][mask], sg_BT[b][mask]
        old, sampler, reference, entropy = (
            np.asarray(array[b], np.float64)[mask]
            for array in (rollouts.old_logp_BT, rollouts.sampler_logp_BT, rollouts.reference_logp_BT, entropy_BT)
        )
        gains = objective(name, x, sg, old, float(rollouts.advantages_B[b]), s)
        weight = weights(old, sampler, s)
        losses = [
            weight[t] * (-gains[t] + s["beta"] * divergence(s["kl_estimator"], x[t], reference[t], old[t]))
            - s["entropy_coefficient"] * entropy[t]
            for t in range(len(x))
        ]
        part = sum(losses)
        total += {"sequence": part / len(x), "constant": part / s.get("completion_length", 1)}.get(how, part)
        sequences, tokens = sequences + 1, tokens + len(x)
    return total, tokens if how == "token" else sequences


@pytest.mark.parametrize(("name", "given"), CASES, ids=case_id)
def test_loss_and_gradient_are_the_papers(name, given):
    logp_BT, rollouts, entropy_BT = draw()
    settings = whole_settings(name, given)
    loss = partial(policy.ALGORITHMS[name], batch=rollouts, entropy_BT=jnp.asarray(entropy_BT), **settings)
    found, gradient_BT = jax.value_and_grad(lambda x: loss(x).sum)(jnp.asarray(logp_BT))
    everything = policy.settings(name) | settings

    exact_BT = logp_BT.astype(np.float64)
    total, weight = written_out(name, exact_BT, exact_BT, rollouts, entropy_BT, everything)
    np.testing.assert_allclose(found, total, rtol=2e-5, atol=5e-6)
    assert loss(jnp.asarray(logp_BT)).weight == weight
    expected_BT = np.zeros_like(exact_BT)
    for place in zip(*np.nonzero(rollouts.mask_BT), strict=True):
        sides = []
        for step in (STEP, -STEP):
            moved_BT = exact_BT.copy()
            moved_BT[place] += step
            sides.append(written_out(name, moved_BT, exact_BT, rollouts, entropy_BT, everything)[0])
        expected_BT[place] = (sides[0] - sides[1]) / (2 * STEP)
    assert np.abs(expected_BT).max() > 0.1, "a gradient of nothing says nothing"
    np.testing.assert_allclose(gradient_BT, expected_BT, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", policy.ALGORITHMS)
def test_the_entropy_bonus_has_a_gradient_of_its_own(name):
    logp_BT, rollouts, entropy_BT = draw()
    settings = whole_settings(name, {"entropy_coefficient": 0.3, "importance_sampling_correction": "token"})

    def loss(entropy_BT):
        return policy.ALGORITHMS[name](jnp.asarray(logp_BT), rollouts, entropy_BT, **settings).sum

    gradient_BT = np.asarray(jax.grad(loss)(jnp.asarray(entropy_BT)))
    how = policy.settings(name).get("loss_aggregation", "sequence")
    lengths_B1 = rollouts.mask_BT.sum(1, keepdims=True).clip(1)
    share_BT = rollouts.mask_BT / {"sequence": lengths_B1, "constant": 11}.get(how, 1)
    np.testing.assert_allclose(gradient_BT, -0.3 * share_BT, rtol=1e-6)


def test_the_draw_reaches_every_clip():
    logp_BT, rollouts, _ = draw()
    for name, settings in (
        ("grpo", {"dual_clip": 1.4}),
        ("gspo", {"dual_clip": 1.01}),
        ("cispo", {"epsilon_low": 0.2}),
    ):
        settings = settings | ({"epsilon_high": 0.1} if name == "cispo" else {})
        metrics = policy.ALGORITHMS[name](jnp.asarray(logp_BT), rollouts, **settings).metrics
        for key, (total, weight) in metrics.items():
            assert not key.startswith("clip_ratio") or 0 < total < weight, (name, key)


def gradients(name: str, shift: float, **settings) -> tuple[np.ndarray, np.ndarray]:
    """Loss of the batch and its gradient where log-probs moved by ``shift`` from the old ones in a fixed direction."""
    logp_BT, rollouts, _ = draw(seed=1)
    direction_BT = np.random.default_rng(2).standard_normal(logp_BT.shape).astype(np.float32)
    at_BT = jnp.asarray(rollouts.old_logp_BT + shift * direction_BT)
    loss, gradient_BT = jax.value_and_grad(lambda x: policy.ALGORITHMS[name](x, rollouts, **settings).sum)(at_BT)
    return np.asarray(loss, np.float64), np.asarray(gradient_BT, np.float64)


UNCLIPPED = {"epsilon_low": 1.0, "epsilon_high": 1e6}


@pytest.mark.parametrize("name", ["gspo", "gspo-token"])
def test_gspo_is_grpo_to_first_order_where_the_policy_has_not_moved(name):
    """With s the geometric mean of the ratios r_t of a sequence's T tokens, both losses are means over its tokens.

    GRPO's gradient at token t is -A r_t / T, GSPO's -A s / T (the root that normalises s by length gives the 1 / T
    which GRPO has from its mean over tokens). Where nothing has moved all ratios are 1 and the gradients equal. Moved
    by h, r_t - s is of order h, so gradients part in the first order; the losses, differing by the arithmetic from the
    geometric mean, only in the second. At the papers' own clip ranges the same holds while nothing is clipped.
    """
    np.testing.assert_allclose(gradients(name, 0.0)[1], gradients("grpo", 0.0)[1], rtol=1e-6)
    apart = {}
    for shift in (0.1, 0.2):
        (loss, gradient_BT), (other, other_BT) = (gradients(kind, shift, **UNCLIPPED) for kind in (name, "grpo"))
        apart[shift] = abs(loss - other), np.linalg.norm(gradient_BT - other_BT)
    assert apart[0.2][1] / apart[0.1][1] == pytest.approx(2, rel=0.2)
    assert apart[0.2][0] / apart[0.1][0] == pytest.approx(4, rel=0.3)


@pytest.mark.parametrize("settings", [{}, UNCLIPPED, {"epsilon_low": 0.2, "epsilon_high": 0.2}], ids=case_id)
def test_gspo_token_and_grpo_differ_once_the_policy_has_moved(settings):
    """The reference system's do not, as it takes the old log-probs to be the current ones."""
    loss_BT, other_BT = (gradients(name, 0.3, **settings)[1] for name in ("gspo-token", "grpo"))
    assert np.linalg.norm(loss_BT - other_BT) > 0.1 * np.linalg.norm(other_BT)


@pytest.mark.parametrize("settings", [{}, UNCLIPPED, {"epsilon_low": 0.05, "epsilon_high": 0.1}], ids=case_id)
@pytest.mark.parametrize("shift", [0.0, 1e-4, 0.3])
def test_gspo_token_is_gspo_for_advantages_of_sequences(shift, settings):
    for found, expected in zip(
        gradients("gspo-token", shift, **settings), gradients("gspo", shift, **settings), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CLIPPED)
def test_nothing_is_learnt_where_the_clip_is_active(name):
    logp_BT, rollouts, _ = draw()
    settings = whole_settings(name, {"epsilon_low": 0.02, "epsilon_high": 0.02})
    loss = partial(policy.ALGORITHMS[name], batch=rollouts, **settings)
    gradient_BT = np.asarray(jax.grad(lambda x: loss(x).sum)(jnp.asarray(logp_BT)))
    total, weight = loss(jnp.asarray(logp_BT)).metrics["clip_ratio/region_mean"]
    assert 0 < total < weight
    assert (gradient_BT[rollouts.mask_BT] == 0).sum() == total
