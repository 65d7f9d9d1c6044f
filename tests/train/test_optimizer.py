"""Optimizers against torch's and against their formulas; schedules at their corners."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_variants import VARIANTS

from luthier import mesh
from luthier.config import SftConfig
from luthier.model import param
from luthier.model.model import Model
from luthier.train import optimizer
from tiny import TINY

MODEL = Model.from_hf(TINY | {"num_hidden_layers": 2}, "tiny")


def config(**keys: object) -> SftConfig:
    return SftConfig(model_name="x", hf_path="y", **keys)


def trees(count: int) -> list[param.Tree]:
    one = mesh.make(config(), jax.devices()[:1])
    return [param.initialise(MODEL.spec, jax.random.key(seed), jnp.float32, one, scale=0.1) for seed in range(count)]


def advance(keys: SftConfig, params: param.Tree, gradients: list[param.Tree], rate: float) -> param.Tree:
    """Apply one update for each gradient."""
    tx = optimizer.make(keys, MODEL.spec)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = jax.tree.map(lambda w, u: w + rate * u, params, updates)
    return params


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_equal_to_torch(kind: str) -> None:
    torch = pytest.importorskip("torch")
    start, *gradients = trees(4)
    keys = config(opt_type=kind, adam_weight_decay=0.1, gradient_clipping_threshold=1.0)
    leaves = param.leaves(MODEL.spec)
    theirs = {path: torch.nn.Parameter(torch.tensor(np.asarray(w))) for path, w in _flat(start).items()}
    groups = [
        {"params": [w for path, w in theirs.items() if leaves[path].decays == decays], "weight_decay": 0.1 * decays}
        for decays in (True, False)
    ]
    sgd = {"lr": 0.01, "momentum": 0.9}
    tx = torch.optim.AdamW(groups, lr=0.01) if kind == "adamw" else torch.optim.SGD(groups, **sgd)
    for gradient in gradients:
        for path, g in _flat(gradient).items():
            theirs[path].grad = torch.tensor(np.asarray(g))
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        if kind == "sgd":  # torch adds the decay to the gradient before the momentum; ours is decoupled
            decay = {path: 0.1 * w.detach().clone() for path, w in theirs.items() if leaves[path].decays}
            for group in tx.param_groups:
                group["weight_decay"] = 0.0
        tx.step()
        if kind == "sgd":
            for path, amount in decay.items():
                theirs[path].data -= 0.01 * amount
    for path, w in _flat(advance(keys, start, gradients, 0.01)).items():
        np.testing.assert_allclose(w, theirs[path].detach().numpy(), rtol=2e-5, atol=2e-6, err_msg=path)


def test_muon_orthogonalises_each_layers_matrix() -> None:
    start, gradient = trees(2)
    keys = config(opt_type="muon", adam_b1=0.0, gradient_clipping_threshold=0)
    moved = jax.tree.map(jnp.subtract, advance(keys, start, [gradient], 1.0), start)
    for layer in range(2):
        gate = np.asarray(moved["layers"]["0"]["mlp"]["gate"][layer])
        values = np.linalg.svd(gate, compute_uv=False)
        scale = 0.2 * 128**0.5
        assert 0.6 * scale < values.min()
        assert values.max() < 1.3 * scale
        left, _, right = np.linalg.svd(np.asarray(gradient["layers"]["0"]["mlp"]["gate"][layer]), full_matrices=False)
        polar = left @ right
        assert np.sum(polar * -gate) / np.linalg.norm(polar) / np.linalg.norm(gate) > 0.97
    np.testing.assert_allclose(np.abs(moved["norm"]), 1.0, rtol=1e-3)  # the rest takes AdamW's steps


def some(name: str, *endings: str) -> dict[str, param.Param]:
    """Return the weights of a variant whose paths end so, by their endings; of several layers the last one's."""
    spec = param.leaves(Model.from_hf(VARIANTS[name].config, name).spec)
    return {end: next(p for path, p in reversed(spec.items()) if path.endswith(f"/{end}")) for end in endings}


