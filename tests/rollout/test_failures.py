"""When failed rewards end a run, and what is said then."""

from __future__ import annotations

import pytest

from luthier.errors import RunError
from luthier.rollout import failures
from luthier.rollout.failures import Failure

FOUND = [
    Failure("own", "rows.jsonl, line 3", "failed: ZeroDivisionError: division by zero. (own.py, line 7)", 4),
    Failure("judge", "rows.jsonl, line 3", "failed: TimeoutError: the judge did not reply in time.", 1),
    Failure("own", "rows.jsonl, line 9", "took longer than 60 seconds.", 4),
]


def test_shares():
    assert failures.share(FOUND, "own", 16) == 0.5
    assert failures.share(FOUND, "judge", 16) == 1 / 16
    assert failures.share(FOUND, "math", 16) == 0
    assert failures.share([], "math", 0) == 0


def test_a_run_goes_on_up_to_the_limit():
    failures.check(FOUND, asked=16, limit=0.5)
    failures.check([], asked=0, limit=0.0)


def test_a_run_is_stopped_over_it_and_says_why():
    with pytest.raises(RunError) as error:
        failures.check(FOUND, asked=16, limit=0.49)
    assert str(error.value) == (
        "reward function `own` failed for 8 of 16 completions, which is more than max_reward_failures=0.49 allows. "
        "The first: rows.jsonl, line 3: reward function `own` failed: ZeroDivisionError: division by zero. "
        "(own.py, line 7) Mend the function, or raise max_reward_failures."
    )


def test_one_function_that_never_works_does_not_hide_behind_others():
    others = [Failure("judge", "line 1", "took longer than 60 seconds.", 8)]
    with pytest.raises(RunError, match="`judge` failed for 8 of 8"):
        failures.check(others, asked=8, limit=0.9)
