"""Print how far the sampler's log-probs are from the trainer's in bf16, by what stays fp32, and what that costs.

    python benchmarks/mismatch.py --model SmolLM2-135M-Instruct.Q4_1.gguf --prompts gsm8k_test.jsonl

The embedded engine answers the file's first prompts at temperature 1, in bf16 with each value of
`float32_activations`, and the trainer's pass scores the answers: in bf16 as it was sampled, and in fp32. Weights are
rounded to bf16 once, so that all have the same. Times are of a token drawn, and of the gradient of the log-probs of
`none`'s answers, in turns; ratios are against `none`, the medians of the rounds.

Left out on purpose: other engines, whose distance `luthier rl` reports at each step (`docs/vllm.md`).
"""

from __future__ import annotations

from luthier import runtime

if __name__ == "__main__":
    runtime.tune_allocator()  # as the command does, and as early

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sft import hardware

from luthier import config, mesh
from luthier.commands import prompts as prompts_lib
from luthier.model.compute import Compute
from luthier.model.cpu import compiler_options
from luthier.rollout.engine import Completion, Request, Sampling
from luthier.rollout.opened import Opened, end_tokens, open_engine, open_model
from luthier.types import Batch

KEPT = ("none", "residual", "attention")


@dataclass
class Side:
    """One way to compute, and its seconds of a token and of a gradient, round by round."""

    sample: Callable[[], list[Completion]]  # the same each time
    score: Callable[[Any, Batch], jax.Array]
    gradient: Callable[[Any, Batch], Any]
    sampling: list[float]
    training: list[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, help="a folder or file with a chat model")
    add("--prompts", required=True, help="a file as `luthier generate` takes it")
    add("--count", type=int, default=16, help="how many of them")
    add("--new", type=int, default=128, help="the most tokens of an answer")
    add("--rounds", type=int, default=3)
    options = parser.parse_args()
    keys = [f"load_parameters_path={options.model}", "dtype=bfloat16", f"max_new_tokens={options.new}"]
    asked = config.resolve("generate", [*keys, f"prompts_path={options.prompts}"], {})
    model = open_model(asked)
    with mesh.use(model.mesh):
        asks = prompts_lib.read(asked)[: options.count]
        prompts = prompts_lib.encode(asked, asks, model.tokenizer, model.context_length)
        sides = {kept: side(options, asked, replace(model, compute=computed(kept)), prompts) for kept in KEPT}
        exact = scorer(model, Compute())
        same, _ = rows(prompts, sides["none"].sample())
        for number in range(options.rounds + 1):
            for each in sides.values():
                seconds = turn(each, model, same)
                if number:  # the first compiles
                    each.sampling.append(seconds[0])
                    each.training.append(seconds[1])
        print(f"\n{'kept in fp32':14}{'apart':>9}{'sampler':>10}{'trainer':>10}{'sampling':>11}{'gradient':>11}")
        print(f"{'':14}{'':>9}{'from fp32':>10}{'from fp32':>10}{'time':>11}{'time':>11}")
        for kept, each in sides.items():
            report(kept, each, sides["none"], model, prompts, exact)
    print(f"\n{Path(options.model).name}, {len(prompts)} answers; jax {jax.__version__}, {hardware()}")


def computed(kept: str) -> Compute:
    return Compute(jnp.dtype("bfloat16"), remat="dots", float32=kept)


def side(options: argparse.Namespace, asked: Any, model: Opened, prompts: list[list[int]]) -> Side:
    engine, ends = open_engine(asked, model), end_tokens(model)
    requests = [
        Request(prompt, 1, Sampling(max_new_tokens=options.new, stop_token_ids=ends, seed=seed))
        for seed, prompt in enumerate(prompts)
    ]

    def loss(params: Any, batch: Batch) -> jax.Array:
        return jnp.sum(model.model.score(params, batch, model.compute).logp_BT * batch.mask_BT)

    gradient = jax.jit(jax.grad(loss), compiler_options=compiler_options())
    return Side(lambda: list(engine.generate(requests)), scorer(model, model.compute), gradient, [], [])


def scorer(model: Opened, compute: Compute) -> Callable[[Any, Batch], jax.Array]:
    return jax.jit(lambda params, batch: model.model.score(params, batch, compute).logp_BT)


def rows(prompts: list[list[int]], answers: list[Completion]) -> tuple[Batch, np.ndarray]:
    """Return the answers after their prompts, a row each, and the sampler's log-probs in their places."""
    ends = [len(prompts[answer.request]) + len(answer.tokens_T) for answer in answers]
    shape = (len(answers), -(-max(ends) // 64) * 64)
    tokens_BT, segments_BT, logp_BT = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    mask_BT = np.zeros(shape, bool)
    for row, (answer, end) in enumerate(zip(answers, ends, strict=True)):
        start = len(prompts[answer.request])
        tokens_BT[row, :start], tokens_BT[row, start:end] = prompts[answer.request], answer.tokens_T
        segments_BT[row, :end], mask_BT[row, start:end], logp_BT[row, start:end] = 1, True, answer.logp_T
    positions_BT = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    return Batch(tokens_BT, positions_BT, segments_BT, mask_BT), logp_BT


def turn(each: Side, model: Opened, batch: Batch) -> tuple[float, float]:
    """Return the seconds of a token drawn and of a gradient."""
    start = time.perf_counter()
    tokens = sum(len(answer.tokens_T) for answer in each.sample())
    sampled = time.perf_counter()
    jax.block_until_ready(each.gradient(model.params, batch))
    return (sampled - start) / tokens, time.perf_counter() - sampled


def report(
    kept: str, each: Side, none: Side, model: Opened, prompts: list[list[int]], exact: Callable[[Any, Batch], jax.Array]
) -> None:
    batch, sampler_BT = rows(prompts, each.sample())
    trainer_BT, exact_BT = each.score(model.params, batch), exact(model.params, batch)

    def apart(one_BT: Any, other_BT: Any) -> float:
        return float(np.abs(one_BT - other_BT)[batch.mask_BT].mean())

    distances = [apart(sampler_BT, trainer_BT), apart(sampler_BT, exact_BT), apart(trainer_BT, exact_BT)]
    ratios = [
        float(np.median(np.divide(own, other)))
        for own, other in ((each.sampling, none.sampling), (each.training, none.training))
    ]
    print(f"{kept:14}{distances[0]:9.4f}{distances[1]:10.4f}{distances[2]:10.4f}{ratios[0]:11.2f}{ratios[1]:11.2f}")


if __name__ == "__main__":
    main()
