"""`luthier rl` with a fault put into what its servers are sent: `broken_rl.py old|"left out" PATTERN KEY=VALUE...`.

"old": tensors of a name that matches PATTERN are those of the first sync, always. "left out": they are not sent.
"adapter KEY=VALUE...": the adapter is that of the first sync. Nothing else is another run's.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from luthier import cli
from luthier.rollout.vllm import adapters, named


def keep_tensors(pattern: str) -> None:
    right, kept = named.full, {}

    def full(*given: Any, **more: Any) -> named.Tensors:
        tensors = right(*given, **more)

        def some(params: Any) -> Iterator[tuple[str, np.ndarray]]:
            for name, array in tensors(params):
                if re.search(pattern, name):
                    yield name, kept.setdefault(name, np.array(array))
                else:
                    yield name, array

        return some

    named.full = full


def leave_out(pattern: str) -> None:
    right = named.full

    def full(*given: Any, **more: Any) -> named.Tensors:
        tensors = right(*given, **more)
        return lambda params: (pair for pair in tensors(params) if not re.search(pattern, pair[0]))

    named.full = full


def keep_adapter() -> None:
    right, kept = adapters.files, {}

    def files(*given: Any, **more: Any) -> Any:
        write = right(*given, **more)
        return lambda *params: kept.setdefault("files", write(*params))

    adapters.files = files


if __name__ == "__main__":
    fault, *rest = sys.argv[1:]
    if fault == "adapter":
        keep_adapter()
    else:
        pattern, *rest = rest
        {"old": keep_tensors, "left out": leave_out}[fault](pattern)
    sys.argv = [sys.argv[0], *rest]
    cli.entry("rl")
