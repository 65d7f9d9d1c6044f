"""Phi 3, 3.5 and 4, whose checkpoints join the projections that read the same input.

Left out on purpose: Phi 1 and 2, which have other layers, and Phi 3.5's mixture of experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.model.decoder import Decoder, Layer
from luthier.model.grouped import Grouped
from luthier.model.mlp import Mlp
from luthier.model.norm import Norm
from luthier.model.reading import Fields
from luthier.model.rope import Rope

MODEL_TYPES = ("phi3",)


def read(config: Mapping[str, Any]) -> Decoder:
    """Describe the model of a ``config.json``, with Transformers' defaults for what it leaves out.

    Raises UserError for a value that is of the wrong kind or not supported, KeyError for one that is missing.
    """
    fields = Fields(config)
    fields.choice("hidden_act", ("silu",), "silu")
    attention = Grouped(*fields.heads(), Rope.from_hf(config), window=fields.some("sliding_window"), joined=True)
    layer = Layer(attention, Mlp(fields.size("intermediate_size"), joined=True))
    layers = [layer] * fields.size("num_hidden_layers")
    return Decoder.from_fields(fields, layers, norm=Norm(fields.number("rms_norm_eps", 1e-5)))
