"""Completions of a dataset's prompts, scored by reward functions: means, pass@k and maj@k.

A prompt's completions are scored and written down once the last of them is there, so that reward functions see whole
groups and an interrupted run leaves what it had.

Left out on purpose: scoring beside sampling, in processes of its own, which training does.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from luthier.checkpoint import disk
from luthier.config import EvalConfig
from luthier.errors import UserError
from luthier.rollout import answers, evaluation, opened, reward, text
from luthier.rollout import prompts as prompts_lib
from luthier.rollout.engine import CheckedEngine, Completion, Request
from luthier.rollout.opened import Opened
from luthier.rollout.prompts import Prompt
from luthier.rollout.reward import Reward
from luthier.train import display

COMPLETIONS = "completions.jsonl"


@dataclass(frozen=True)
class Scored:
    """A prompt's completions in the order of their samples, with their texts and ``rewards_GF``."""

    completions: Sequence[Completion]
    texts: Sequence[str]
    rewards_GF: np.ndarray


@dataclass(frozen=True)
class Job:
    """Prompts, and by the same index the requests that ask them; what samples and what scores."""

    config: EvalConfig
    tokenizer: Any
    prompts: Sequence[Prompt]
    requests: Sequence[Request]
    rewards: Sequence[Reward]
    engine: CheckedEngine


def prepare(
    config: EvalConfig,
    model: Opened,
    prompts: Sequence[Prompt],
    ids: Sequence[Sequence[int]],
    rewards: Sequence[Reward],
    engine: CheckedEngine,
) -> Job:
    """Return what is to be sampled and scored. Raises UserError for a prompt that cannot be sampled from."""
    settings = opened.sampling(config, model)
    if not settings.temperature and config.num_generations > 1:
        raise UserError(
            f"num_generations={config.num_generations}, and the model's generation_config.json asks for the likeliest "
            "token each time: all completions would be the same. Set temperature=..., or num_generations=1."
        )
    requests = []
    seeds = opened.prompt_seeds(config.seed, len(prompts))
    for prompt, tokens, seed in zip(prompts, ids, seeds, strict=True):
        requests.append(Request(tokens, config.num_generations, replace(settings, seed=seed)))
        try:
            engine.check(requests[-1])
        except UserError as error:
            raise UserError(f"{prompt.place}: {error}") from None
    return Job(config, model.tokenizer, prompts, requests, rewards, engine)


def evaluate(job: Job, folder: Path, console: Console) -> dict[str, Any]:
    """Sample, score and return the results; each completion is a line of ``completions.jsonl`` in ``folder``.

    Raises UserError for a reward function that fails, RunError where a completion cannot be written.
    """
    started = time.perf_counter()
    path, remedy = folder / COMPLETIONS, "The lines before are whole. Make room, and run it again."
    with (
        disk.writing(path, "the completions", lambda: remedy),
        path.open("w", encoding="utf-8") as file,
        display.counting(console, "Sampling") as counted,
    ):
        scored = _sample(job, lambda line: print(line, file=file, flush=True), counted)
    seconds = time.perf_counter() - started
    summary = evaluation.summarise(
        np.stack([each.rewards_GF for each in scored]),
        [each.texts for each in scored],
        [each.name for each in job.rewards],
        every_k=job.config.pass_at_k,
        threshold=job.config.pass_threshold,
        seed=job.config.seed,
    )
    for name, measures in summary.items():
        if unscored := measures["unscored_prompts"]:
            display.warn(
                console, f"`{name}` gave None to completions of {unscored} prompts, which do not count for it."
            )
    completions = [completion for each in scored for completion in each.completions]
    return {
        "prompts": len(job.prompts),
        "num_generations": job.config.num_generations,
        "temperature": job.requests[0].sampling.temperature,
        "rewards": summary,
        "completions": evaluation.lengths([(len(each.tokens_T), each.finish) for each in completions]),
        "seconds": seconds,
        "tokens_per_second": sum(len(each.tokens_T) for each in completions) / seconds,
    }


def _sample(job: Job, write: Callable[[str], None], counted: Callable[[int, int], None]) -> list[Scored]:
    """Return each prompt's completions, scored and written as soon as the last of them is there."""
    done: dict[int, Scored] = {}
    waiting: dict[int, list[Completion]] = {}
    samples = job.config.num_generations
    for number, completion in enumerate(job.engine.generate(job.requests), start=1):
        counted(number, len(job.requests) * samples)
        index = completion.request
        group = waiting.setdefault(index, [])
        group.append(completion)
        if len(group) == samples:
            done[index] = _score(job, index, sorted(waiting.pop(index), key=lambda each: each.sample))
            for sample in range(samples):
                write(json.dumps(_line(job, index, done[index], sample), ensure_ascii=False))
    return [done[index] for index in range(len(job.requests))]


def _score(job: Job, index: int, completions: Sequence[Completion]) -> Scored:
    prompt = job.prompts[index]
    after = () if job.config.use_chat_template else job.requests[index].prompt
    texts = [text.decode(job.tokenizer, each, job.config.stop, after) for each in completions]
    group = prompts_lib.group(prompt, texts, [each.tokens_T.tolist() for each in completions])
    columns = []
    for function in job.rewards:
        rewards, failure = reward.score(function, group)
        if failure is not None:
            raise UserError(str(failure))
        columns.append(rewards)
    return Scored(completions, texts, np.array(columns).T)


def _line(job: Job, index: int, scored: Scored, sample: int) -> dict[str, Any]:
    prompt, completion = job.prompts[index], scored.completions[sample]
    rewards = zip(job.rewards, scored.rewards_GF[sample].tolist(), strict=True)
    return {
        "index": index,
        "sample": sample,
        "place": prompt.place,
        "prompt": prompt.shown,
        "completion": scored.texts[sample],
        "reference": prompt.reference,
        "answer": answers.final_answer(scored.texts[sample]),
        "rewards": {each.name: _known(value) for each, value in rewards},
        "finish_reason": completion.finish,
        "prompt_tokens": len(job.requests[index].prompt),
        "completion_tokens": len(completion.tokens_T),
        "logprob": _known(float(completion.softmax_logp_T.sum())),
    }


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
