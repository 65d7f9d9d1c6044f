"""What `generate` and `chat` share of a terminal: text that a model wrote, shown without letting it command.

Left out on purpose: Markdown. The text is shown as it was written.
"""

from __future__ import annotations

from rich.console import Console

_KEPT = "\n\t"
_SYMBOLS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in _KEPT} | {127: "\u2421"}
_SYMBOLS |= dict.fromkeys(range(128, 160), "�")


def harmless(text: str) -> str:
    """Return the text with control characters made visible, so that none of them reaches the terminal as a command."""
    return text.translate(_SYMBOLS)


def messages() -> Console:
    """Return the console for whatever is not the command's result: standard error."""
    return Console(stderr=True, highlight=False, soft_wrap=True)
