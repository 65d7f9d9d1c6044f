"""The demo of reinforcement learning: GRPO on sums, with the model that `make demo` takes.

`make demo-rl` runs this file. Left out on purpose: the run itself, which is `luthier rl recipes/demo-rl.yml` as anyone
would type it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from demo import model_file

RECIPE = Path(__file__).with_name("demo-rl.yml")
RUN = Path("runs/demo-rl")


def main() -> int:
    """Run the recipe, and say how to go on."""
    if RUN.exists():
        print(f"Removing {RUN}, the run of an earlier demo.")
        shutil.rmtree(RUN)
    luthier = str(Path(sys.executable).with_name("luthier"))
    command = [luthier, "rl", str(RECIPE), f"load_parameters_path={model_file()}"]
    print(" ".join(["$", *command]), flush=True)
    code = subprocess.run(command, check=False).returncode
    if not code:
        print(f"\nEvery completion of every step is in {RUN}/rollouts. With rewards of your own (docs/rl.md):")
        print(f"  {luthier} rl load_parameters_path=MODEL hf_path=FILE.jsonl reward_functions=my_rewards.py:mine")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
