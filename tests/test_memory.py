"""How much memory the control group of a container leaves."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from luthier import memory

V2 = {"memory.max": "1000\n", "memory.current": "700\n"}
V1 = {"memory/memory.limit_in_bytes": "1000\n", "memory/memory.usage_in_bytes": "700\n"}
STAT = "anon 100\ninactive_file 200\nactive_file 50\n"


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({}, math.inf),
        (V2 | {"memory.max": "max\n"}, math.inf),
        (V2, 300),
        (V2 | {"memory.stat": STAT}, 500),
        (V2 | {"memory.stat": "anon 100\n"}, 300),
        (V1, 300),
        (V1 | {"memory/memory.stat": STAT + "total_inactive_file 250\n"}, 550),
    ],
)
def test_files_that_can_be_dropped_are_no_use_of_memory(tmp_path: Path, files, left):
    (tmp_path / "memory").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert memory._container_limit(tmp_path) == left
