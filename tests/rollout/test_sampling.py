"""Draws against exact distributions, which numpy makes by sorting, and kept tokens against Transformers' filters."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from luthier.rollout import sampling
from luthier.rollout.sampling import Drawn, Settings

DRAWS = 100_000
SHARE = 10_000
"""Rows of one call."""

HOWS = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
    {"temperature": 1.5, "top_k": 30, "top_p": 0.95, "min_p": 0.05},
    {"top_p": 0.7, "min_p": 0.2},
]

draw = jax.jit(sampling.draw)


def name(how: dict[str, float]) -> str:
    return "-".join(f"{key}={value}" for key, value in how.items()) or "plain"


def settings(
    rows: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int = 0
) -> Settings:
    """The same settings for each row, each with a key of its own."""
    return Settings(
        temperature_B=jnp.full(rows, temperature, jnp.float32),
        top_k_B=jnp.full(rows, top_k, jnp.int32),
        top_p_B=jnp.full(rows, top_p, jnp.float32),
        min_p_B=jnp.full(rows, min_p, jnp.float32),
        key_B2=jax.random.key_data(jax.random.split(jax.random.key(seed), rows)),
    )


def random_logits(rows: int, vocabulary: int, scale: float = 2.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, vocabulary)).astype(np.float32) * np.float32(scale)


def softmax(logits_V: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    p_V = np.exp((logits_V.astype(np.float64) - logits_V.max()) / temperature)
    return p_V / p_V.sum()


def exact(
    logits_V: np.ndarray, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> np.ndarray:
    """The distribution by its definition: sort, keep a head of the sorted tokens and its ties, renormalise."""
    p_V = softmax(logits_V, temperature)
    falling_V = np.sort(p_V)[::-1]
    if 0 < top_k < len(p_V):
        p_V = np.where(p_V >= falling_V[top_k - 1], p_V, 0)
        p_V /= p_V.sum()
    if top_p < 1:
        falling_V = np.sort(p_V)[::-1]
        enough = np.searchsorted(np.cumsum(falling_V), top_p)
        p_V = np.where(p_V >= falling_V[enough], p_V, 0)
    p_V = np.where(p_V >= min_p * p_V.max(), p_V, 0)
    return p_V / p_V.sum()


def kept(logits_BV: np.ndarray, how: Settings) -> np.ndarray:
    """Which tokens the filters leave, from the compiled filter itself."""

    @jax.jit
    def least(logits_BV: jax.Array, how: Settings) -> tuple[jax.Array, jax.Array]:
        logits_BRC = sampling._in_columns(logits_BV)
        top_B = logits_BRC.max((1, 2))[:, None, None]
        p_BRC = jnp.exp((logits_BRC - top_B) / how.temperature_B[:, None, None])
        least_B = sampling._least_kept(p_BRC, how, how.temperature_B <= 0)
        return p_BRC, least_B

    p_BRC, least_B = least(jnp.asarray(logits_BV), how)
    kept_BRC = np.asarray((p_BRC >= least_B[:, None, None]) & (p_BRC > 0))
    return kept_BRC.reshape(len(logits_BV), -1)[:, : logits_BV.shape[1]]


@functools.cache
def many(vocabulary: int, how: tuple[tuple[str, float], ...]) -> tuple[np.ndarray, Drawn]:
    """100,000 draws from one row of logits: one key, a step for each draw."""
    logits_V = random_logits(1, vocabulary)[0]
    one = settings(SHARE, **dict(how))
    one = Settings(one.temperature_B, one.top_k_B, one.top_p_B, one.min_p_B, jnp.tile(one.key_B2[:1], (SHARE, 1)))
    logits_BV = jnp.tile(jnp.asarray(logits_V), (SHARE, 1))
    shares = [draw(logits_BV, one, start + jnp.arange(SHARE)) for start in range(0, DRAWS, SHARE)]
    return logits_V, Drawn(*(np.concatenate(field) for field in zip(*shares, strict=True)))


@pytest.mark.parametrize("how", HOWS, ids=name)
@pytest.mark.parametrize("vocabulary", [40, 300])  # one row of columns that is not full, and two
def test_draws_follow_the_exact_distribution(vocabulary, how):
    logits_V, drawn = many(vocabulary, tuple(how.items()))
    p_V = exact(logits_V, **how)
    counts_V = np.bincount(drawn.tokens_B, minlength=vocabulary)
    assert counts_V[p_V == 0].sum() == 0, "a token that the filters took out was drawn"
    rare_V = p_V * DRAWS < 10  # too few for the test's approximation: counted together
    observed = np.append(counts_V[~rare_V], counts_V[rare_V].sum())
    expected = np.append(p_V[~rare_V], p_V[rare_V].sum()) * DRAWS
    some = expected > 0
    if some.sum() > 1:
        assert stats.chisquare(observed[some], expected[some]).pvalue > 1e-3


@pytest.mark.parametrize("how", HOWS, ids=name)
@pytest.mark.parametrize("vocabulary", [40, 300])
def test_log_probs_are_those_of_the_draw_and_of_the_softmax(vocabulary, how):
    logits_V, drawn = many(vocabulary, tuple(how.items()))
    close = functools.partial(np.testing.assert_allclose, rtol=2e-7, atol=1e-6)  # 2e-7: two steps of fp32
    close(drawn.logp_B, np.log(exact(logits_V, **how)[drawn.tokens_B]))
    close(drawn.softmax_logp_B, np.log(softmax(logits_V, how.get("temperature", 1.0))[drawn.tokens_B]))


def test_consecutive_draws_are_independent():
    """Pairs of draws at neighbouring steps: all pairs as likely as the product says."""
    logits_V, drawn = many(40, (("top_k", 5),))
    p_V = exact(logits_V, top_k=5)
    places = np.flatnonzero(p_V)
    pairs = np.searchsorted(places, drawn.tokens_B).reshape(-1, 2)
    counts = np.bincount(pairs[:, 0] * 5 + pairs[:, 1], minlength=25)
    assert stats.chisquare(counts, np.outer(p_V[places], p_V[places]).ravel() * len(pairs)).pvalue > 1e-3


def test_greedy_is_argmax_and_the_first_of_equals():
    logits_BV = random_logits(8, 1000)
    logits_BV[3, [17, 400]] = 50.0
    drawn = draw(logits_BV, settings(8, temperature=0.0, top_k=3, top_p=0.5), jnp.arange(8))
    np.testing.assert_array_equal(drawn.tokens_B, logits_BV.argmax(1))
    np.testing.assert_array_equal(drawn.logp_B, np.zeros(8))
    whole = [np.log(softmax(row)[token]) for row, token in zip(logits_BV, drawn.tokens_B, strict=True)]
    np.testing.assert_allclose(drawn.softmax_logp_B, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("how", [{"top_k": 1}, {"top_p": 0.0}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=name)
def test_the_narrowest_filters_leave_the_likeliest(how):
    logits_BV = random_logits(16, 1000)
    drawn = draw(logits_BV, settings(16, temperature=2.0, **how), jnp.arange(16))
    np.testing.assert_array_equal(drawn.tokens_B, logits_BV.argmax(1))
    np.testing.assert_array_equal(drawn.logp_B, np.zeros(16))


@pytest.mark.parametrize("how", [{"top_k": 1000}, {"top_k": 5000}, {"top_k": 0}, {"top_p": 1.0}], ids=name)
def test_the_widest_filters_leave_all(how):
    logits_BV = random_logits(4, 1000)
    assert kept(logits_BV, settings(4, **how)).all()


@pytest.mark.parametrize(("how", "left"), [({"top_k": 2}, 3), ({"top_p": 0.4}, 3), ({"min_p": 0.9}, 3)])
def test_ties_with_the_last_one_kept_are_kept(how, left):
    logits_BV = np.full((1, 300), -3.0, np.float32)
    logits_BV[0, [5, 261, 299]] = 4.0
    assert kept(logits_BV, settings(1, **how)).sum() == left
    equal_BV = np.zeros((1, 300), np.float32)
    assert kept(equal_BV, settings(1, **how)).sum() == 300


@pytest.mark.parametrize("how", HOWS, ids=name)
def test_extreme_logits(how):
    """Entries of -inf and 1e30: no NaN, and nothing drawn that has no probability."""
    logits_BV = random_logits(64, 600)
    logits_BV[:16, ::2] = -np.inf
    logits_BV[16:32] = -np.inf
    logits_BV[16:32, 599] = -5.0
    logits_BV[32:48, 7] = 1e30
    logits_BV[48:] = -1e30
    logits_BV[48:, 300:] = -np.inf
    drawn = jax.tree.map(np.asarray, draw(logits_BV, settings(64, **how), jnp.arange(64)))
    assert np.isfinite(drawn.logp_B).all()
    assert np.isfinite(drawn.softmax_logp_B).all()
    assert (drawn.tokens_B[:16] % 2 == 1).all()
    assert (drawn.tokens_B[16:32] == 599).all()
    assert (drawn.tokens_B[32:48] == 7).all()
    assert (drawn.tokens_B[48:] < 300).all()


def test_logits_that_are_not_numbers_end_and_give_tokens_of_the_vocabulary():
    logits_BV = np.full((3, 300), np.nan, np.float32)
    logits_BV[1] = -np.inf
    for how in ({}, {"top_k": 5, "top_p": 0.5}, {"temperature": 0.0}):
        drawn = jax.tree.map(np.asarray, draw(logits_BV, settings(3, **how), jnp.arange(3)))
        assert ((drawn.tokens_B >= 0) & (drawn.tokens_B < 300)).all()
        assert np.isnan(drawn.softmax_logp_B).all()


@pytest.mark.parametrize("mass_X", [[0, 0, 1, 0], [1, 0, 0, 0], [1e-30, 0, 1e-30, 0], [1, 1e-20, 0, 0]])
def test_an_entry_without_mass_is_never_chosen(mass_X):
    uniform_B = jnp.array([0.0, 0.25, 0.5, 1 - 2**-23, 1.0], jnp.float32)  # 1 is beyond what is ever drawn
    chosen_B = sampling._invert(jnp.tile(jnp.array(mass_X, jnp.float32), (5, 1)), uniform_B)
    assert all(mass_X[chosen] > 0 for chosen in chosen_B.tolist())


@pytest.mark.parametrize("how", HOWS[1:], ids=name)
def test_transformers_keeps_the_same_tokens(how):
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as theirs

    warpers = {
        "temperature": theirs.TemperatureLogitsWarper,
        "top_k": theirs.TopKLogitsWarper,
        "top_p": theirs.TopPLogitsWarper,
        "min_p": theirs.MinPLogitsWarper,
    }
    logits_BV = random_logits(32, 2000, scale=3.0, seed=1)
    scores_BV = torch.tensor(logits_BV)
    for key, value in how.items():
        scores_BV = warpers[key](value)(None, scores_BV)
    np.testing.assert_array_equal(kept(logits_BV, settings(32, **how)), torch.isfinite(scores_BV).numpy())


def mixed(rows: int) -> Settings:
    """A row for each of the HOWS and a greedy one, in turn."""
    hows = [*HOWS, {"temperature": 0.0}]
    single = [settings(1, **hows[row % len(hows)], seed=row) for row in range(rows)]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *single)


def test_a_row_does_not_depend_on_the_others():
    """Bitwise: alone among plain rows, where the filters' loops may not run, or among all kinds."""
    rows = 12
    logits_BV, among = random_logits(rows, 3000), mixed(rows)
    drawn = draw(logits_BV, among, jnp.arange(rows))
    other_BV, other = random_logits(rows, 3000, seed=9), settings(rows, seed=77)
    for row in range(rows):
        beside_BV = other_BV.copy()
        beside_BV[row] = logits_BV[row]
        beside = jax.tree.map(lambda plain, mine, row=row: plain.at[row].set(mine[row]), other, among)
        alone = draw(beside_BV, beside, jnp.full(rows, 500).at[row].set(row))
        for mine, its in zip(drawn, alone, strict=True):
            assert mine[row] == its[row]


