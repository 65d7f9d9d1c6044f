"""vLLM's side of `generate.py`: its offline `LLM`, compiled as it is by default, on all cores that it may use.

Its cache of prefixes stays on; no prompt comes twice. Left out on purpose: text, on the way in and on the way out.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from turns import Turns

GIB_OF_CACHE = 1


def on_cpu() -> bool:
    import torch

    return not torch.cuda.is_available()


def main() -> None:
    turns = Turns(lambda: None)  # the model lies in a process of its own, whose memory is not seen from here
    plan = json.loads(Path(sys.argv[1]).read_text())
    if on_cpu():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(GIB_OF_CACHE))
        # Left to itself it would keep one core free for its scheduler, which on few cores is half of them.
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", cores)
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    import torch
    import vllm

    versions = {"vllm": vllm.__version__, "torch": torch.__version__, "python": sys.version.split()[0]}
    turns.facts |= {"versions": versions, "dtype": plan["dtype"]}
    engine = vllm.LLM(
        model=plan["model"],
        dtype=plan["dtype"],
        max_model_len=plan["length"],
        max_num_seqs=plan["rows"],
        gpu_memory_utilization=0.4,
    )
    while True:
        generate(engine, plan, turns.before_step())


def generate(engine: Any, plan: dict[str, Any], job: dict[str, Any]) -> None:
    import vllm

    sampling = vllm.SamplingParams(
        temperature=plan["temperature"], n=job["samples"], max_tokens=job["new"], ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    outputs = engine.generate(prompts, sampling, use_tqdm=False)
    lengths = [len(sample.token_ids) for output in outputs for sample in output.outputs]
    if lengths != [job["new"]] * len(job["prompts"]) * job["samples"]:
        raise ValueError(
            f"{len(job['prompts'])} x {job['samples']} x {job['new']} tokens wanted, lengths {lengths} came"
        )


if __name__ == "__main__":
    main()
