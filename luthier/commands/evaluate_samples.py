"""Completions of a dataset's prompts, scored by reward functions: means, pass@k and maj@k.

A prompt's completions are scored and written down once the last of them is there, so that reward functions see whole
groups and an interrupted run leaves what it had.

Left out on purpose: scoring beside sampling, in processes of its own, which training does.
"""

from __future__ import annotations

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
from luthier.data import chat
from luthier.data.rows import Rows
from luthier.data.schemas import RowError, Selection
from luthier.errors import UserError
from luthier.rollout import answers, estimators, opened, reward, text
from luthier.rollout.engine import Completion, Request
from luthier.rollout.local import LocalEngine
from luthier.rollout.opened import Opened
from luthier.rollout.reward import Group, Reward
from luthier.rollout.verifiers import Text
from luthier.train import display
from luthier.types import Conversation

COMPLETIONS = "completions.jsonl"


@dataclass(frozen=True)
class Prompt:
    """What a row asks, and what it holds the answer against.

    ``shown`` is the prompt as reward functions see it: messages if the row has messages, else text.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] | None
    shown: Text
    reference: str | None
    row: Mapping[str, Any]
    place: str


@dataclass(frozen=True)
class Scored:
    """A prompt's completions in the order of their samples: texts, final answers, and ``rewards_GF``."""

    completions: Sequence[Completion]
    texts: Sequence[str]
    answers: Sequence[str | None]
    rewards_GF: np.ndarray


@dataclass(frozen=True)
class Job:
    """Prompts, and by the same index the requests that ask them; what samples and what scores."""

    config: EvalConfig
    tokenizer: Any
    prompts: Sequence[Prompt]
    requests: Sequence[Request]
    rewards: Sequence[Reward]
    engine: LocalEngine


def read_prompts(config: EvalConfig, rows: Rows, chosen: Selection) -> list[Prompt]:
    """Return the prompt of each row. Raises UserError naming a row that cannot be read or asks nothing."""
    prompts = []
    for index in range(len(rows)):
        row = rows[index]
        try:
            prompts.append(_prompt(config, chosen, row, chosen.read(row), rows.place(index)))
        except RowError as error:
            raise UserError(f"{rows.place(index)}: {error}") from None
    return prompts


def encode(config: EvalConfig, prompts: Sequence[Prompt], tokenizer: Any) -> list[list[int]]:
    """Return the tokens of each prompt. Raises UserError naming one that the chat template refuses."""
    how = chat.prompt_rendering(config, tokenizer)
    found = []
    for prompt in prompts:
        try:
            found.append(text.encode(tokenizer, how, prompt.messages, prompt.tools))
        except RowError as error:
            raise UserError(f"{prompt.place}: {error}") from None
    return found


def prepare(
    config: EvalConfig,
    model: Opened,
    prompts: Sequence[Prompt],
    ids: Sequence[Sequence[int]],
    rewards: Sequence[Reward],
) -> Job:
    """Return what is to be sampled and scored. Raises UserError for a prompt that cannot be sampled from."""
    engine = opened.open_engine(config, model)
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
    summary = summarise(scored, [each.name for each in job.rewards], job.config)
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
        "completions": _lengths(completions),
        "seconds": seconds,
        "tokens_per_second": sum(len(each.tokens_T) for each in completions) / seconds,
    }


def summarise(scored: Sequence[Scored], names: Sequence[str], config: EvalConfig) -> dict[str, dict[str, Any]]:
    """Return for each function its mean, pass@k and maj@k with confidence intervals over prompts.

    Prompts with a completion that a function gave None are left out of its numbers, and counted.
    """
    G = config.num_generations
    every_k = sorted(set(config.pass_at_k)) or [k for k in (2**power for power in range(G.bit_length())) if k <= G]
    rewards_PGF = np.stack([each.rewards_GF for each in scored])
    summary = {}
    for number, name in enumerate(names):
        known_P = np.isfinite(rewards_PGF[:, :, number]).all(axis=1)
        summary[name] = {"unscored_prompts": int((~known_P).sum())}
        if not known_P.any():
            continue
        rewards_PG = rewards_PGF[known_P, :, number]
        passed_PG = rewards_PG >= config.pass_threshold
        voted = [scored[index].answers for index in np.flatnonzero(known_P).tolist()]
        values = {"mean": rewards_PG.mean(axis=1)}
        values |= {f"pass@{k}": estimators.pass_at_k(passed_PG, k) for k in every_k}
        values |= {f"maj@{k}": estimators.majority_at_k(voted, passed_PG, k) for k in every_k if k > 1}
        intervals = {key: estimators.interval(value_P, config.seed)._asdict() for key, value_P in values.items()}
        summary[name] = intervals | summary[name]
    return summary


def _prompt(
    config: EvalConfig, chosen: Selection, row: Mapping[str, Any], conversation: Conversation, place: str
) -> Prompt:
    messages = conversation.messages
    count = conversation.prompt_messages
    if not count:  # a whole conversation: its last reply is the reference
        count = len(messages) - (messages[-1]["role"] == "assistant")
    asked, reply = messages[:count], messages[count:]
    if not asked:
        raise RowError("", "nothing comes before its reply, so there is no prompt. Remove the row.")
    own = row.get(dict(chosen.columns).get("prompt", ""))
    as_messages = chosen.schema in ("messages", "conversations") or (own is not None and not isinstance(own, str))
    text_shown = asked[-1]["content"]
    if config.system_prompt and all(message["role"] != "system" for message in asked):
        asked = ({"role": "system", "content": config.system_prompt}, *asked)
    reference = "".join(message["content"] for message in reply) if reply else None
    return Prompt(asked, conversation.tools, list(asked) if as_messages else text_shown, reference, row, place)


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
    as_messages = not isinstance(prompt.shown, str)
    group = Group(
        prompt=prompt.shown,
        completions=[[{"role": "assistant", "content": said}] for said in texts] if as_messages else texts,
        completion_ids=[each.tokens_T.tolist() for each in completions],
        row=prompt.row,
        reference=prompt.reference,
        place=prompt.place,
    )
    return Scored(completions, texts, [answers.final_answer(said) for said in texts], reward.score(job.rewards, group))


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
        "answer": scored.answers[sample],
        "rewards": {each.name: None if math.isnan(value) else value for each, value in rewards},
        "finish_reason": completion.finish,
        "prompt_tokens": len(job.requests[index].prompt),
        "completion_tokens": len(completion.tokens_T),
        "logprob": float(completion.softmax_logp_T.sum()),
    }


def _lengths(completions: Sequence[Completion]) -> dict[str, Any]:
    lengths = [len(each.tokens_T) for each in completions]
    finishes = Counter(each.finish for each in completions)
    return {
        "mean_length": float(np.mean(lengths)),
        "min_length": min(lengths),
        "max_length": max(lengths),
        "clipped_ratio": finishes["length"] / len(lengths),
        "finish_reason": dict(finishes),
    }
