"""Layers cut into runs: every layer once and in order, and no more programs than kinds of periods."""

import pytest

from luthier.model.periods import LONGEST, runs


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("", []),
        ("L", ["L x 1"]),
        ("LLLL", ["L x 4"]),
        ("LG" * 9, ["LG x 9"]),
        ("LLLLLG" * 5 + "LLLL", ["LLLLLG x 5", "L x 4"]),  # Gemma 3 4B
        ("LLLLLGLL", ["LLLLLG x 1", "L x 2"]),  # so that 8 layers are run by the same program as 80
        ("LLLLLG" * 13 + "LL", ["LLLLLG x 13", "L x 2"]),
        ("D" * 3 + "M" * 58, ["D x 3", "M x 58"]),  # DeepSeek V3
        ("F" * 28 + "S" * 4, ["F x 28", "S x 4"]),  # Qwen 2
        ("F" + "M" * 20 + "F", ["F x 1", "M x 20", "F x 1"]),  # the ends alone are alike, and far apart
    ],
)
def test_runs_are_the_shortest_periods(layers: str, expected: list[str]) -> None:
    found = runs(layers)
    assert [f"{''.join(run.period)} x {run.repeats}" for run in found] == expected


@pytest.mark.parametrize("layers", ["LLGLLGL", "DDMMM", "ABCABD", "ABAB", "LLLLLG" * 3, "AABBAAB"])
def test_every_layer_has_one_place(layers: str) -> None:
    placed = {
        index: kind for run in runs(layers) for place, kind in enumerate(run.period) for index in run.indices(place)
    }
    assert [placed[i] for i in range(len(layers))] == list(layers)
    assert max(len(run.period) for run in runs(layers)) <= LONGEST
