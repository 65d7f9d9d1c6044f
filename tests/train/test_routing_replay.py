"""Routing replay: the trainer sends tokens to the experts that the sampler sent them to (arXiv 2510.11370)."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_variants import VARIANTS

import tiny
from luthier import cli
from luthier import mesh as mesh_lib
from luthier.config import EngineKeys, ModelKeys, RlConfig
from luthier.data.groups import Layout, pack, unpack
from luthier.model import decoder
from luthier.model.compute import Compute
from luthier.model.model import Model
from luthier.rollout.engine import Request, Sampling
from luthier.rollout.local import LocalEngine
from luthier.train import optimizer, policy_step, rl_plan, step
from luthier.train.learner import Learner
from luthier.train.policy_step import Policy
from luthier.types import Trajectory

CONFIG = VARIANTS["qwen3-moe"].config
MODEL = Model.from_hf(CONFIG, "tiny")
HERE = mesh_lib.make(ModelKeys(), jax.devices()[:1])
NEW, SAMPLES = 8, 3
SHARED = Layout(rows=2, row_length=64, scored=48, sequences=6, completion_length=NEW, routes=MODEL.routes)
ALONE = replace(SHARED, shared=False)
SAMPLER = tiny.random_params(MODEL.spec, seed=1)
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


@functools.cache
def moved() -> Any:
    """Return the sampler's weights after a small step, which some tokens' choices do not outlive."""
    random = np.random.default_rng(5)
    return jax.tree.map(lambda w: w + jnp.asarray(random.normal(0, 0.01, w.shape), w.dtype), SAMPLER)


@functools.cache
def sampled() -> Sequence[Trajectory]:
    """Return groups of completions with their routes; there are more of them than rows of the cache."""
    keys = EngineKeys(max_num_seqs=4, prefill_chunk_length=16, decode_steps=3, max_target_length=32)
    random, found = np.random.default_rng(0), []
    with mesh_lib.use(HERE):
        engine = LocalEngine(MODEL, SAMPLER, Compute(), HERE, keys, record_routes=True)
        prompts = [random.integers(0, 256, length).tolist() for length in (5, 20, 12)]
        how = Sampling(max_new_tokens=NEW, stop_token_ids=tuple(range(0, 256, 12)))
        asked = [Request(prompt, SAMPLES, replace(how, seed=n)) for n, prompt in enumerate(prompts)]
        for one in engine.generate(asked):
            prompt_T, logp_T = np.asarray(prompts[one.request], np.int32), one.softmax_logp_T
            mask_T, advantage = np.ones(len(logp_T), bool), float(random.normal())
            found.append(Trajectory(prompt_T, one.tokens_T, mask_T, logp_T, logp_T, None, advantage, one.routes_TLk))
    return found


@jax.jit
def plain(params: Any, tokens_1T: Any, targets_T: Any, routes_L1Tk: Any) -> Any:
    """Return the log-probs of all tokens but the first of a row, each sent where it is said; negative: anywhere."""
    places = jnp.arange(tokens_1T.shape[1])[None]
    out = decoder.forward(params, MODEL.config, tokens_1T, places, None, Compute(), routes_LBTk=routes_L1Tk)
    logp_TV = jax.nn.log_softmax(MODEL.project(params, out.hidden_BTD)[0])
    return jnp.take_along_axis(logp_TV, targets_T[:, None], axis=1)[:, 0]


def alone(params: Any, one: Trajectory, *, replayed: bool) -> Any:
    """Return the log-probs of a completion by a pass over it alone, without padding but behind its end."""
    whole = np.zeros(32, np.int32)
    start, stop = len(one.prompt_T), len(one.prompt_T) + len(one.tokens_T)
    whole[:stop] = np.concatenate([one.prompt_T, one.tokens_T])
    routes_LTk = np.full((MODEL.routes[0], 32, MODEL.routes[1]), -1, np.int16)
    if replayed:
        routes_LTk[:, : stop - 1] = one.routes_TLk.swapaxes(0, 1)
    return plain(params, whole[None], np.roll(whole, -1), routes_LTk[:, None])[start - 1 : stop - 1]


score = jax.jit(lambda params, batch: MODEL.score_tokens(params, batch, Compute()).logp_BT)


def packed(params: Any, ours: Sequence[Trajectory], layout: Layout) -> list[np.ndarray]:
    """Return the log-probs of each completion as the policy step gets them."""
    micros = pack(ours, layout)
    values = [np.asarray(score(params, micro.batch)).reshape(micro.batch.places_BSC.shape) for micro in micros]
    return unpack(micros, values, ours)


@pytest.mark.parametrize("layout", [SHARED, ALONE], ids=["shared", "alone"])
def test_replayed_log_probs_are_those_of_the_recorded_experts(layout: Layout) -> None:
    others = []
    for one, logp_T in zip(sampled(), packed(moved(), sampled(), layout), strict=True):
        np.testing.assert_allclose(logp_T, alone(moved(), one, replayed=True), **TOLERANCE)
        others.append(np.abs(logp_T - alone(moved(), one, replayed=False)).max())
    assert max(others) > 1e-2  # the choices are not the same


@pytest.mark.parametrize("layout", [SHARED, ALONE], ids=["shared", "alone"])
def test_the_sampler_s_own_weights_give_its_log_probs(layout: Layout) -> None:
    for one, logp_T in zip(sampled(), packed(SAMPLER, sampled(), layout), strict=True):
        np.testing.assert_allclose(logp_T, one.sampler_logp_T, **TOLERANCE)


def test_without_routes_tokens_go_where_the_router_says() -> None:
    free = packed(moved(), sampled(), replace(SHARED, routes=None))
    unknown = packed(moved(), [replace(one, routes_TLk=None) for one in sampled()], SHARED)
    for one, free_T, unknown_T in zip(sampled(), free, unknown, strict=True):
        np.testing.assert_allclose(free_T, alone(moved(), one, replayed=False), **TOLERANCE)
        np.testing.assert_array_equal(free_T, unknown_T)


def test_gradients_flow_through_the_replayed_experts() -> None:
    micros = [micro.batch for micro in pack(sampled(), SHARED)]

    def in_rows(params: Any) -> Any:
        return sum(jnp.sum(MODEL.score_tokens(params, batch, Compute()).logp_BT) for batch in micros)

    def one_by_one(params: Any) -> Any:
        return sum(jnp.sum(alone(params, one, replayed=True)) for one in sampled())

    ours, expected = jax.jit(jax.grad(in_rows))(moved()), jax.grad(one_by_one)(moved())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), ours, expected)
    assert float(jnp.abs(ours["layers"]["0"]["mlp"]["router"]).max()) > 1e-2


def test_a_prompt_stands_twice_where_it_was_sent_to_other_experts() -> None:
    prompt, layout = sampled()[0].prompt_T, replace(SHARED, rows=1, row_length=128)
    group = [one for one in sampled() if one.prompt_T.tobytes() == prompt.tobytes()]
    routes_TLk = group[0].routes_TLk.copy()
    routes_TLk[2, 1] = (routes_TLk[2, 1] + 1) % 8
    other = replace(group[0], routes_TLk=routes_TLk)
    for ours, tokens in ((group, len(prompt)), ([other, *group[1:]], 2 * len(prompt))):
        (micro,) = pack(ours, layout)
        assert (micro.batch.segments_BT > 0).sum() == tokens + sum(len(one.tokens_T) for one in ours)
        for one, logp_T in zip(ours, packed(moved(), ours, layout), strict=True):
            np.testing.assert_allclose(logp_T, alone(moved(), one, replayed=True), **TOLERANCE)


def test_old_log_probs_are_replayed_and_the_reference_chooses_for_itself() -> None:
    keys = {"opt_type": "sgd", "adam_b1": 0.0, "num_iterations": 2, "beta": 0.1, "max_new_tokens": NEW}
    config = RlConfig(model_name="x", routing_replay=True, **keys)
    objective = rl_plan.objective(config, jnp.float32)
    with mesh_lib.use(HERE), ThreadPoolExecutor(1) as background:
        tx = optimizer.make(config, MODEL.spec)
        abstract = step.abstract_state(tx, MODEL.spec, jnp.float32, HERE)
        programs = policy_step.compile_steps(
            Policy(MODEL, objective.loss, Compute(), own_old=True),
            tx,
            abstract,
            SHARED,
            HERE,
            background,
            reference=True,
        )
        learner = Learner(config, objective, SHARED, programs, HERE, moved())
        (scored,) = learner._with_policies(moved(), [sampled()])
        for one in scored:
            np.testing.assert_allclose(one.old_logp_T, alone(moved(), one, replayed=True), **TOLERANCE)
            np.testing.assert_allclose(one.reference_logp_T, alone(moved(), one, replayed=False), **TOLERANCE)
        state = step.init_state(jax.tree.map(jnp.array, SAMPLER), tx, MODEL.spec, HERE)
        _, numbers = learner.learn(state, [sampled()], 0.0)
    assert numbers["ratio/mean"] == pytest.approx(1, abs=1e-5)
    assert numbers["sampling/logp_difference/max"] < 1e-4
    assert numbers["grad_norm"] > 0


def write_rows(path: Path) -> Path:
    path.write_text("".join(f'{{"question": "{n} + {n}?", "answer": "#### {2 * n}"}}\n' for n in range(8)))
    return path


def run(folder: Path, model: Path, **keys: Any) -> int:
    chosen = {
        "base_output_directory": folder,
        "load_parameters_path": model,
        "hf_path": write_rows(folder / "rows.jsonl"),
        "reward_functions": f"{Path(__file__).parent / 'rl_rewards.py'}:even",
        "routing_replay": True,
        "reward_workers": 1,
        "steps": 2,
        "prompts_per_step": 2,
        "num_generations": 4,
        "max_new_tokens": NEW,
        "dtype": "float32",
        "learning_rate": 1e-2,
        "chips_per_vm": 1,
        "jax_cache_dir": tiny.ROOT / ".cache" / "jax",
    } | keys
    return cli.main(["rl", *(f"{name}={value}" for name, value in chosen.items())])


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_run_replays(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "model", **CONFIG | {"num_hidden_layers": 2, "vocab_size": 272, "eos_token_id": 2})
    assert run(tmp_path, tmp_path / "model") == 0
    rows = [json.loads(line) for line in (tmp_path / "rl" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert row["sampling/logp_difference/max"] < 1e-4
        assert row["grad_norm"] > 0
    assert "routes" not in (tmp_path / "rl" / "rollouts" / "step-000001.jsonl").read_text()


def test_a_model_without_experts_is_refused(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, tiny_model) == 2
    said = capsys.readouterr().err
    assert "routing_replay=true" in said
    assert "Leave it out" in said
