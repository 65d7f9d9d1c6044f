"""A model: the decoder that a family describes, with what the rest of Luthier asks of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from luthier.errors import UserError
from luthier.model import attention, decoder, families
from luthier.model.cache import ROUTES, Cache, Fresh, Line, Lines, Past, write
from luthier.model.compute import Compute
from luthier.model.cross_entropy import TokenScores, token_logp
from luthier.model.decoder import Decoder, Output
from luthier.model.dense import dense
from luthier.model.layers import softcap
from luthier.model.param import Tree
from luthier.model.segments import Prefixed, Segments
from luthier.types import Batch, PolicyBatch


@dataclass(frozen=True)
class Model:
    """Everything about a model but its weights."""

    config: Decoder

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], place: str) -> Model:
        """Read a ``config.json`` that was found at ``place``.

        Raises UserError where the model is of no known family, lacks a field or has a wrong one.
        """
        family = families.find(config, place)
        try:
            return cls(family.read(config))
        except KeyError as error:
            raise UserError(f"{place}: config.json lacks {error}. Take the model's original config.json.") from None
        except UserError as error:
            raise UserError(f"{place}: {error}") from None

    @property
    def spec(self) -> Tree:
        """The tree of ``Param``s."""
        return self.config.spec

    def hidden(self, params: Tree, batch: Batch, compute: Compute) -> jax.Array:
        """Return the final hidden states ``[B, T, D]``."""
        return self._pass(params, batch, batch.segments_BT, compute).hidden_BTD

    def _pass(
        self,
        params: Tree,
        batch: Batch | PolicyBatch,
        segments: Segments,
        compute: Compute,
        routes_LBTk: jax.Array | None = None,
    ) -> Output:
        tokens_BT, positions_BT = batch.tokens_BT, batch.positions_BT
        return decoder.forward(params, self.config, tokens_BT, positions_BT, segments, compute, routes_LBTk=routes_LBTk)

    def check_kernel(self, compute: Compute) -> None:
        """Raise UserError where the attention kernel asked for cannot run this model on the platform in use."""
        for layer in self.config.layers:
            attention.choose(compute.attention, compute.attention_dtype, layer.attention.needs)

    def shares_prompts(self, compute: Compute) -> bool:
        """Say whether ``score_tokens`` takes rows in which completions share their prompt."""
        needs = {layer.attention.needs for layer in self.config.layers}
        return all(attention.shares_prompts(compute.attention, compute.attention_dtype, each) for each in needs)

    @property
    def cache_lines(self) -> Lines:
        """What the model keeps of each token while sampling."""
        return self.config.cache_lines

    @property
    def routes(self) -> tuple[int, int] | None:
        """How many layers send tokens to experts, and to how many each; None where none does."""
        sent_L = [layer.mlp.top_k for layer in self.config.layers if layer.mlp.top_k]
        return (len(sent_L), sent_L[0]) if sent_L else None

    @property
    def routes_line(self) -> Lines:
        """The line that keeps where tokens are sent; none where no layer has experts."""
        if self.routes is None:
            return {}
        layers, top_k = self.routes
        return {ROUTES: Line(layers, 1, top_k, values=0, dtype=jnp.int16)}

    def extend(
        self, params: Tree, tokens_BT: jax.Array, past: Past, counts_B: jax.Array, compute: Compute
    ) -> tuple[jax.Array, Cache]:
        """Read the first ``counts_B[b]`` tokens of each row after its past.

        Returns the hidden states ``[B, T, D]`` and the cache with those tokens in it, and with where they were sent, if
        it has ``routes_line``.
        """
        # What pads a row is at its last token's place, so that no row looks longer than it is.
        steps_BT = jnp.minimum(jnp.arange(tokens_BT.shape[1]), jnp.maximum(counts_B[:, None] - 1, 0))
        positions_BT = past.lengths_B[:, None] + steps_BT
        out = decoder.forward(params, self.config, tokens_BT, positions_BT, None, compute, past)
        routes = {ROUTES: Fresh(out.routed.chosen_BTk[..., None, :], None)} if ROUTES in past.cache else {}
        return out.hidden_BTD, write(past, out.fresh | routes, counts_B)

    def logits(self, params: Tree, batch: Batch, compute: Compute) -> jax.Array:
        """Return whole fp32 logits ``[B, T, V]``: for tests and single positions, never for training."""
        return self.project(params, self.hidden(params, batch, compute))

    def project(self, params: Tree, hidden_BTD: jax.Array) -> jax.Array:
        """Return the fp32 logits ``[B, T, V]`` of hidden states."""
        logits_BTV = dense("BTD,VD->BTV", hidden_BTD, decoder.head(params), out_dtype=jnp.float32)
        return softcap(logits_BTV, self.config.softcap)

    def score(self, params: Tree, batch: Batch, compute: Compute, cotangent_BT: jax.Array | None = None) -> TokenScores:
        """Return log-prob and correctness of the token *at* each position given those before it; 0 at the first.

        ``cotangent_BT`` is the gradient of the loss with respect to these log-probs where it is known beforehand.
        """
        hidden_BTD, _, routed = self._pass(params, batch, batch.segments_BT, compute)
        targets_BT = jnp.roll(batch.tokens_BT, -1, axis=1)
        if cotangent_BT is not None:
            cotangent_BT = jnp.roll(cotangent_BT.at[:, 0].set(0.0), -1, axis=1)
        with jax.named_scope("cross_entropy"):
            ahead = token_logp(hidden_BTD, decoder.head(params), targets_BT, cotangent_BT, cap=self.config.softcap)
        scores = jax.tree.map(lambda score_BT: jnp.pad(score_BT[:, :-1], ((0, 0), (1, 0))), ahead)
        return scores._replace(routed=routed)

    def score_tokens(
        self, params: Tree, batch: PolicyBatch, compute: Compute, *, temperature: float = 1.0, entropy: bool = False
    ) -> TokenScores:
        """Return the scores ``[B * S, C]`` of the trained tokens of each completion, 0 where there is none.

        Only their states reach the head. Log-probs, and entropies where asked for, are at ``temperature``. Raises
        ValueError where prompts are shared and ``compute.attention`` means a kernel that cannot (``shares_prompts``).
        """
        segments = batch.segments_BT
        if batch.prefixes_BT is not None:
            segments = Prefixed(segments, batch.prefixes_BT, batch.positions_BT)
        routes_LBTk = None if batch.routes_BTLk is None else jnp.moveaxis(batch.routes_BTLk, 2, 0)
        hidden_BTD, _, routed = self._pass(params, batch, segments, compute, routes_LBTk)
        with jax.named_scope("cross_entropy"):
            hidden_BMD = jnp.take_along_axis(hidden_BTD, batch.sources_BM[..., None], axis=1)
            head = decoder.head(params)
            how = {"cap": self.config.softcap, "temperature": temperature, "entropy": entropy}
            scores = token_logp(hidden_BMD, head, batch.targets_BM, **how)
            mask_BT = batch.rollouts.mask_BT

            def laid_out(score_BM: jax.Array) -> jax.Array:
                found = jnp.take_along_axis(score_BM, batch.places_BSC.reshape(len(score_BM), -1), axis=1)
                return jnp.where(mask_BT, found.reshape(mask_BT.shape), jnp.zeros((), found.dtype))

            return jax.tree.map(laid_out, scores)._replace(routed=routed)
