from __future__ import annotations

from typing import Any

import folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from luthier import mesh
from luthier.checkpoint import huggingface, tokenizer
from luthier.checkpoint.source import resolve
from luthier.config import EngineKeys, ModelKeys
from luthier.model import param
from luthier.model.compute import Compute
from luthier.model.model import Model
from luthier.model.param import Tree
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


def apart(model: Model, params: Tree, compute: Compute, prompts: list[list[int]], samples: int, new: int) -> Any:
    """Sample from ``params``, score what came, and return how far the two are apart and the log-probs' deviation."""
    length = max(map(len, prompts)) + new
    keys = EngineKeys(max_num_seqs=8, max_target_length=length)
    engine = LocalEngine(model, params, compute, folders.one_device(), keys)
    requests = [Request(prompt, samples, Sampling(max_new_tokens=new)) for prompt in prompts]
    shape = (len(prompts) * samples, length)
    tokens_BT, sampler_BT = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    mask_BT, segments_BT = np.zeros(shape, bool), np.zeros(shape, np.int32)
    for row, done in enumerate(engine.generate(requests)):
        start = len(prompts[done.request])
        end = start + len(done.tokens_T)
        tokens_BT[row, :start], tokens_BT[row, start:end] = prompts[done.request], done.tokens_T
        sampler_BT[row, start:end], mask_BT[row, start:end], segments_BT[row, :end] = done.logp_T, True, 1
    batch = Batch(tokens_BT, np.broadcast_to(np.arange(length, dtype=np.int32), shape), segments_BT, mask_BT)
    logp_BT = np.asarray(jax.jit(lambda params, batch: model.score(params, batch, compute).logp_BT)(params, batch))
    assert mask_BT.sum() == shape[0] * new
    return means(mismatch(sampler_BT, logp_BT, mask_BT)), np.std(logp_BT[mask_BT])


@pytest.mark.parametrize(
    ("kind", "dtype", "weights", "kept"),
    [
        *((kind, "float32", "float32", "none") for kind in tiny.KINDS),
        *(("llama", *types, kept) for types in HALVES for kept in ("none", "attention")),
        *(pytest.param(kind, *types, "none", marks=pytest.mark.slow) for kind in tiny.WITH_EXPERTS for types in HALVES),
        *(pytest.param(kind, *HALVES[0], "attention", marks=pytest.mark.slow) for kind in tiny.WITH_EXPERTS),
    ],
)
def test_the_trainer_scores_what_the_engine_sampled(kind: str, dtype: str, weights: str, kept: str) -> None:
    """The engine is given the trainer's own weights, and casts fp32 ones for bf16 as each use in training does."""
    model, compute = tiny.kind_model(kind), Compute(jnp.dtype(dtype), float32=kept)
    with mesh.use(folders.one_device()) as one:
        params = param.initialise(model.spec, jax.random.key(0), jnp.dtype(weights), one)
        params = jax.tree.map(lambda w: w * 5 if w.ndim > 1 else w, params)  # far from uniform
        random = np.random.default_rng(0)
        prompts = [random.integers(0, 256, length).tolist() for length in (18, 25, 30, 20)]
        found, deviation = apart(model, params, compute, prompts, samples=3, new=30)
    assert deviation > 0.5
    if dtype == "float32":
        assert found["sampling/logp_difference/max"] < 1e-4
    else:
        # A token near the border between two experts may be sent to the other one: `routing_replay` is for that.
        bound = 0.05 if kind in tiny.WITH_EXPERTS else 0.01
        assert 0 < found["sampling/logp_difference/mean"] < bound


PROMPTS = (
    "A baker sells 48 rolls in the morning and half as many in the afternoon. How many rolls does she sell that day?",
    "Write two sentences about a lighthouse that nobody visits any more.",
    "What is the difference between a violin and a viola?",
    "Tom has three boxes with 14 pencils each, and gives away 9 pencils. How many are left?",
)


@pytest.mark.slow
@pytest.mark.parametrize(("kept", "bound"), [("residual", 0.02), ("attention", 0.01)])
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_released_weights_in_bf16(name: str, kept: str, bound: float) -> None:
    """With all of a pass in bf16, the 30 layers of SmolLM2 put sampler and trainer 0.025 apart."""
    source = resolve(folders.keys(getattr(folders, name)()))
    model, compute = Model.from_hf(source.config, source.name), Compute(jnp.dtype("bfloat16"), float32=kept)
    words = tokenizer.load(source)
    with mesh.use(folders.one_device()) as one:
        params = huggingface.load(source, model.spec, jnp.bfloat16, one, model.config.ignored)
        found, deviation = apart(model, params, compute, [words.encode(text) for text in PROMPTS], samples=8, new=64)
    assert deviation > 0.5
    assert found["sampling/logp_difference/mean"] < bound


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
