"""GRPO on SmolLM2 through the real vLLM: its log-probs are the trainer's after every sync, and show it where not.

fp32 on both sides, so that nothing but rounding may differ. The bound is what weights of the step before, or one old
tensor among new ones, are over.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from running import BOUND, Train

pytestmark = [pytest.mark.vllm, pytest.mark.multiprocess, pytest.mark.timeout(1800)]

BROKEN = str(Path(__file__).with_name("broken_rl.py"))


def test_twenty_steps_sample_from_the_weights_that_are_trained(server: str, train: Train) -> None:
    ran = train("steps=20", f"vllm_urls=[{server}]")
    assert ran.code == 0, ran.output
    assert len(ran.differences) == 20
    assert max(ran.differences) < BOUND
    rewards = ran.column("reward")
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]), rewards
    assert "log-probs" not in ran.output, ran.output


@pytest.mark.parametrize(
    ("kept", "rate"), [(r".", 3e-5), (r"^model\.embed_tokens\.weight$", 3e-4)], ids=["all are old", "one tensor is old"]
)
def test_old_weights_show(server: str, train: Train, kept: str, rate: float) -> None:
    """They are as good as others for vLLM: only what it draws tells. A tensor alone has to be far from what it was."""
    ran = train("steps=5", f"vllm_urls=[{server}]", f"learning_rate={rate}", program=(BROKEN, "old", kept))
    assert ran.code == 0, ran.output
    first, *later = ran.differences
    assert first < BOUND
    assert min(later[1:]) > BOUND, ran.differences
    assert "vLLM" in ran.output.split("step 1/5")[1]


def test_a_tensor_that_does_not_come_ends_the_run(server: str, train: Train) -> None:
    left_out = "model.layers.7.mlp.down_proj.weight"
    ran = train("steps=5", f"vllm_urls=[{server}]", "vllm_wait=10", program=(BROKEN, "left out", left_out))
    assert ran.code != 0
    assert "model.layers.7.mlp.down_proj" in ran.output, ran.output
    assert not ran.rows


def test_an_adapter_is_sampled_from_as_it_is_trained(server: str, train: Train) -> None:
    ran = train("steps=6", f"vllm_urls=[{server}]", "lora_rank=8", "learning_rate=1e-3")
    assert ran.code == 0, ran.output
    assert len(ran.differences) == 6
    assert max(ran.differences) < BOUND


def test_an_old_adapter_shows(server: str, train: Train) -> None:
    ran = train("steps=5", f"vllm_urls=[{server}]", "lora_rank=8", "learning_rate=1e-3", program=(BROKEN, "adapter"))
    assert ran.code == 0, ran.output
    assert ran.differences[0] < BOUND < max(ran.differences[2:])


def test_steps_ahead_are_sampled_by_weights_no_older_than_allowed(server: str, train: Train) -> None:
    ran = train("steps=6", f"vllm_urls=[{server}]", "max_staleness=1")
    assert ran.code == 0, ran.output
    assert len(ran.differences) == 6
