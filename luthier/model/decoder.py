"""A decoder as a family describes it, and all that follows from the description: weights, cache and forward pass.

A description is frozen and says of each layer what it is made of; it has no weights and no names but those of the
checkpoint's tensors. Layers that repeat are stored stacked and run by one ``lax.scan`` over their period.

Left out on purpose: encoders, towers of other media, and layers that share weights or keys with others.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp

from luthier import mesh
from luthier.model import embedding, zigzag
from luthier.model.attention import Needs
from luthier.model.cache import Fresh, Line, Past
from luthier.model.compute import Compute
from luthier.model.context import Here
from luthier.model.layers import Rotation, remat, rope_tables
from luthier.model.norm import Norm
from luthier.model.param import Param, Tree, declare, stacked
from luthier.model.periods import Run, runs
from luthier.model.reading import Fields
from luthier.model.rope import Rope
from luthier.model.segments import Segments


class Attention(Protocol):
    """What moves between tokens: ``grouped.Grouped`` or ``latent.Latent``."""

    @property
    def rope(self) -> Rope | None:
        """How positions turn queries and keys, None where they do not."""
        ...

    @property
    def rope_dim(self) -> int:
        """How many numbers the heads have that ``rope`` is for."""
        ...

    @property
    def window(self) -> int | None:
        """How many of the last tokens are seen, the token itself included; None: all."""
        ...

    @property
    def needs(self) -> Needs:
        """What is asked of the kernel."""
        ...

    @property
    def widths(self) -> int:
        """How many numbers the products with weights, and attention, make of a token."""
        ...

    @property
    def scored(self) -> int:
        """How many numbers of a token's queries and outputs each key and value meet."""
        ...

    def spec(self, hidden_size: int, block: str) -> dict[str, Param]:
        """Declare the weights of a layer whose tensors' names begin with ``block``."""
        ...

    def line(self, layers: int) -> Line:
        """Declare what ``layers`` such layers keep of a token while sampling."""
        ...

    def apply(self, p: Tree, x_BTD: jax.Array, here: Here) -> tuple[jax.Array, Fresh]:
        """Return ``[B, T, D]``, and what is to be kept of these tokens."""
        ...


class Feed(Protocol):
    """What works on each token alone: ``mlp.Mlp`` or ``moe.Moe``."""

    @property
    def top_k(self) -> int:
        """To how many experts a token is sent, 0 where there is no choice."""
        ...

    @property
    def widths(self) -> int:
        """How many numbers the products with weights make of a token, the last one's left out."""
        ...

    def spec(self, hidden_size: int, block: str) -> dict[str, Param]:
        """Declare the weights of a layer whose tensors' names begin with ``block``."""
        ...

    def apply(self, p: Tree, x_BTD: jax.Array, here: Here) -> tuple[jax.Array, Any]:
        """Return ``[B, T, D]``, and where tokens were sent, None where there is no choice."""
        ...


@dataclass(frozen=True)
class Layer:
    """Attention and a feed-forward block, each added to what came in, and the norms around them.

    Each norm is named by its tensor, and None where there is none: ``before`` a block on what goes in, ``after`` it on
    what comes out. The defaults are Llama's.
    """

    attention: Attention
    mlp: Feed
    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None

    @property
    def norms(self) -> dict[str, str]:
        """{place of a norm: its tensor's name in the layer}."""
        places = ("before_attention", "after_attention", "before_mlp", "after_mlp")
        return {place: name for place in places if (name := getattr(self, place)) is not None}


