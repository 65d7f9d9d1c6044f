from __future__ import annotations

import pytest
from costs import COLLECTED, costs


def test_each_line_names_a_test(request: pytest.FixtureRequest) -> None:
    collected = request.config.stash[COLLECTED]
    files = {name.partition("::")[0] for name in collected}
    listed = costs()
    assert {"slow", "exhaustive"} == set(listed.values())
    assert not [name for name in listed if name.partition("::")[0] in files and name not in collected]
