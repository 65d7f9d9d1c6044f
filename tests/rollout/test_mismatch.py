from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from luthier import mesh
from luthier.config import EngineKeys, ModelKeys
from luthier.model import param
from luthier.model.compute import Compute
from luthier.rollout.engine import Request, Sampling
from luthier.rollout.local import LocalEngine
from luthier.rollout.mismatch import mismatch
from luthier.train.step import means
from luthier.types import Batch


def test_equals_what_is_worked_by_hand() -> None:
    sampler, trainer = np.asarray([[-1.0, -2.0, -9.0]]), np.asarray([[-1.5, -1.9, np.nan]])
    found = means(mismatch(sampler, trainer, np.asarray([[True, True, False]])))
    ratios = np.exp([-0.5, 0.1])
    assert {name.removeprefix("sampling/"): pytest.approx(float(value), abs=1e-6) for name, value in found.items()} == {
        "loss": 0,
        "logp_difference/mean": 0.3,
        "logp_difference/max": 0.5,
        "importance_ratio/mean": ratios.mean(),
        "importance_ratio/max": ratios[1],
        "kl": (ratios.sum() - 2 + 0.4) / 2,
    }


def test_an_empty_mask_measures_nothing() -> None:
    found = means(mismatch(np.ones((1, 2)), np.zeros((1, 2)), np.zeros((1, 2), bool)))
    assert [float(value) for value in found.values()] == [0] * 6


HALVES = [("bfloat16", "float32"), ("bfloat16", "bfloat16")]


@pytest.mark.parametrize(
    ("kind", "dtype", "weights"),
    [
        *((kind, "float32", "float32") for kind in tiny.KINDS),
        *(("llama", *types) for types in HALVES),
        *(pytest.param(kind, *types, marks=pytest.mark.slow) for kind in tiny.WITH_EXPERTS for types in HALVES),
    ],
)
def test_the_trainer_scores_what_the_engine_sampled(kind: str, dtype: str, weights: str) -> None:
    """The engine is given the trainer's own weights, and casts fp32 ones for bf16 as each use in training does."""
    model, compute = tiny.kind_model(kind), Compute(jnp.dtype(dtype))
    with mesh.use(mesh.make(ModelKeys(), jax.devices()[:1])) as one:
        params = param.initialise(model.spec, jax.random.key(0), jnp.dtype(weights), one)
        params = jax.tree.map(lambda w: w * 5 if w.ndim > 1 else w, params)  # far from uniform
        engine = LocalEngine(model, params, compute, one, EngineKeys(max_num_seqs=8, max_target_length=64))
        random = np.random.default_rng(0)
        prompts = [random.integers(0, 256, length).tolist() for length in (18, 25, 30, 20)]
        requests = [Request(prompt, 3, Sampling(max_new_tokens=30)) for prompt in prompts]
        tokens_BT, sampler_BT = np.zeros((12, 64), np.int32), np.zeros((12, 64), np.float32)
        mask_BT, segments_BT = np.zeros((12, 64), bool), np.zeros((12, 64), np.int32)
        for row, done in enumerate(engine.generate(requests)):
            start = len(prompts[done.request])
            end = start + len(done.tokens_T)
            tokens_BT[row, :start], tokens_BT[row, start:end] = prompts[done.request], done.tokens_T
            sampler_BT[row, start:end], mask_BT[row, start:end], segments_BT[row, :end] = done.logp_T, True, 1
        batch = Batch(tokens_BT, np.broadcast_to(np.arange(64, dtype=np.int32), (12, 64)), segments_BT, mask_BT)
        scores = jax.jit(lambda params, batch: model.score(params, batch, compute))(params, batch)
    found = means(mismatch(sampler_BT, scores.logp_BT, mask_BT))
    assert mask_BT.sum() == 12 * 30
    assert np.std(np.asarray(scores.logp_BT)[mask_BT]) > 0.5
    if dtype == "float32":
        assert found["sampling/logp_difference/max"] < 1e-4
    else:
        # A token near the border between two experts may be sent to the other one: `routing_replay` is for that.
        bound = 0.05 if kind in tiny.WITH_EXPERTS else 0.01
        assert 0 < found["sampling/logp_difference/mean"] < bound


def test_the_engine_computes_with_routers_as_the_trainer_does() -> None:
    """In fp32: rounded ones would choose other experts."""
    model = tiny.kind_model("deepseek-v3")
    with mesh.use(mesh.make(ModelKeys(), jax.devices()[:1])) as one:
        params = param.initialise(model.spec, jax.random.key(0), jnp.float32, one)
        engine = LocalEngine(model, params, Compute(jnp.dtype("bfloat16")), one, EngineKeys())
    used = engine._params["layers"]["1"]["mlp"]
    assert {name: str(used[name].dtype) for name in ("router", "correction", "gate")} == {
        "router": "float32",
        "correction": "float32",
        "gate": "bfloat16",
    }