@pytest.mark.parametrize(
    ("name", "matrices", "vectors"),
    [
        ("qwen3-moe", {"mlp/gate": 2, "mlp/down": 2}, ["q_norm"]),  # each expert has a tensor
        ("gpt-oss", {"mlp/gate": 2, "mlp/down": 2}, ["gate_bias", "down_bias", "sinks"]),  # all of a layer have one
        ("deepseek-v3", {"k_up": 1, "v_up": 1}, ["correction"]),  # both lie in one tensor
        ("phi3", {"attention/k": 1, "mlp/up": 1}, []),
    ],
)
def test_muon_orthogonalises_each_matrix_however_tensors_hold_it(
    name: str, matrices: dict[str, int], vectors: list[str]
) -> None:
    spec = some(name, *matrices, *vectors)
    random = np.random.default_rng(0)
    gradient = {path: jnp.asarray(random.normal(size=each.shape), jnp.float32) for path, each in spec.items()}
    tx = optimizer.make(config(opt_type="muon", adam_b1=0.0, gradient_clipping_threshold=0), spec)
    updates, _ = jax.jit(tx.update)(gradient, tx.init(gradient), gradient)
    for path, stacked in matrices.items():
        update = np.asarray(updates[path]).reshape(*spec[path].shape[: stacked + 1], -1)
        values = np.linalg.svd(update, compute_uv=False)
        scale = 0.2 * max(update.shape[-2:]) ** 0.5
        assert 0.5 * scale < values.min(), path
        assert values.max() < 1.3 * scale, path
    for path in vectors:  # which take AdamW's steps
        np.testing.assert_allclose(np.abs(updates[path]), 1.0, rtol=1e-3, err_msg=path)


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "muon", "sgd"])
def test_a_correction_of_the_choice_stays_what_it_was(kind: str) -> None:
    """It has no gradient: then no optimizer may move it, by decay or otherwise."""
    spec = some("deepseek-v3", "correction", "router")
    params = {path: jnp.full(each.shape, 0.3) for path, each in spec.items()}
    gradient = {"correction": jnp.zeros_like(params["correction"]), "router": jnp.ones_like(params["router"])}
    tx = optimizer.make(config(opt_type=kind, adam_weight_decay=0.1), spec)
    update, state = jax.jit(tx.update), tx.init(params)
    for _ in range(2):
        updates, state = update(gradient, state, params)
        assert not np.asarray(updates["correction"]).any()
        assert np.asarray(updates["router"]).all()


def test_adafactor_sees_each_tensor_by_itself() -> None:
    """Scaling one layer's gradient must leave the other layer's update alone."""
    start, gradient = trees(2)
    keys = config(opt_type="adafactor", gradient_clipping_threshold=0)
    louder = jax.tree.map(lambda g: g, gradient)
    louder["layers"]["0"]["mlp"]["gate"] = gradient["layers"]["0"]["mlp"]["gate"].at[0].multiply(100.0)
    one, other = (advance(keys, start, [g], 1.0)["layers"]["0"]["mlp"]["gate"] for g in (gradient, louder))
    np.testing.assert_array_equal(one[1], other[1])


def test_moments_are_kept_in_the_type_asked_for() -> None:
    start, gradient = trees(2)
    for kind in ("adamw", "muon", "sgd"):
        keys = config(opt_type=kind, mu_dtype="bfloat16")
        tx = optimizer.make(keys, MODEL.spec)
        _, state = tx.update(gradient, tx.init(start), start)
        moments = [x for x in jax.tree.leaves(state) if x.shape == start["layers"]["0"]["attention"]["q"].shape]
        assert moments
        assert all(x.dtype == jnp.bfloat16 for x in moments)
    full, half = (
        advance(config(mu_dtype=dtype), start, [gradient], 0.01)["embed"] for dtype in ("float32", "bfloat16")
    )
    np.testing.assert_allclose(full, half, rtol=0.05, atol=1e-3)


def test_clipping_bounds_the_norm() -> None:
    start, gradient = trees(2)
    keys = config(opt_type="sgd", gradient_clipping_threshold=0.5)
    moved = jax.tree.map(jnp.subtract, advance(keys, start, [gradient], 1.0), start)
    norm = np.sqrt(sum(float(jnp.sum(jnp.square(x))) for x in jax.tree.leaves(moved)))
    assert norm == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", {0: 0.1, 9: 1.0, 10: 1.0, 99: 1.0}),
        ("linear", {0: 0.1, 9: 1.0, 10: 1.0, 55: 0.6, 100: 0.2}),
        ("cosine", {0: 0.1, 10: 1.0, 55: 0.6, 100: 0.2}),
        ("wsd", {0: 0.1, 10: 1.0, 80: 1.0, 90: 0.6, 100: 0.2}),
    ],
)
def test_schedules(kind: str, expected: dict[int, float]) -> None:
    keys = config(
        lr_schedule_type=kind, learning_rate=1.0, warmup_steps_fraction=0.1, learning_rate_final_fraction=0.2,
        wsd_decay_steps_fraction=0.2,
    )  # fmt: skip
    rate = optimizer.schedule(keys, 100)
    for step, value in expected.items():
        assert rate(step) == pytest.approx(value, abs=1e-6), step


def _flat(tree: param.Tree) -> dict[str, jax.Array]:
    flat, _ = jax.tree.flatten_with_path(tree)
    return {"/".join(entry.key for entry in path): leaf for path, leaf in flat}
