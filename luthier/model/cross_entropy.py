"""Log-probabilities of tokens under a vocabulary whose logits are never whole.

Logits are fp32 and held for a chunk of tokens at a time, laid out vocabulary by tokens: then the head is the left
operand of each matmul, which is transposed once a step, instead of every chunk's logits. Chunks are cut along time and
keep all rows, so that an array split over devices by rows stays split.

Two gradients. In general the backward pass computes each chunk's logits again: four matmuls. Where the loss is linear
in the log-probabilities (cross entropy is), the factor of each is known beforehand: given it, the forward pass forms
the gradients while it holds the logits, three matmuls in all.

Logits may be capped softly and then divided by a temperature, in fp32 and not in the hidden states, as a sampler
does it.

Left out on purpose: z-loss and label smoothing.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from luthier import mesh as mesh_lib
from luthier.model import zigzag
from luthier.model.cpu import fence, transposed
from luthier.model.layers import softcap

LOGITS_LIMIT = {"cpu": 100 * 2**20, "gpu": 2**30, "tpu": 2**30}  # bytes of fp32 logits in a chunk


class TokenScores(NamedTuple):
    """``logp_BT`` fp32, the log-probability of each target; ``correct_BT`` bool, whether no token is likelier.

    ``entropy_BT`` fp32 is that of the whole distribution which the target is one outcome of, None where not asked for.
    ``routed`` says where the model sent the tokens, None for one without experts.
    """

    logp_BT: jax.Array
    correct_BT: jax.Array
    entropy_BT: jax.Array | None = None
    routed: Any = None


def token_logp(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    cotangent_BT: jax.Array | None = None,
    *,
    cap: float | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
) -> TokenScores:
    """Return the scores of ``targets_BT`` under ``softmax(hidden @ head.T / temperature)``.

    ``hidden_BTD[b, t]`` predicts ``targets_BT[b, t]``: the caller shifts. The head is cast to the type of
    ``hidden_BTD`` for its matmuls; its gradient has its own type and is summed in fp32. With ``entropy``, that of each
    distribution is given too, and has its exact gradient. With a ``cap`` c, logits are ``c tanh(hidden @ head.T / c)``
    before they are divided (Gemma 2, arXiv 2408.00118, section 2).

    ``cotangent_BT`` announces the derivative of the loss by ``logp_BT``, up to one factor for all tokens, and makes
    the gradient a quarter cheaper. A loss whose derivative is not as announced gets NaN gradients. Raises ValueError
    where it comes with ``entropy``, of which nothing is announced.
    """
    how = _How(cap, temperature, entropy)
    if cotangent_BT is not None and entropy:
        raise ValueError("token_logp: an announced gradient is that of log-probs alone, not of an entropy")
    length = hidden_BTD.shape[1]
    short = -length % zigzag.ways()
    if short:
        hidden_BTD = jnp.pad(hidden_BTD, ((0, 0), (0, short), (0, 0)))
    arrays_BT = [targets_BT] if cotangent_BT is None else [targets_BT, jax.lax.stop_gradient(cotangent_BT)]
    arrays_BT = [_whole_rows(jnp.pad(x, ((0, 0), (0, short)))) for x in arrays_BT]
    with jax.named_scope("token_logp"):
        score = _scores if cotangent_BT is None else _linear_scores
        scores = TokenScores(*score(how, hidden_BTD, head_VD, *arrays_BT))
    return jax.tree.map(lambda score_BT: _whole_rows(score_BT)[:, :length], scores)


def _whole_rows(x_BT: jax.Array) -> jax.Array:
    """Keep whole, along time, what callers shift by a token: XLA shifts rows that are split wrongly (jax 0.10)."""
    return x_BT if zigzag.ways() == 1 else mesh_lib.constrain(x_BT, "batch", "slots")


class _How(NamedTuple):
    """What is computed of the logits, and what they are capped and divided by first."""

    cap: float | None
    temperature: float
    entropy: bool


def _plain_scores(how: _How, hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array) -> TokenScores:
    return _over_mesh(_local_scores, how, hidden_BTD, head_VD, targets_BT)[0]


def _scores_forward(how: _How, hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array) -> Any:
    scores, lse_BT = _over_mesh(_local_scores, how, hidden_BTD, head_VD, targets_BT)
    return scores, (hidden_BTD, head_VD, targets_BT, lse_BT, scores.entropy_BT)


def _scores_backward(how: _How, saved: Any, cotangents: TokenScores) -> Any:
    arrays = (*saved, cotangents.logp_BT, cotangents.entropy_BT)
    return *_over_mesh(_local_gradients, how, *arrays), None


_scores = jax.custom_vjp(_plain_scores, nondiff_argnums=(0,))
_scores.defvjp(_scores_forward, _scores_backward)


def _announced_scores(how: _How, hidden_BTD: Any, head_VD: Any, targets_BT: Any, cotangent_BT: Any) -> Any:
    return _plain_scores(how, hidden_BTD, head_VD, targets_BT)[:2]


def _linear_scores_forward(how: _How, hidden_BTD: Any, head_VD: Any, targets_BT: Any, cotangent_BT: Any) -> Any:
    *scores, dhidden_BTD, dhead_VD = _over_mesh(_local_linear, how, hidden_BTD, head_VD, targets_BT, cotangent_BT)
    return tuple(scores), (dhidden_BTD, dhead_VD, cotangent_BT)


def _linear_scores_backward(_: _How, saved: Any, cotangents: Any) -> Any:
    dhidden_BTD, dhead_VD, announced_BT = saved
    actual_BT = cotangents[0]
    square = jnp.sum(announced_BT * announced_BT)
    factor = jnp.where(square > 0, jnp.sum(actual_BT * announced_BT) / square, 0)
    error = jnp.sum(jnp.square(actual_BT - factor * announced_BT))
    factor = jnp.where(error <= 1e-6 * jnp.sum(jnp.square(actual_BT)), factor, jnp.nan)
    return (dhidden_BTD * factor).astype(dhidden_BTD.dtype), (dhead_VD * factor).astype(dhead_VD.dtype), None, None


_linear_scores = jax.custom_vjp(_announced_scores, nondiff_argnums=(0,))
_linear_scores.defvjp(_linear_scores_forward, _linear_scores_backward)


class _Axes(NamedTuple):
    """The mesh axes that tokens and vocabulary are split over inside ``shard_map``; empty where they are whole.

    ``embed`` are those of ``tokens`` that the head's columns, and so its gradient's, are split over outside.
    """

    tokens: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()


def _over_mesh(local: Any, how: _How, hidden_BTD: jax.Array, head_VD: jax.Array, *arrays_BT: Any) -> Any:
    """Run ``local(axes, how, ...)`` on each device's tokens and part of the vocabulary.

    The gradient of the head is then summed over a device's chunks first and over devices once, at the end, where each
    gets the columns that it keeps.
    """
    mesh = mesh_lib.current()
    if mesh is None or mesh.size == 1:
        return local(_Axes(), how, hidden_BTD, head_VD, *arrays_BT)
    batch = mesh_lib.BATCH_AXES if hidden_BTD.shape[0] % mesh_lib.batch_shards(mesh) == 0 else ()
    time = (zigzag.AXIS,) if zigzag.ways() > 1 else ()
    vocab = ("tensor",) if head_VD.shape[0] % mesh.shape["tensor"] == 0 else ()
    by_token, by_word = P(batch or None, time or None), P(vocab or None)
    (columns,) = mesh_lib.partition(("embed",), head_VD.shape[1:], mesh)
    columns = (columns,) if isinstance(columns, str) else columns or ()
    embed = columns if set(columns) <= {*batch, *time} else ()
    gradient = P(vocab or None, embed or None)
    outputs = {
        _local_scores: by_token,
        _local_gradients: (by_token, gradient),
        _local_linear: (by_token, by_token, by_token, gradient),
    }[local]
    return jax.shard_map(
        functools.partial(local, _Axes((*batch, *time), vocab, embed), how),
        mesh=mesh,
        in_specs=(by_token, by_word, *[by_token] * len(arrays_BT)),
        out_specs=outputs,
        check_vma=False,
    )(hidden_BTD, head_VD, *arrays_BT)


def _local_scores(axes: _Axes, how: _How, hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array) -> Any:
    """Return (scores, log-sum-exp), of ``[B, T]`` each."""
    head = head_VD.astype(hidden_BTD.dtype)

    def chunk(_: None, arrays: Any) -> Any:
        hidden_MD, targets_M = arrays
        return None, _score(axes, how, _logits(how, head, hidden_MD), targets_M)

    return _over_chunks(chunk, None, head_VD.shape[0], hidden_BTD, targets_BT)[1]


def _local_gradients(
    axes: _Axes,
    how: _How,
    hidden_BTD: Any,
    head_VD: Any,
    targets_BT: Any,
    lse_BT: Any,
    entropy_BT: Any,
    dlogp_BT: Any,
    dentropy_BT: Any,
) -> Any:
    """Return the gradients of (hidden, head), with the logits computed again."""
    head = head_VD.astype(hidden_BTD.dtype)
    head_DV = transposed(head)

    def chunk(dhead_VD: jax.Array, arrays: Any) -> Any:
        hidden_MD, targets_M, *rest = arrays
        dlogits_VM = _logits_gradient(axes, how, _logits(how, head, hidden_MD), targets_M, *rest)
        return _gradients(axes, dhead_VD, head_DV, hidden_MD, dlogits_VM)

    start = jnp.zeros(head_VD.shape, jnp.float32)
    arrays = (hidden_BTD, targets_BT, lse_BT, dlogp_BT, entropy_BT, dentropy_BT)
    dhead_VD, dhidden_BTD = _over_chunks(chunk, start, head_VD.shape[0], *arrays)
    return dhidden_BTD, _sum_over_tokens(axes, dhead_VD).astype(head_VD.dtype)


def _local_linear(axes: _Axes, how: _How, hidden_BTD: Any, head_VD: Any, targets_BT: Any, cotangent_BT: Any) -> Any:
    """Return (log-probs, correct, gradient of hidden, gradient of head) in one pass over the logits."""
    head = head_VD.astype(hidden_BTD.dtype)
    head_DV = transposed(head)

    def chunk(dhead_VD: jax.Array, arrays: Any) -> Any:
        hidden_MD, targets_M, cotangent_M = arrays
        logits_VM = _logits(how, head, hidden_MD)
        (logp_M, correct_M, *_), lse_M = _score(axes, how, logits_VM, targets_M)
        dlogits_VM = _logits_gradient(axes, how, logits_VM, targets_M, lse_M, cotangent_M)
        dhead_VD, dhidden_MD = _gradients(axes, dhead_VD, head_DV, hidden_MD, dlogits_VM)
        return dhead_VD, (logp_M, correct_M, dhidden_MD)

    start = jnp.zeros(head_VD.shape, jnp.float32)
    arrays = (hidden_BTD, targets_BT, cotangent_BT)
    dhead_VD, (logp_BT, correct_BT, dhidden_BTD) = _over_chunks(chunk, start, head_VD.shape[0], *arrays)
    return logp_BT, correct_BT, dhidden_BTD, _sum_over_tokens(axes, dhead_VD).astype(head_VD.dtype)


def _logits(how: _How, head: jax.Array, hidden_MD: jax.Array) -> jax.Array:
    """Return fp32 logits ``[V, M]``, capped and over the temperature."""
    logits_VM = jax.lax.dot_general(head, hidden_MD, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    logits_VM = softcap(logits_VM, how.cap)
    return logits_VM if how.temperature == 1 else logits_VM / how.temperature


def _score(axes: _Axes, how: _How, logits_VM: jax.Array, targets_M: jax.Array) -> tuple[TokenScores, jax.Array]:
    """Return (scores, log-sum-exp) of a chunk, of ``[M]`` each."""
    top_M = logits_VM.max(axis=0)
    top_M = jax.lax.pmax(top_M, axes.vocab) if axes.vocab else top_M
    total_M = _sum_over(axes.vocab, jnp.exp(logits_VM - top_M).sum(axis=0))
    lse_M = top_M + jnp.log(total_M)
    rows_M = targets_M - _first_token(axes, logits_VM)
    here_M = (rows_M >= 0) & (rows_M < logits_VM.shape[0])
    found_M = jnp.take_along_axis(logits_VM, jnp.where(here_M, rows_M, 0)[None], axis=0)[0]
    target_M = _sum_over(axes.vocab, jnp.where(here_M, found_M, 0))
    entropy_M = None
    if how.entropy:  # log(total) - E[logit - top], which stays exact where the logits are large
        below_VM = logits_VM - fence(top_M)  # or XLA would hold it for both sums
        entropy_M = jnp.log(total_M) - _sum_over(axes.vocab, (jnp.exp(below_VM) * below_VM).sum(axis=0)) / total_M
    return TokenScores(target_M - lse_M, target_M >= top_M, entropy_M), lse_M


def _logits_gradient(
    axes: _Axes,
    how: _How,
    logits_VM: jax.Array,
    targets_M: jax.Array,
    lse_M: jax.Array,
    dlogp_M: jax.Array,
    entropy_M: jax.Array | None = None,
    dentropy_M: jax.Array | None = None,
) -> jax.Array:
    """Return the gradient ``[V, M]`` of a chunk's logits, as they are before they are capped and divided.

    By logit v, that of a log-prob is ``[v is the target] - p_v`` and that of the entropy H is ``-p_v (log p_v + H)``.
    """
    if how.temperature != 1:
        dlogp_M = dlogp_M / how.temperature
    tokens_V = _first_token(axes, logits_VM) + jnp.arange(logits_VM.shape[0])
    hit_VM = (tokens_V[:, None] == targets_M).astype(jnp.float32)
    if entropy_M is None or dentropy_M is None:
        gradient_VM = (hit_VM - jnp.exp(logits_VM - lse_M)) * dlogp_M
    else:
        logp_VM, dentropy_M = logits_VM - lse_M, dentropy_M / how.temperature
        gradient_VM = hit_VM * dlogp_M - jnp.exp(logp_VM) * (dlogp_M + (logp_VM + entropy_M) * dentropy_M)
    if how.cap is not None:  # the derivative of c tanh(x / c) is 1 - tanh(x / c)^2
        gradient_VM = gradient_VM * (1 - jnp.square(logits_VM * (how.temperature / how.cap)))
    return gradient_VM


def _gradients(
    axes: _Axes, dhead_VD: jax.Array, head_DV: jax.Array, hidden_MD: jax.Array, dlogits_VM: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the head's gradient with this chunk's added, and the chunk's gradient of hidden ``[M, D]``."""
    dlogits_VM = fence(dlogits_VM.astype(hidden_MD.dtype))
    dhead_VD = dhead_VD + jax.lax.dot(dlogits_VM, hidden_MD, preferred_element_type=jnp.float32)
    dhidden_DM = fence(jax.lax.dot(head_DV, dlogits_VM, preferred_element_type=jnp.float32))
    return dhead_VD, _sum_over(axes.vocab, dhidden_DM).T.astype(hidden_MD.dtype)


