"""Rewards that a function was asked for and did not give, and when there are too many of them to go on.

None, which a function gives where it has no opinion, is no failure.

Left out on purpose: calling the functions (``reward``), and their processes and limits of time (``workers``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from luthier.errors import RunError


@dataclass(frozen=True)
class Failure:
    """What went wrong with a function at the completions of a row, and how many rewards that lost.

    ``place`` names the row. Where several completions failed in one call, ``reason`` is the first one's.
    """

    function: str
    place: str
    reason: str
    lost: int

    def __str__(self) -> str:
        return f"{self.place}: reward function `{self.function}` {self.reason}"


def share(failures: Sequence[Failure], function: str, asked: int) -> float:
    """Return the share of ``asked`` rewards that ``function`` lost."""
    return sum(failure.lost for failure in failures if failure.function == function) / max(asked, 1)


def check(failures: Sequence[Failure], asked: int, limit: float, key: str = "max_reward_failures") -> None:
    """Raise RunError where a function lost more than ``limit`` of the rewards that it was asked for.

    ``failures`` are those of a step, or of as many steps as should count together; ``asked`` is the number of their
    completions, each of which every function was to reward. Each function is held against the limit by itself: one
    that never works is not to hide behind others that do.
    """
    for function in dict.fromkeys(failure.function for failure in failures):
        if share(failures, function, asked) > limit:
            own = [failure for failure in failures if failure.function == function]
            lost = sum(failure.lost for failure in own)
            raise RunError(
                f"reward function `{function}` failed for {lost} of {asked} completions, which is more than {key}="
                f"{limit:g} allows. The first: {own[0]} Mend the function, or raise {key}."
            )
