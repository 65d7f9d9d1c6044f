"""A disk that does not take what is written, told as one message in place of a traceback.

Left out on purpose: retries. A full disk and a folder without permission do not mend themselves.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from luthier.errors import RunError

# Libraries that are not Python raise a text in place of an OSError: tensorstore (a ValueError), tokenizers (Exception).
_CODES = (r"\[os_error_code='(\d+)'\]", r"\(os error (\d+)\)")


@contextlib.contextmanager
def writing(place: Path, what: str, then: Callable[[], str]) -> Iterator[None]:
    """Turn the disk's refusals while ``what`` is written to ``place`` into RunErrors.

    ``then`` says what still stands and what to do; it is called only when something failed.
    """
    try:
        yield
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise RunError(f"{place}: {what} could not be written ({reason}). {then()}") from error


def _reason(error: Exception) -> str | None:
    """Return what the operating system said, or None where it was not the operating system that refused."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    codes = [match[1] for pattern in _CODES if (match := re.search(pattern, str(error)))]
    return os.strerror(int(codes[0])) if codes else None
