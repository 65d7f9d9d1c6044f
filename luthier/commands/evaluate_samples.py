"""Completions of a dataset's prompts, scored by reward functions: means, pass@k and maj@k.

A prompt's completions are scored and written down once the last of them is there, so that reward functions see whole
groups and an interrupted run leaves what it had. A reward that fails costs itself alone: sampling is what was paid for.

Left out on purpose: scoring beside sampling, in processes of its own, which training does.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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
from luthier.rollout.failures import Failure
from luthier.rollout.opened import Opened
from luthier.rollout.prompts import Prompt
from luthier.rollout.reward import Reward
from luthier.train import display

COMPLETIONS = "completions.jsonl"
TRIAL_PROMPTS = 3
"""Prompts after which a function that has failed on every completion ends the run: it is broken, not unlucky."""


@dataclass(frozen=True)
class Scored:
    """A prompt's completions in the order of their samples, with their texts, ``rewards_GF`` and what went wrong."""

    completions: Sequence[Completion]
    texts: Sequence[str]
    rewards_GF: np.ndarray
    failures: Sequence[Failure]


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

    Raises UserError for a reward function that fails on everything, RunError where a completion cannot be written.
    """
    started = time.perf_counter()
    path, remedy = folder / COMPLETIONS, "The lines before are whole. Make room, and run it again."
    trial = _Trial(job, console)
    with disk.writing(path, "the completions", lambda: remedy):
        _set_aside(path, console)
        with path.open("w", encoding="utf-8") as file, display.counting(console, "Sampling") as counted:
            scored = _sample(job, lambda line: print(line, file=file, flush=True), counted, trial)
    seconds = time.perf_counter() - started
    summary = _summary(job, scored)
    _warn_of(console, summary)
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


class _Trial:
    """Whether each function ever works, seen prompt by prompt."""

    def __init__(self, job: Job, console: Console) -> None:
        self._console, self._samples = console, job.config.num_generations
        self._last = min(TRIAL_PROMPTS, len(job.prompts))
        self._seen = 0
        self._lost: Counter[str] = Counter()
        self._first: dict[str, Failure] = {}

    def see(self, failures: Sequence[Failure]) -> None:
        """Take the failures at one prompt; warn of each function's first.

        Raises UserError for a function that has failed on every completion of the first prompts, or of all there are.
        """
        self._seen += 1
        new = [failure for failure in failures if failure.function not in self._first]
        self._first |= {failure.function: failure for failure in new}
        self._lost.update({failure.function: failure.lost for failure in failures})
        broken = [name for name, lost in self._lost.items() if lost == self._seen * self._samples]
        if broken and self._seen == self._last:
            raise UserError(str(self._first[broken[0]]))
        for failure in new:
            display.warn(self._console, f"What failed is unscored, and the run goes on: {failure}")


def _set_aside(path: Path, console: Console) -> None:
    """Rename the completions of an earlier, unfinished run: they were paid for."""
    if not path.exists() or not path.stat().st_size:
        return
    names = (path.with_stem(f"{path.stem}.{number}") for number in itertools.count(1))
    aside = next(name for name in names if not name.exists())
    path.rename(aside)
    console.print(f"The completions of the run before are in {aside}.", markup=False)


def _summary(job: Job, scored: Sequence[Scored]) -> dict[str, dict[str, Any]]:
    """Return each function's numbers, with how many completions it failed on."""
    summary = evaluation.summarise(
        np.stack([each.rewards_GF for each in scored]),
        [each.texts for each in scored],
        [each.name for each in job.rewards],
        every_k=job.config.pass_at_k,
        threshold=job.config.pass_threshold,
        seed=job.config.seed,
    )
    failures = [failure for each in scored for failure in each.failures]
    for name, measures in summary.items():
        measures["failed_completions"] = sum(failure.lost for failure in failures if failure.function == name)
    return summary


def _warn_of(console: Console, summary: Mapping[str, Mapping[str, Any]]) -> None:
    for name, measures in summary.items():
        unscored, failed = measures["unscored_prompts"], measures["failed_completions"]
        did = f"failed on {failed} completions" if failed else "gave None to completions"
        if "mean" not in measures:
            hint = "" if failed else " Do the rows have what it looks for, such as a reference?"
            display.warn(console, f"`{name}` {did} of every prompt, so it has no mean and no other number.{hint}")
        elif unscored:
            display.warn(console, f"`{name}` {did} of {unscored} prompts, which do not count for it.")


def _sample(job: Job, write: Callable[[str], None], counted: Callable[[int, int], None], trial: _Trial) -> list[Scored]:
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
            trial.see(done[index].failures)
    return [done[index] for index in range(len(job.requests))]


def _score(job: Job, index: int, completions: Sequence[Completion]) -> Scored:
    prompt = job.prompts[index]
    after = () if job.config.use_chat_template else job.requests[index].prompt
    texts = [text.decode(job.tokenizer, each, job.config.stop, after) for each in completions]
    group = prompts_lib.group(prompt, texts, [each.tokens_T.tolist() for each in completions])
    columns, failures = zip(*(reward.score(function, group) for function in job.rewards), strict=True)
    return Scored(completions, texts, np.array(columns).T, [failure for failure in failures if failure is not None])


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
