"""Policy losses against TRL's `GRPOTrainer`: value, gradient with respect to log-probs, and metrics, in fp32.

TRL runs as one process for all variants, by the interpreter in TRL_PYTHON (default: the tests' own), on a tiny model.

Where the two differ by definition, settings are taken that mean the same to both:

- An entropy bonus is a mean over tokens in TRL whatever the aggregation; here it is aggregated as the loss is.
- The KL term's importance weight is the token's ratio here, the sequence's in TRL's variants of GSPO; `k3` is taken.
- TRL corrects for the sampler in the policy's term alone, here in the KL term too; no KL where that is on.
- TRL counts sequences without a trained token in its means; here are none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luthier.algorithms import policy
from luthier.types import Rollouts

pytestmark = pytest.mark.slow

PYTHON = os.environ.get("TRL_PYTHON", sys.executable)
LENGTHS = (7, 3, 1, 5, 6, 7)
ADVANTAGES = (1.2, -0.7, 0.4, -1.5, 0.8, -0.2)
LENGTH = 7

KL = {"beta": 0.07}
BY_SEQUENCE = {"loss_type": "grpo", "importance_sampling_level": "sequence"}
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "grpo": ("grpo", {}, {"loss_type": "grpo"}),
    "grpo with k3-iw": ("grpo", KL, {"loss_type": "grpo", **KL}),
    "grpo with k3": (
        "grpo",
        KL | {"kl_estimator": "k3"},
        {"loss_type": "grpo", "use_bias_correction_kl": False, **KL},
    ),
    "grpo with dual clip": ("grpo", {"dual_clip": 1.25}, {"loss_type": "grpo", "delta": 1.25}),
    "grpo corrected": (
        "grpo",
        {"importance_sampling_correction": "token", "importance_sampling_cap": 1.3},
        {"loss_type": "grpo", "cap": 1.3},
    ),
    "grpo by token": ("grpo", {"loss_aggregation": "token"}, {"loss_type": "bnpo"}),
    "dr-grpo": ("dr-grpo", {"completion_length": 16}, {"loss_type": "dr_grpo", "max_completion_length": 16}),
    "dapo": ("dapo", KL, {"loss_type": "dapo", "epsilon_high": 0.28, **KL}),
    "dapo with entropy": (
        "dapo",
        {"entropy_coefficient": 0.02},
        {"loss_type": "dapo", "epsilon_high": 0.28, "entropy_coef": 0.02},
    ),
    "cispo": ("cispo", {"epsilon_high": 0.3}, {"loss_type": "cispo", "epsilon_high": 1.3}),
    "gspo": ("gspo", {}, BY_SEQUENCE | {"epsilon": 3e-4, "epsilon_high": 4e-4}),
    "gspo, wide, with k3": (
        "gspo",
        {"epsilon_low": 0.1, "epsilon_high": 0.1, "kl_estimator": "k3", **KL},
        BY_SEQUENCE | {"epsilon": 0.1, "use_bias_correction_kl": False, **KL},
    ),
    "gspo-token, wide": (
        "gspo-token",
        {"epsilon_low": 0.1, "epsilon_high": 0.1},
        BY_SEQUENCE | {"epsilon": 0.1},
    ),
}


def drawn() -> dict[str, Any]:
    random = np.random.default_rng(0)
    shape = (len(LENGTHS), LENGTH)
    mask_BT = np.arange(LENGTH) < np.array(LENGTHS)[:, None]
    mask_BT[0, 2:4] = False
    shifts = {name: random.standard_normal(shape) * size for name, size in
              (("old", 0.3), ("sampler", 0.5), ("reference", 0.4))}  # fmt: skip
    return {
        "tokens": random.integers(2, 64, shape).tolist(),
        "mask": mask_BT.astype(int).tolist(),
        "advantages": ADVANTAGES,
        **{name: shift_BT.astype(np.float32).tolist() for name, shift_BT in shifts.items()},
    }


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """{variant: what TRL computed}, all from one process."""
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('trl') is None)"
    if subprocess.run([PYTHON, "-c", probe], check=False).returncode:
        pytest.skip(f"{PYTHON} has no trl: install the extra `trl`, or name another in TRL_PYTHON")
    plan = tmp_path_factory.mktemp("trl") / "plan.json"
    variants = {name: arguments for name, (_, _, arguments) in VARIANTS.items()}
    plan.write_text(json.dumps(drawn() | {"variants": variants}))
    program = Path(__file__).with_name("trl_policy.py")
    done = subprocess.run([PYTHON, str(program), str(plan)], check=False, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_gradient_and_metrics_are_those_of_trl(theirs, variant):
    name, settings, _ = VARIANTS[variant]
    plan, found = drawn(), theirs[variant]
    logp_BT, entropy_BT, mask_BT = np.float32(found["logp"]), np.float32(found["entropy"]), np.array(plan["mask"], bool)
    rollouts = Rollouts(
        mask_BT=mask_BT,
        sampler_logp_BT=logp_BT + np.float32(plan["sampler"]),
        old_logp_BT=logp_BT + np.float32(plan["old"]),
        reference_logp_BT=logp_BT + np.float32(plan["reference"]),
        advantages_B=np.float32(plan["advantages"]),
    )
    loss = partial(policy.ALGORITHMS[name], batch=rollouts, entropy_BT=jnp.asarray(entropy_BT), **settings)
    ours = loss(jnp.asarray(logp_BT))
    gradient_BT = jax.grad(lambda x: loss(x).sum / loss(x).weight)(jnp.asarray(logp_BT))
    np.testing.assert_allclose(ours.sum / ours.weight, found["loss"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gradient_BT, np.where(mask_BT, found["gradient"], 0), rtol=1e-4, atol=1e-7)
    assert np.abs(gradient_BT).max() > 1e-3

    for key in ("entropy", "kl") if settings.get("kl_estimator") == "k3" else ("entropy",):
        total, weight = ours.metrics[key]
        assert float(total / weight) == pytest.approx(found["metrics"][key], rel=1e-5), key
    if name in ("grpo", "dr-grpo", "dapo"):  # by sequence, TRL's are means over sequences, ours over tokens
        for key in ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"):
            total, weight = ours.metrics[key]
            assert float(total / weight) == pytest.approx(found["metrics"][key], rel=1e-5), key


def test_the_inputs_reach_what_they_are_for(theirs):
    for variant in ("grpo", "dapo", "gspo, wide, with k3"):
        for side in ("low", "high"):
            assert 0 < theirs[variant]["metrics"][f"clip_ratio/{side}_mean"] < 1, (variant, side)
    for variant in ("grpo with dual clip", "grpo corrected", "grpo with k3", "grpo with k3-iw", "grpo by token"):
        assert theirs[variant]["loss"] != pytest.approx(theirs["grpo"]["loss"], rel=1e-3), variant
