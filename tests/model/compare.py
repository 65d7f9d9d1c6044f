"""How tests of the model compare arrays."""

from __future__ import annotations

import numpy as np

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def assert_close(ours, theirs, tolerance: float = TOLERANCE["float32"]) -> None:
    """Compare by the size of the whole array, which is what rounding inside a sum goes by."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)