def test_a_row_does_not_depend_on_padding_behind_the_vocabulary():
    logits_BV, how = random_logits(20, 1000), mixed(20)
    padded_BV = np.pad(logits_BV, ((0, 0), (0, 600)), constant_values=-np.inf)
    mine, its = (draw(rows, how, jnp.arange(20)) for rows in (logits_BV, padded_BV))
    np.testing.assert_array_equal(mine.tokens_B, its.tokens_B)
    for name in ("logp_B", "softmax_logp_B"):  # a longer sum may be added up in another order
        np.testing.assert_array_max_ulp(np.asarray(getattr(mine, name)), np.asarray(getattr(its, name)), maxulp=2)


def test_noise_is_a_function_of_key_and_step():
    logits_BV = np.zeros((64, 5000), np.float32)
    first, again = (draw(logits_BV, settings(64), jnp.full(64, 3)).tokens_B for _ in range(2))
    np.testing.assert_array_equal(first, again)
    later = draw(logits_BV, settings(64), jnp.full(64, 4)).tokens_B
    reseeded = draw(logits_BV, settings(64, seed=1), jnp.full(64, 3)).tokens_B
    for other in (later, reseeded):
        assert (np.asarray(first) == np.asarray(other)).mean() < 0.1
    assert len(set(first.tolist())) > 55, "rows with keys of their own draw alike"


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_the_likeliest_and_their_log_probs(temperature):
    logits_BV = random_logits(4, 1000)
    ids_BA, logp_BA = sampling.likeliest(jnp.asarray(logits_BV), jnp.full(4, temperature), 5)
    np.testing.assert_array_equal(ids_BA, np.argsort(-logits_BV, axis=1)[:, :5])
    for row in range(4):
        whole_V = softmax(logits_BV[row], temperature or 1.0)
        np.testing.assert_allclose(logp_BA[row], np.log(whole_V[ids_BA[row]]), rtol=2e-7, atol=1e-6)
