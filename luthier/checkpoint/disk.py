"""A disk that does not take what is written, told as one message in place of a traceback.

Left out on purpose: retries. A full disk and a folder without permission do not mend themselves.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from luthier.errors import RunError

# Libraries that are not Python raise a text in place of an OSError: tensorstore (a ValueError), tokenizers (Exception).
_CODES = (r"\[os_error_code='(\d+)'\]", r"\(os error (\d+)\)")


@contextlib.contextmanager
def writing(place: Any, what: str, then: Callable[[], str]) -> Iterator[None]:
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


def refusal(error: BaseException) -> str | None:
    """Return what the operating system said to refuse a file that is there, or None where it was not that."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, Exception) and not _missing(chain) and (reason := _reason(chain)) is not None:
            return reason
        chain = chain.__cause__ or chain.__context__
    return None


def _missing(error: Exception) -> bool:
    return isinstance(error, FileNotFoundError) or _code(error) == errno.ENOENT


def _reason(error: Exception) -> str | None:
    """Return what the operating system said, or None where it was not the operating system that refused."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    code = _code(error)
    return None if code is None else os.strerror(code)


def _code(error: Exception) -> int | None:
    codes = [match[1] for pattern in _CODES if (match := re.search(pattern, str(error)))]
    return int(codes[0]) if codes else None
