"""``token_logp`` against log-softmax of whole logits: values, both gradients, chunks, devices."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import TOLERANCE, assert_close

from luthier import mesh
from luthier.config import ModelKeys
from luthier.model import cross_entropy
from luthier.model.cross_entropy import token_logp


@pytest.fixture(params=[1, 7], ids=["one chunk", "chunks"], autouse=True)
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = {1: 10_000, 7: 6}[request.param]
    monkeypatch.setattr(cross_entropy, "LOGITS_LIMIT", {"cpu": tokens * 64 * 4})


def arrays(B: int = 2, T: int = 19, D: int = 16, V: int = 64, dtype: str = "float32"):
    """Return hidden states, head, targets, and a factor of each log-prob in the loss; some of those are zero."""
    keys = jax.random.split(jax.random.key(0), 5)
    hidden_BTD, head_VD = jax.random.normal(keys[0], (B, T, D)).astype(dtype), jax.random.normal(keys[1], (V, D))
    targets_BT = jax.random.randint(keys[2], (B, T), 0, V)
    weights_BT = jax.random.uniform(keys[3], (B, T)) * (jax.random.uniform(keys[4], (B, T)) > 0.3)
    return hidden_BTD, head_VD, targets_BT, weights_BT


def whole(hidden_BTD, head_VD, targets_BT):
    logits_BTV = hidden_BTD.astype(jnp.float32) @ head_VD.T
    logp_BT = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), targets_BT[..., None], axis=-1)[..., 0]
    return logp_BT, logits_BTV.argmax(-1) == targets_BT


def value_and_gradients(function, hidden_BTD, head_VD, targets_BT, weights_BT):
    def loss(hidden_BTD, head_VD):
        logp_BT, correct_BT = function(hidden_BTD, head_VD, targets_BT)[:2]
        return -3.0 * jnp.sum(logp_BT * weights_BT), (logp_BT, correct_BT)

    (_, scores), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(hidden_BTD, head_VD)
    return *scores, *gradients


def announced(weights_BT):
    return functools.partial(token_logp, cotangent_BT=weights_BT)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("linear", [False, True])
def test_values_and_gradients_equal_log_softmax(linear: bool, dtype: str) -> None:
    hidden_BTD, *rest, weights_BT = arrays(dtype=dtype)
    function = announced(weights_BT) if linear else token_logp
    logp_BT, correct_BT, *gradients = value_and_gradients(function, hidden_BTD, *rest, weights_BT)
    expected = value_and_gradients(whole, hidden_BTD.astype(jnp.float32), *rest, weights_BT)
    assert_close(logp_BT, expected[0], TOLERANCE[dtype])
    assert logp_BT.dtype == jnp.float32
    assert [x.dtype for x in gradients] == [hidden_BTD.dtype, jnp.float32]
    for one, other in zip(gradients, expected[2:], strict=True):
        assert_close(one, other, TOLERANCE[dtype])
    if dtype == "float32":  # rounding may turn a near-tie
        np.testing.assert_array_equal(correct_BT, expected[1])


def test_a_loss_that_is_not_linear_has_the_general_gradient() -> None:
    hidden_BTD, head_VD, targets_BT, _ = arrays()

    def gradients(function):
        loss = lambda *arrays: jnp.sum(jnp.square(function(*arrays, targets_BT)[0]))  # noqa: E731
        return jax.jit(jax.grad(loss, (0, 1)))(hidden_BTD, head_VD)

    for one, other in zip(gradients(token_logp), gradients(whole), strict=True):
        assert_close(one, other)


def test_an_announcement_that_does_not_hold_gives_nan() -> None:
    hidden_BTD, head_VD, targets_BT, weights_BT = arrays()
    wrong = announced(jnp.roll(weights_BT, 1, axis=1))
    gradients = value_and_gradients(wrong, hidden_BTD, head_VD, targets_BT, weights_BT)[2:]
    assert all(np.isnan(x).all() for x in gradients)


def test_a_batch_without_trained_tokens_has_no_gradient() -> None:
    hidden_BTD, head_VD, targets_BT, weights_BT = arrays()
    zeros_BT = jnp.zeros_like(weights_BT)
    gradients = value_and_gradients(announced(zeros_BT), hidden_BTD, head_VD, targets_BT, zeros_BT)[2:]
    assert all((np.asarray(x) == 0).all() for x in gradients)


@pytest.mark.parametrize("linear", [False, True])
def test_logits_are_never_whole(linear: bool) -> None:
    hidden_BTD, head_VD, targets_BT, weights_BT = arrays(B=2, T=300, D=4)
    function = announced(weights_BT) if linear else token_logp
    gradient = jax.grad(lambda h, w: jnp.sum(function(h, w, targets_BT).logp_BT * weights_BT), (0, 1))
    compiled = jax.jit(gradient).lower(hidden_BTD, head_VD).compile()
    if cross_entropy.LOGITS_LIMIT["cpu"] < 600 * 64 * 4:
        assert compiled.memory_analysis().temp_size_in_bytes < 600 * 64 * 4


def test_equals_torch() -> None:
    torch = pytest.importorskip("torch")
    hidden_BTD, head_VD, targets_BT, weights_BT = arrays()
    hidden, head = (torch.tensor(np.asarray(x), requires_grad=True) for x in (hidden_BTD, head_VD))
    logits, targets = (hidden @ head.T).flatten(0, 1), torch.tensor(np.asarray(targets_BT)).flatten().long()
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    (3.0 * loss * torch.tensor(np.asarray(weights_BT)).flatten()).sum().backward()
    logp_BT, _, *gradients = value_and_gradients(announced(weights_BT), hidden_BTD, head_VD, targets_BT, weights_BT)
    assert_close(-logp_BT.flatten(), loss.detach().numpy())
    for one, other in zip(gradients, (hidden.grad, head.grad), strict=True):
        assert_close(one, other.numpy())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("linear", [False, True])
def test_capped_logits_have_their_own_values_and_gradients(linear: bool, temperature: float) -> None:
    hidden_BTD, head_VD, targets_BT, weights_BT = arrays()

    def capped(hidden_BTD, head_VD, targets_BT):
        logits_BTV = 2.5 * jnp.tanh(hidden_BTD @ head_VD.T / 2.5)
        logp_BTV = jax.nn.log_softmax(logits_BTV / temperature)
        return jnp.take_along_axis(logp_BTV, targets_BT[..., None], axis=-1)[..., 0], logits_BTV.argmax(
            -1
        ) == targets_BT

    function = announced(weights_BT) if linear else token_logp
    ours = value_and_gradients(
        functools.partial(function, cap=2.5, temperature=temperature), hidden_BTD, head_VD, targets_BT, weights_BT
    )
    theirs = value_and_gradients(capped, hidden_BTD, head_VD, targets_BT, weights_BT)
    for one, other in zip((ours[0], *ours[2:]), (theirs[0], *theirs[2:]), strict=True):
        assert_close(one, other)


def with_entropy(function):
    """Return loss, scores and gradients of a loss in log-probs and entropies, neither of them linear."""

    def run(hidden_BTD, head_VD, targets_BT, weights_BT):
        def loss(hidden_BTD, head_VD):
            scores = function(hidden_BTD, head_VD, targets_BT)
            logp_BT, entropy_BT = scores[0], scores[2]
            return jnp.sum(weights_BT * (jnp.exp(logp_BT) + jnp.square(entropy_BT))), (logp_BT, entropy_BT)

        (_, scores), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(hidden_BTD, head_VD)
        return *scores, *gradients

    return run


def whole_at(temperature: float):
    """Return scores of the plain softmax of whole logits."""

    def scores(hidden_BTD, head_VD, targets_BT):
        logp_BTV = jax.nn.log_softmax(hidden_BTD @ head_VD.T / temperature)
        logp_BT = jnp.take_along_axis(logp_BTV, targets_BT[..., None], axis=-1)[..., 0]
        return logp_BT, None, -jnp.sum(jnp.exp(logp_BTV) * logp_BTV, axis=-1)

    return scores


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_temperature_and_entropy_equal_the_plain_softmax(temperature: float) -> None:
    ours = functools.partial(token_logp, temperature=temperature, entropy=True)
    expected = with_entropy(whole_at(temperature))(*arrays())
    for one, other in zip(with_entropy(ours)(*arrays()), expected, strict=True):
        assert_close(one, other)


def test_entropies_stay_exact_where_logits_are_large() -> None:
    hidden_BTD, head_VD, targets_BT, _ = arrays()
    shift_VD = head_VD.at[:, 0].set(100.0)  # the same for all tokens, so the softmax is that without it
    hidden_BTD = hidden_BTD.at[..., 0].set(10.0)
    ours = token_logp(hidden_BTD, shift_VD, targets_BT, entropy=True)
    expected = whole_at(1.0)(hidden_BTD.at[..., 0].set(0.0), head_VD, targets_BT)
    np.testing.assert_allclose(ours.entropy_BT, expected[2], rtol=2e-3)


def test_an_announced_gradient_at_a_temperature() -> None:
    hidden_BTD, head_VD, targets_BT, weights_BT = arrays()
    ours = functools.partial(token_logp, cotangent_BT=weights_BT, temperature=0.6)
    expected = value_and_gradients(whole_at(0.6), hidden_BTD, head_VD, targets_BT, weights_BT)
    actual = value_and_gradients(ours, hidden_BTD, head_VD, targets_BT, weights_BT)
    for place in (0, 2, 3):
        assert_close(actual[place], expected[place])
    with pytest.raises(ValueError, match="entropy"):
        token_logp(hidden_BTD, head_VD, targets_BT, weights_BT, entropy=True)


def test_an_entropy_that_was_not_asked_for_is_not_there() -> None:
    assert token_logp(*arrays()[:3]).entropy_BT is None


@pytest.mark.parametrize("axes", [(1, 8, 1), (2, 2, 2), (1, 1, 8)], ids=str)
@pytest.mark.parametrize("linear", [False, True])
def test_eight_devices_equal_one(linear: bool, axes: tuple[int, int, int]) -> None:
    hidden_BTD, head_VD, targets_BT, weights_BT = arrays(B=8)
    function = announced(weights_BT) if linear else token_logp
    expected = value_and_gradients(function, hidden_BTD, head_VD, targets_BT, weights_BT)
    keys = ModelKeys(ici_data_parallelism=axes[0], ici_fsdp_parallelism=axes[1], ici_tensor_parallelism=axes[2])
    with mesh.use(mesh.make(keys)) as devices:
        head_VD = jax.device_put(head_VD, mesh.sharding(("vocab", "embed"), head_VD.shape, devices))
        actual = value_and_gradients(function, hidden_BTD, head_VD, targets_BT, weights_BT)
        for one, other in zip(actual, expected, strict=True):
            assert_close(one, other)


def test_entropies_on_eight_devices_equal_one() -> None:
    hidden_BTD, head_VD, targets_BT, weights_BT = arrays(B=8)
    run = with_entropy(functools.partial(token_logp, temperature=0.6, entropy=True))
    expected = run(hidden_BTD, head_VD, targets_BT, weights_BT)
    with mesh.use(mesh.make(ModelKeys(ici_data_parallelism=2, ici_fsdp_parallelism=2, ici_tensor_parallelism=2))):
        for one, other in zip(run(hidden_BTD, head_VD, targets_BT, weights_BT), expected, strict=True):
            assert_close(one, other)


def test_a_vocabulary_or_batch_that_does_not_divide_stays_whole() -> None:
    hidden_BTD, head_VD, targets_BT, weights_BT = arrays(B=3, V=63)
    expected = value_and_gradients(announced(weights_BT), hidden_BTD, head_VD, targets_BT, weights_BT)
    with mesh.use(mesh.make(ModelKeys(ici_fsdp_parallelism=4, ici_tensor_parallelism=2))):
        actual = value_and_gradients(announced(weights_BT), hidden_BTD, head_VD, targets_BT, weights_BT)
        for one, other in zip(actual, expected, strict=True):
            assert_close(one, other)
