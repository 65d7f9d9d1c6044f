"""What a model costs, from its description alone: FLOPs and activations of a token.

Left out on purpose: what the compiler makes of it, which ``memory_analysis`` and a profile say.
"""

from __future__ import annotations

import math

import jax.numpy as jnp

from luthier.model.compute import Compute
from luthier.model.decoder import Decoder
from luthier.model.param import leaves


def multiplied(decoder: Decoder) -> float:
    """Return how many weights a token is multiplied with: of experts those it is sent to, of a look-up none."""
    looked_up = 0 if decoder.tie_word_embeddings else decoder.vocab_size * decoder.hidden_size
    total = float(-looked_up)
    for path, param in leaves(decoder.spec).items():
        share = 1.0
        if "expert" in param.axes:
            feed = decoder.layers[int(path.split("/")[1])].mlp
            share = feed.top_k / param.shape[param.axes.index("expert")]
        total += share * math.prod(param.shape)
    return total


def flops_per_token(decoder: Decoder, length: int, *, frozen: bool = False) -> float:
    """Return the FLOPs of training on one token of rows of ``length`` tokens, recomputation not counted.

    6 for each weight that multiplies (4 where weights are ``frozen``: they have no gradient), and 6 for each number
    of a query and a value and each position they meet (PaLM, arXiv 2204.02311, appendix B), which are half of the
    row's, since attention is causal, or fewer in a window.
    """
    attention = 0.0
    for layer in decoder.layers:
        reach = min(length, layer.attention.window or length)
        attention += 6.0 * layer.attention.scored * reach * (1 - reach / (2 * length))
    return (4.0 if frozen else 6.0) * multiplied(decoder) + attention


def saved_bytes(decoder: Decoder, compute: Compute) -> int:
    """Return the bytes of a token that the backward pass finds saved, by policy of ``layers.remat``."""
    stream, attended, own = (
        jnp.dtype(each).itemsize for each in (compute.stream, compute.attention_dtype, compute.dtype)
    )
    inputs = stream * len(decoder.layers) * decoder.hidden_size
    made = sum(attended * layer.attention.widths + own * layer.mlp.widths for layer in decoder.layers)
    return {"full": inputs, "dots": 2 * inputs + made, "none": 4 * inputs + 2 * made}[compute.remat]


def widest(decoder: Decoder) -> int:
    """Return how many numbers of a token the widest layer has in flight, those of the residual stream among them."""
    made = max(layer.attention.widths + layer.mlp.widths for layer in decoder.layers)
    return decoder.hidden_size + made // 2


def largest_layer(decoder: Decoder) -> int:
    """Return the weights of the largest layer."""
    sizes: dict[str, int] = {}
    for path, param in leaves(decoder.spec["layers"]).items():
        name = path.split("/")[0]
        sizes[name] = sizes.get(name, 0) + math.prod(param.shape[1:])
    return max(sizes.values())
