"""The FLOPs of a token, counted from the model's description: what is useful, and what is computed a second time.

As in PaLM (arXiv 2204.02311, appendix B): recomputation is work, and no use. Left out on purpose: an adapter's own
products, which are small beside the weights'.
"""

from __future__ import annotations

from typing import Any

from luthier.model import cost
from luthier.model.decoder import Decoder
from luthier.train.job import Job


def forward(decoder: Decoder, length: float, *, head: bool = True) -> float:
    """Return the FLOPs of reading one token of a row of ``length`` tokens; without ``head``, of its layers alone."""
    whole = cost.flops_per_token(decoder, int(length)) / 3  # training takes three times as much
    return whole if head else whole - 2.0 * decoder.vocab_size * decoder.hidden_size


def training(job: Job[Any], length: int, tokens: float = 1.0) -> tuple[float, float]:
    """Return the FLOPs of training on ``tokens``, with and without what the backward pass computes again."""
    decoder = job.model.config
    useful = cost.flops_per_token(decoder, length, frozen=job.tuning.adapter is not None)
    again = forward(decoder, length, head=False) if job.compute.remat == "full" else 0.0
    return tokens * (useful + again), tokens * useful