@dataclass(frozen=True)
class Decoder:
    """A whole model.

    ``embed_scale`` multiplies embeddings, ``softcap`` bounds logits. Tensors' names begin with ``prefix``, but for the
    ``head``'s. Tensors that match one of the regular expressions ``ignored`` may be in a checkpoint and are no part of
    this model.
    """

    vocab_size: int
    hidden_size: int
    layers: tuple[Layer, ...]
    norm: Norm
    tie_word_embeddings: bool = False
    embed_scale: float = 1.0
    softcap: float | None = None
    prefix: str = "model."
    head: str = "lm_head"
    ignored: tuple[str, ...] = ()

    @classmethod
    def from_fields(cls, fields: Fields, layers: Sequence[Layer], **more: Any) -> Self:
        """Describe a model of these layers, whose other sizes are in ``config.json`` under their usual names.

        Raises as ``Fields`` does.
        """
        usual = {
            "norm": Norm(fields.number("rms_norm_eps", 1e-6)),
            "tie_word_embeddings": fields.flag("tie_word_embeddings"),
        }
        return cls(fields.size("vocab_size"), fields.size("hidden_size"), tuple(layers), **usual | more)

    @property
    def num_hidden_layers(self) -> int:
        """The number of layers."""
        return len(self.layers)

    @cached_property
    def runs(self) -> list[Run[Layer]]:
        """The layers as runs of a repeating period."""
        return runs(self.layers)

    @cached_property
    def spec(self) -> Tree:
        """The tree of ``Param``s.

        ``layers`` has a tree for each place of a run's period, by the run's ``names``.
        """
        weight = declare({"vocab": self.vocab_size, "embed": self.hidden_size})
        layers = {
            name: stacked(self._layer_spec(layer), "layer", run.indices(place))
            for run in self.runs
            for place, (name, layer) in enumerate(zip(run.names, run.period, strict=True))
        }
        model = {
            "embed": weight(f"{self.prefix}embed_tokens.weight", "v d -> v d", "vocab", "embed"),
            "layers": layers,
            "norm": self.norm.param(f"{self.prefix}norm.weight", self.hidden_size),
        }
        if not self.tie_word_embeddings:
            model["head"] = weight(f"{self.head}.weight", "v d -> v d", "vocab", "embed")
        return model

    @cached_property
    def cache_lines(self) -> dict[str, Line]:
        """What is kept of each token while sampling, by the names of ``spec``'s layers."""
        return {
            name: layer.attention.line(run.repeats)
            for run in self.runs
            for name, layer in zip(run.names, run.period, strict=True)
        }

    def _layer_spec(self, layer: Layer) -> dict[str, Any]:
        block = f"{self.prefix}layers.{{layer}}."
        norms = {
            place: self.norm.param(f"{block}{name}.weight", self.hidden_size) for place, name in layer.norms.items()
        }
        blocks = {"attention": layer.attention, "mlp": layer.mlp}
        return norms | {name: part.spec(self.hidden_size, block) for name, part in blocks.items()}


class Output(NamedTuple):
    """What a pass gives: final hidden states, what is to be cached by the cache's lines, and where tokens were sent.

    ``routed`` has a leading axis over the layers with experts, in their order, and is None where there are none.
    """

    hidden_BTD: jax.Array
    fresh: dict[str, Fresh]
    routed: Any


def head(params: Tree) -> jax.Array:
    """Return the output embedding ``[V, D]``: the input's own where they are tied."""
    return params.get("head", params["embed"])


def forward(
    params: Tree,
    decoder: Decoder,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segments: Segments,
    compute: Compute,
    past: Past | None = None,
    routes_LBTk: jax.Array | None = None,
) -> Output:
    """Return the final hidden states ``[B, T, D]`` in ``compute.dtype``; log-probs are made from them by chunks.

    With a ``past``, the tokens go on from what is cached, and what is to be cached of them is returned. With
    ``routes_LBTk``, tokens are sent to these experts, by layers with experts in their order.
    """
    length, context = tokens_BT.shape[1], None
    if past is None and zigzag.ways() > 1:
        context = compute.context
        segments = zigzag.spread_segments(segments, tokens_BT)
        tokens_BT, positions_BT = zigzag.spread(tokens_BT), zigzag.spread(positions_BT, repeat_last=True)
        routes_LBTk = None if routes_LBTk is None else zigzag.spread(routes_LBTk, axis=2)
    with jax.named_scope("embed"):
        x_BTD = embedding.rows(params["embed"], tokens_BT, compute.dtype, _time(context))
        if decoder.embed_scale != 1.0:
            x_BTD = x_BTD * jnp.asarray(decoder.embed_scale, compute.dtype)
        x_BTD = mesh.constrain(x_BTD.astype(compute.stream), "batch", _time(context), "norm")
    here = Here(positions_BT, segments, compute, _rotations(decoder, positions_BT), context=context)
    fresh: dict[str, Fresh] = {}
    routed: list[Any] = []
    for run in decoder.runs:
        routes, routes_LBTk = _taken(run, routes_LBTk)
        x_BTD, (of_run, sent) = _run(params["layers"], decoder, run, x_BTD, here, past, routes)
        fresh |= of_run
        routed += sent
    whole = jax.tree.map(lambda *parts: jnp.concatenate(parts), *routed) if routed else None
    x_BTD = decoder.norm.apply(params["norm"], x_BTD).astype(compute.dtype)
    if context is not None:
        x_BTD = zigzag.restored(x_BTD, length)
        whole = whole and replace(whole, chosen_BTk=zigzag.natural(whole.chosen_BTk, length, axis=2))
    return Output(x_BTD, fresh, whole)


