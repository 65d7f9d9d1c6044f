"""A server's answer as what engines give.

Left out on purpose: whether it is one (``wire``, ``asking``).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from luthier.rollout.engine import Alternatives, Completion, Piece
from luthier.rollout.vllm.wire import Answer

NOTHING = Answer(
    tokens_T=np.zeros(0, np.int32),
    logp_T=np.zeros(0, np.float32),
    softmax_logp_T=np.zeros(0, np.float32),
    versions_T=np.zeros(0, np.int32),
    finish="cancelled",
)
"""What there is of a completion that was cancelled."""


def completion(request: int, sample: int, answer: Answer) -> Completion:
    """Return an answer as the completion of a request's sample."""
    return Completion(request, sample, **vars(answer))


def pieces(request: int, sample: int, answer: Answer) -> Iterator[Piece]:
    """Yield the tokens of an answer, those of each version of the weights for themselves."""
    versions_T = answer.versions_T
    starts = [0, *(np.flatnonzero(np.diff(versions_T)) + 1).tolist()]
    for start, end in zip(starts, [*starts[1:], len(versions_T)], strict=True):
        part = slice(start, end)
        columns = [column_T[part] for column_T in (answer.tokens_T, answer.logp_T, answer.softmax_logp_T)]
        likely = answer.alternatives and Alternatives(*(column_TA[part] for column_TA in answer.alternatives))
        yield Piece(request, sample, *columns, version=int(versions_T[start]), alternatives=likely)
