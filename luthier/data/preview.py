"""One conversation as the trainer sees it: decoded tokens, the trained ones marked, for the header of a run.

Left out on purpose: printing; the caller has the console.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.types import Example

if TYPE_CHECKING:
    from rich.text import Text

OPENED, CLOSED = "⟦", "⟧"


def preview(tokenizer: Any, example: Example, limit: int = 600) -> Text:
    """Return the decoded conversation, trained stretches in bold green between ``⟦`` and ``⟧``, the rest dim.

    The brackets stay readable without colours. Stretches over ``limit`` characters are shortened in the middle.
    """
    from rich.text import Text

    edges = np.flatnonzero(np.diff(example.mask_T)) + 1
    text = Text()
    for start, stop in zip([0, *edges], [*edges, len(example.ids_T)], strict=True):
        ids = example.ids_T[start:stop].tolist()
        stretch = _shortened(tokenizer.decode(ids, skip_special_tokens=False), limit)
        if ids and example.mask_T[start]:
            text.append(f"{OPENED}{stretch}{CLOSED}", style="bold green")
        else:
            text.append(stretch, style="dim")
    return text


def _shortened(stretch: str, limit: int) -> str:
    if len(stretch) <= limit:
        return stretch
    half = limit // 2
    return f"{stretch[:half]} [... {len(stretch) - 2 * half} characters ...] {stretch[-half:]}"