def _first_token(axes: _Axes, logits_VM: jax.Array) -> Any:
    return jax.lax.axis_index(axes.vocab) * logits_VM.shape[0] if axes.vocab else 0


def _sum_over(names: tuple[str, ...], x: jax.Array) -> jax.Array:
    return jax.lax.psum(x, names) if names else x


def _sum_over_tokens(axes: _Axes, dhead_VD: jax.Array) -> jax.Array:
    """Return the columns that a device keeps of the head's gradient: cut before they go over any further axis."""
    if axes.embed:
        dhead_VD = jax.lax.psum_scatter(dhead_VD, axes.embed, scatter_dimension=1, tiled=True)
    return _sum_over(tuple(name for name in axes.tokens if name not in axes.embed), dhead_VD)


def _over_chunks(step: Any, carry: Any, vocab: int, *arrays: Any) -> tuple[Any, Any]:
    """Scan ``step(carry, chunks of arrays)`` along time; ``[B, T, ...]`` reaches it as ``[M, ...]``, M = B * time."""
    B, T = arrays[0].shape[:2]
    count = _chunk_count(B, T, vocab)
    size = -(-T // count)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, count * size - T), *[(0, 0)] * (x.ndim - 2)))
        return x.reshape(B, count, size, *x.shape[2:]).swapaxes(0, 1).reshape(count, B * size, *x.shape[2:])

    def join(x: jax.Array) -> jax.Array:
        return x.reshape(count, B, size, *x.shape[2:]).swapaxes(0, 1).reshape(B, count * size, *x.shape[2:])[:, :T]

    carry, outputs = jax.lax.scan(step, carry, jax.tree.map(split, arrays))
    return carry, jax.tree.map(join, outputs)


def _chunk_count(B: int, T: int, vocab: int) -> int:
    """Return the fewest chunks whose logits fit the limit; a few more where those cut ``T`` evenly."""
    fewest = min(T, -(-B * T * vocab * 4 // LOGITS_LIMIT[mesh_lib.platform()]))
    return next((count for count in range(fewest, 2 * fewest) if T % count == 0), fewest)
