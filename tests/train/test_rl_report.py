"""What `luthier rl` says where its sampler and its trainer are apart; of vLLM's sampler: ``test_rl_vllm``."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from luthier.config import RlConfig
from luthier.model.compute import Compute
from luthier.train import rl_report


@pytest.mark.parametrize(
    ("compute", "said", "unsaid"),
    [
        (Compute(jnp.bfloat16), "in bfloat16, which rounds", "this is a fault"),
        (Compute(jnp.bfloat16), "float32_activations=attention rounds less, and dtype=float32", "this is a fault"),
        (Compute(jnp.bfloat16, float32="attention"), "attention in float32), which rounds", "float32_activations"),
        (Compute(float32="attention"), "this is a fault", "rounds"),
    ],
)
def test_the_likely_cause_is_told(compute: Compute, said: str, unsaid: str) -> None:
    message = rl_report.mismatch(RlConfig(model_name="m"), compute, 3, 0.2)
    assert "step 3: log-probs of sampler and trainer differ by 0.2 on average" in message
    assert said in message
    assert unsaid not in message
