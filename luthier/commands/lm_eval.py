"""`luthier lm-eval --model luthier --model_args path=... --tasks ...`: the lm-eval harness with its own command line.

The harness finds models by a table of its own, which nothing outside adds to before it starts, so ``lm_eval --model
luthier`` alone cannot know the name. This command registers it through the harness's public hook and hands over. In a
program of your own, importing ``luthier.commands.lm_eval_adapter`` does the same.
"""

from __future__ import annotations

if __name__ == "__main__":  # the command line is parsed before anything heavy is imported
    from luthier.cli import entry

    entry("lm-eval")

import importlib
import importlib.util
import sys
from collections.abc import Sequence

from luthier.errors import UserError


def run(arguments: Sequence[str]) -> None:
    """Run the harness with ``arguments``. Raises UserError where it is not installed, or the model cannot be opened."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("the lm-eval harness is not installed: pip install 'luthier[lm-eval]'.")
    importlib.import_module("luthier.commands.lm_eval_adapter")
    harness = importlib.import_module("lm_eval.__main__")
    before = sys.argv
    sys.argv = ["luthier lm-eval", *arguments]
    try:
        harness.cli_evaluate()
    finally:
        sys.argv = before
