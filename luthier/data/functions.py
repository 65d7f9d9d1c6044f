"""A user's own function, found by the path in a key: ``package.module.function`` or ``path/to/file.py:function``.

Left out on purpose: calling it. Whoever does says what it was called with when it fails, and ``line_of`` where.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from luthier.errors import UserError, did_you_mean

REMEDY = "Give `package.module.function`, importable from this folder, or `path/to/file.py:function`."


def load(path: str, key: str) -> Callable[..., Any]:
    """Return the function at ``path``, which ``key`` gave. Raises UserError where there is none."""
    file, colon, name = path.rpartition(":")
    if not colon:
        module, dot, name = path.rpartition(".")
        if not dot:
            raise UserError(f"{key}={path}: no module named. {REMEDY}")
        loaded = _import(module, path, key)
    else:
        loaded = _execute(Path(file).expanduser(), path, key)
    function = getattr(loaded, name, None)
    if function is None:
        known = [name for name, value in vars(loaded).items() if callable(value) and not name.startswith("_")]
        hint = did_you_mean(name, known) or f" It has: {', '.join(known) or 'none'}."
        raise UserError(f"{key}={path}: no function `{name}` there.{hint}")
    if not callable(function):
        raise UserError(f"{key}={path}: `{name}` is a {type(function).__name__}, not a function.")
    return function


def line_of(error: BaseException) -> str:
    """Return where in the user's code the error arose, as `` (file, line N)``."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f" ({trace.tb_frame.f_code.co_filename}, line {trace.tb_lineno})" if trace is not None else ""


def _import(module: str, path: str, key: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"{key}={path}: {error}. {REMEDY}") from None
    except Exception as error:
        raise UserError(f"{key}={path}: importing it failed: {error}.{line_of(error)}") from error


def _execute(file: Path, path: str, key: str) -> Any:
    if not file.is_file():
        raise UserError(f"{key}={path}: no file {file}. {REMEDY}")
    spec = importlib.util.spec_from_file_location(f"luthier_user_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"{key}={path}: {file} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{key}={path}: running it failed: {error}.{line_of(error)}") from error
    return module
