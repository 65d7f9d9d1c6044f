"""A LoRA adapter as the files that a vLLM server loads: PEFT's own, without a tokenizer.

Left out on purpose: sending them (``weights``).
"""

from __future__ import annotations

import json
from collections.abc import Callable

from safetensors.numpy import save

from luthier.checkpoint import peft
from luthier.checkpoint.source import Source
from luthier.errors import UserError
from luthier.model import lora
from luthier.model.lora import Adapter
from luthier.model.param import Tree

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for ``--max-lora-rank``."""


def check(spec: Tree, adapter: Adapter) -> None:
    """Raise UserError for an adapter that vLLM cannot load."""
    of_experts = any(unit.experts for unit in lora.units(spec, adapter))
    kinds = {
        "lora_dora=true: DoRA": adapter.dora,
        "an adapter of experts": of_experts,
        f"lora_rank={adapter.rank}: a rank over {RANKS[-1]}": room(adapter) is None,
    }
    for kind in (kind for kind, found in kinds.items() if found):
        raise UserError(f"{kind} is nothing that vLLM serves. Set rollout_engine=local, or adapt something else.")


def room(adapter: Adapter) -> int | None:
    """Return the least ``--max-lora-rank`` that the adapter fits in, None where it fits in none.

    PiSSA's adapters are served with what they began as, at twice the rank.
    """
    rank = adapter.rank * (2 if adapter.init == "pissa" else 1)
    return next((most for most in RANKS if most >= rank), None)


def files(adapter_spec: Tree, adapter: Adapter, source: Source) -> Callable[..., dict[str, bytes]]:
    """Return ``written(adapters, origin=None)``: {file name: content}, as ``checkpoint.peft.save`` writes them.

    ``origin`` is what PiSSA's adapters began as; the adapter has twice the rank then. All processes call it together.
    """

    def written(adapters: Tree, origin: Tree | None = None) -> dict[str, bytes]:
        config, tensors = peft.outgoing(adapters, adapter_spec, adapter, source, origin)
        values = {name: tensor.read() for name, tensor in tensors.items()}
        return {peft.CONFIG: json.dumps(config, indent=2).encode(), peft.WEIGHTS: save(values)}

    return written
