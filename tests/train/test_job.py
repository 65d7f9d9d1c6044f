"""What a job is made of before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from luthier import mesh as mesh_lib
from luthier.checkpoint.source import Source
from luthier.config import resolve
from luthier.model.model import Model
from luthier.train import job as job_lib
from tiny import TINY

RL = ["reward_functions=math", "dtype=bfloat16"]


@pytest.mark.parametrize(
    ("command", "keys", "kept"),
    [
        ("rl", RL, "attention"),
        ("rl", [*RL, "float32_activations=none"], "none"),
        ("rl", [*RL, "rollout_engine=vllm", "vllm_urls=[http://127.0.0.1:1]"], "none"),
        ("sft", ["dtype=bfloat16"], "none"),
        ("sft", ["dtype=bfloat16", "float32_activations=residual"], "residual"),
    ],
)
def test_what_stays_fp32(command: str, keys: list[str], kept: str) -> None:
    config = resolve(command, ["model_name=x", "hf_path=x", *keys], {})
    mesh = mesh_lib.make(config, jax.devices()[:1])
    with mesh_lib.use(mesh):
        job = job_lib.prepare(config, Source("random", "x", Path(), TINY), Model.from_hf(TINY, "x"), mesh)
    assert job.compute.float32 == kept