def _time(context: str | None) -> str:
    """Return the logical axis of a row's tokens, which are split over devices where attention knows of it."""
    return "slots" if context is None else "time"


def _rotations(decoder: Decoder, positions_BT: jax.Array) -> dict[Rope, Rotation]:
    sizes = {layer.attention.rope: layer.attention.rope_dim for layer in decoder.layers}
    return {rope: rope_tables(positions_BT, rope, size) for rope, size in sizes.items() if rope is not None}


def _taken(run: Run[Layer], routes_LBTk: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
    """Return the run's part of the routes, ``[repeats, places, B, T, k]``, and the rest of them."""
    places = sum(layer.mlp.top_k > 0 for layer in run.period)
    if routes_LBTk is None or not places:
        return None, routes_LBTk
    count = places * run.repeats
    return routes_LBTk[:count].reshape(run.repeats, places, *routes_LBTk.shape[1:]), routes_LBTk[count:]


def _run(
    layers: Tree, decoder: Decoder, run: Run[Layer], x_BTD: jax.Array, here: Here, past: Past | None, routes: Any
) -> tuple[jax.Array, tuple[dict[str, Fresh], list[Any]]]:
    """Return what comes out of a run of layers, what is to be cached of it, and where its tokens were sent."""

    def period(x_BTD: jax.Array, scanned: Any) -> tuple[jax.Array, Any]:
        weights, index, routes = scanned
        fresh: dict[str, Fresh] = {}
        sent: list[Any] = []
        for name, layer in zip(run.names, run.period, strict=True):
            own = replace(
                here,
                past=None if past is None else past.layer(name, index),
                routes_BTk=None if routes is None or not layer.mlp.top_k else routes[len(sent)],
            )
            step = remat(here.compute.remat)(functools.partial(_layer, decoder.norm, layer, own))
            x_BTD, kept, routed = step(x_BTD, weights[name])
            if past is not None:
                fresh[name] = kept
            if layer.mlp.top_k:
                sent.append(routed)
        return x_BTD, (fresh, sent)

    scanned = ({name: layers[name] for name in run.names}, jnp.arange(run.repeats), routes)
    x_BTD, (fresh, sent) = jax.lax.scan(period, x_BTD, scanned)
    if len(sent) > 1:  # of [repeats, ...] for each place of the period, [repeats * places, ...]: the layers' order
        sent = [jax.tree.map(lambda *places: jnp.stack(places, 1).reshape(-1, *places[0].shape[1:]), *sent)]
    return x_BTD, (fresh, sent)


def _layer(norm: Norm, layer: Layer, here: Here, x_BTD: jax.Array, p: Tree) -> tuple[jax.Array, Fresh, Any]:
    compute = here.compute

    def normed(place: str, x_BTD: jax.Array, dtype: Any) -> jax.Array:
        return (norm.apply(p[place], x_BTD) if place in p else x_BTD).astype(dtype)

    with jax.named_scope("attention"):
        out_BTD, fresh = layer.attention.apply(
            p["attention"], normed("before_attention", x_BTD, compute.attention_dtype), here
        )
        x_BTD = x_BTD + normed("after_attention", out_BTD, compute.stream)
    with jax.named_scope("mlp"):
        out_BTD, routed = layer.mlp.apply(p["mlp"], normed("before_mlp", x_BTD, compute.dtype), here)
        x_BTD = x_BTD + normed("after_mlp", out_BTD, compute.stream)
    return mesh.constrain(x_BTD, "batch", _time(here.context), "norm"), fresh, routed
