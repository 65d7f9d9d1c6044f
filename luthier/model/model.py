"""A model: a family and its configuration, with what the rest of Luthier asks of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from luthier.errors import UserError
from luthier.model import families
from luthier.model.cache import Cache, Lines, Past, write
from luthier.model.compute import Compute
from luthier.model.cross_entropy import TokenScores, token_logp
from luthier.model.dense import dense
from luthier.model.param import Tree
from luthier.model.segments import Prefixed
from luthier.types import Batch, PolicyBatch


@dataclass(frozen=True)
class Model:
    """A family module and its frozen ``Config``: everything about a model but its weights."""

    family: ModuleType
    config: Any

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], place: str) -> Model:
        """Read a ``config.json`` that was found at ``place``.

        Raises UserError where the model is of no known family, lacks a field or has a wrong one.
        """
        family = families.find(config, place)
        try:
            return cls(family, family.Config.from_hf(config))
        except KeyError as error:
            raise UserError(f"{place}: config.json lacks {error}. Take the model's original config.json.") from None
        except UserError as error:
            raise UserError(f"{place}: {error}") from None

    @cached_property
    def spec(self) -> Tree:
        """The tree of ``Param``s."""
        return self.family.spec(self.config)

    def hidden(self, params: Tree, batch: Batch, compute: Compute) -> jax.Array:
        """Return the final hidden states ``[B, T, D]``."""
        arrays = (batch.tokens_BT, batch.positions_BT, batch.segments_BT)
        return self.family.forward(params, self.config, *arrays, compute)[0]

    @cached_property
    def cache_lines(self) -> Lines:
        """What the model keeps of each token while sampling."""
        return self.family.cache_lines(self.config)

    def extend(
        self, params: Tree, tokens_BT: jax.Array, past: Past, counts_B: jax.Array, compute: Compute
    ) -> tuple[jax.Array, Cache]:
        """Read the first ``counts_B[b]`` tokens of each row after its past.

        Returns the hidden states ``[B, T, D]`` and the cache with those tokens in it.
        """
        positions_BT = past.lengths_B[:, None] + jnp.arange(tokens_BT.shape[1])
        hidden_BTD, fresh = self.family.forward(params, self.config, tokens_BT, positions_BT, None, compute, past)
        return hidden_BTD, write(past, fresh, counts_B)

    def logits(self, params: Tree, batch: Batch, compute: Compute) -> jax.Array:
        """Return whole fp32 logits ``[B, T, V]``: for tests and single positions, never for training."""
        return self.project(params, self.hidden(params, batch, compute))

    def project(self, params: Tree, hidden_BTD: jax.Array) -> jax.Array:
        """Return the fp32 logits ``[B, T, V]`` of hidden states."""
        return dense("BTD,VD->BTV", hidden_BTD, self.family.head(params), out_dtype=jnp.float32)

    def score(self, params: Tree, batch: Batch, compute: Compute, cotangent_BT: jax.Array | None = None) -> TokenScores:
        """Return log-prob and correctness of the token *at* each position given those before it; 0 at the first.

        ``cotangent_BT`` is the gradient of the loss with respect to these log-probs where it is known beforehand.
        """
        hidden_BTD = self.hidden(params, batch, compute)
        targets_BT = jnp.roll(batch.tokens_BT, -1, axis=1)
        if cotangent_BT is not None:
            cotangent_BT = jnp.roll(cotangent_BT.at[:, 0].set(0.0), -1, axis=1)
        with jax.named_scope("cross_entropy"):
            ahead = token_logp(hidden_BTD, self.family.head(params), targets_BT, cotangent_BT)
        return jax.tree.map(lambda score_BT: jnp.pad(score_BT[:, :-1], ((0, 0), (1, 0))), ahead)

    def score_tokens(
        self, params: Tree, batch: PolicyBatch, compute: Compute, *, temperature: float = 1.0, entropy: bool = False
    ) -> TokenScores:
        """Return the scores ``[B * S, C]`` of the trained tokens of each completion, 0 where there is none.

        Only their states reach the head. Log-probs, and entropies where asked for, are at ``temperature``. Raises
        ValueError where prompts are shared and ``compute.attention`` means a kernel that cannot (``shares_prompts``).
        """
        segments = batch.segments_BT if batch.prefixes_BT is None else Prefixed(batch.segments_BT, batch.prefixes_BT)
        arrays = (batch.tokens_BT, batch.positions_BT, segments)
        hidden_BTD = self.family.forward(params, self.config, *arrays, compute)[0]
        with jax.named_scope("cross_entropy"):
            hidden_BMD = jnp.take_along_axis(hidden_BTD, batch.sources_BM[..., None], axis=1)
            head = self.family.head(params)
            scores = token_logp(hidden_BMD, head, batch.targets_BM, temperature=temperature, entropy=entropy)
            mask_BT = batch.rollouts.mask_BT

            def laid_out(score_BM: jax.Array) -> jax.Array:
                found = jnp.take_along_axis(score_BM, batch.places_BSC.reshape(len(score_BM), -1), axis=1)
                return jnp.where(mask_BT, found.reshape(mask_BT.shape), jnp.zeros((), found.dtype))

            return jax.tree.map(laid_out, scores)
