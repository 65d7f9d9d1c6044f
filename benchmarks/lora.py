"""Train adapters on SmolLM2's shape with Luthier and with PEFT under TRL, in turns: who is how fast in how much memory.

    python benchmarks/lora.py --peer-python /path/to/an/environment/with/trl/and/peft/bin/python

An adapter of rank 16 on all linear modules, of alpha twice the rank, without dropout. All else is as in `sft.py`.
"""

from __future__ import annotations

import sft

if __name__ == "__main__":
    sft.run(sft.parser(__doc__, rank=16).parse_args())
