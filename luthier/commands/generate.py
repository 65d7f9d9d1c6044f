"""`luthier generate`: complete prompts.

Standard output is the result and nothing else: JSON lines, in the order of the prompts and each as soon as those before
it are done; on a terminal the text alone, as it comes. What is told about the run goes to standard error. A file is
written beside its place and moved there at the end, so that what stands there is always whole.

Left out on purpose: scoring (`luthier eval`), and going on with a run that was stopped.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from luthier import mesh as mesh_lib
from luthier.commands import output, terminal
from luthier.commands import prompts as prompts_lib
from luthier.config import GenerateConfig
from luthier.model import param
from luthier.rollout import text
from luthier.rollout.chosen import Chosen
from luthier.rollout.engine import Completion, Engine, Piece, Request
from luthier.rollout.opened import Opened, open_model, prompt_seeds, sampling
from luthier.rollout.prompts import Prompt
from luthier.train import display


@dataclass
class Job:
    """What is to be done, and how much of it is."""

    config: GenerateConfig
    opened: Opened
    prompts: Sequence[Prompt]
    requests: Sequence[Request]
    started: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    completions: int = 0
    tokens: int = 0

    def after(self, request: int) -> Sequence[int]:
        """The text that the completions of a request go on from; nothing where they are replies."""
        return () if self.config.use_chat_template else self.requests[request].prompt

    def run(self, engine: Engine, on_piece: Callable[[Piece], None] | None = None) -> Iterator[Completion]:
        """Generate, and count what is done and how long it took."""
        self.started = time.perf_counter()

        def hear(piece: Piece) -> None:
            self.first = self.first or time.perf_counter() - self.started
            if on_piece is not None:
                on_piece(piece)

        for completion in engine.generate(self.requests, hear):
            self.completions += 1
            self.tokens += len(completion.tokens_T)
            yield completion


def run(config: GenerateConfig) -> None:
    """Run ``luthier generate``.

    Raises UserError for what the user can mend, prompts and output before the model's weights are read, and RunError
    where the output cannot be written.
    """
    console = terminal.messages()
    prompts = prompts_lib.read(config)
    output.check(config.output_path, config.prompts_path)
    with Chosen(config, partial(console.print, markup=False)) as chosen:
        job = _open(config, prompts, chosen, console)
        with mesh_lib.use(job.opened.mesh):
            engine = chosen.open(job.opened)
            _header(console, job)
            if config.output_path or config.logprobs is not None or not sys.stdout.isatty():
                write(job, engine, console)
            else:
                show(job, engine)
    seconds = time.perf_counter() - job.started
    console.print(
        f"{_count(job.completions, 'completion')} of {_count(len(prompts), 'prompt')}: {job.tokens:,} tokens in "
        f"{seconds:.1f} s, "
        f"{job.tokens / seconds:,.1f} tokens/s; the first came after {job.first:.1f} s"
    )


def _open(config: GenerateConfig, prompts: Sequence[Prompt], chosen: Chosen, console: Console) -> Job:
    """Return what is to be done, with the model opened for it."""
    ids: list[list[int]] = []

    def look(source: Any, tokenizer: Any) -> None:
        ids.extend(prompts_lib.encode(config, prompts, tokenizer, source.context_length))
        chosen.look(source, tokenizer, ids)

    with console.status("Opening the model") if console.is_terminal else contextlib.nullcontext():
        opened = open_model(chosen.keys, look)
    return Job(config, opened, prompts, requests(config, opened, ids))


def requests(config: GenerateConfig, opened: Opened, prompts: Sequence[Sequence[int]]) -> list[Request]:
    """Return a request for each prompt. Each has a seed of its own, the same whenever the command is run again."""
    chosen = replace(sampling(config, opened), logprobs=config.logprobs or 0)
    return [
        Request(prompt, config.num_generations, replace(chosen, seed=seed))
        for prompt, seed in zip(prompts, prompt_seeds(config.seed, len(prompts)), strict=True)
    ]


def in_order(completions: Iterator[Completion], samples: int) -> Iterator[Completion]:
    """Yield completions in the order of the prompts and of their samples, each as soon as it can be."""
    waiting: dict[tuple[int, int], Completion] = {}
    request = sample = 0
    for completion in completions:
        waiting[completion.request, completion.sample] = completion
        while (request, sample) in waiting:
            yield waiting.pop((request, sample))
            request, sample = (request, sample + 1) if sample + 1 < samples else (request + 1, 0)


def write(job: Job, engine: Engine, console: Console) -> None:
    """Write a JSON line for each completion, with a progress bar on a terminal that shows nothing else."""
    config = job.config
    alone = console.is_terminal and not (output.is_standard(config.output_path) and sys.stdout.isatty())
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"), TimeElapsedColumn())
    # Rich would send what is written to standard output where the bar is: to the terminal, in place of the file.
    bar = Progress(*columns, console=console, disable=not alone, redirect_stdout=False)
    task = bar.add_task("", total=len(job.requests) * config.num_generations, speed="")

    def counted() -> Iterator[Completion]:
        for completion in job.run(engine):
            speed = job.tokens / (time.perf_counter() - job.started)
            bar.update(task, completed=job.completions, speed=f"{speed:,.0f} tokens/s")
            yield completion

    with bar, output.lines(config.output_path, console) as put:
        for completion in in_order(counted(), config.num_generations):
            put(row(job, completion))


def show(job: Job, engine: Engine) -> None:
    """Print the text of each completion as it comes, in order: of those after it, what is there when its turn comes."""
    tokenizer, samples = job.opened.tokenizer, job.config.num_generations
    streams: dict[tuple[int, int], text.TextStream] = {}
    texts: dict[tuple[int, int], str] = {}
    turn = iter([(request, sample) for request in range(len(job.requests)) for sample in range(samples)])
    now = next(turn)

    def take(key: tuple[int, int], ids: Sequence[int], last: bool = False) -> None:
        if key not in streams:
            chosen = job.requests[key[0]].sampling
            streams[key] = text.TextStream(tokenizer, chosen.stop, chosen.stop_token_ids, job.after(key[0]))
        new = streams[key].push(ids) + (streams[key].close() if last else "")
        if key == now:
            _print(new)
        else:
            texts[key] = texts.get(key, "") + new

    def heading(key: tuple[int, int]) -> None:
        if len(job.requests) * samples > 1:
            asked = job.prompts[key[0]].messages[-1]["content"]
            number = f"{key[0] + 1}/{len(job.requests)}" + (f", sample {key[1] + 1}/{samples}" if samples > 1 else "")
            _print(f"[{number}] {' '.join(asked.split())[:100]}\n")

    heading(now)
    done = set()
    for completion in job.run(engine, lambda piece: take((piece.request, piece.sample), piece.tokens_T.tolist())):
        take((completion.request, completion.sample), [], last=True)
        done.add((completion.request, completion.sample))
        while now in done:
            _print("\n")
            following = next(turn, None)
            if following is None:
                break
            now = following
            _print("\n")
            heading(now)
            _print(texts.pop(now, ""))


def row(job: Job, completion: Completion) -> dict[str, Any]:
    """Return one completion as the object that is written for it."""
    request = job.requests[completion.request]
    found = {
        "index": completion.request,
        "sample": completion.sample,
        "prompt": job.prompts[completion.request].shown,
        "completion": text.decode(
            job.opened.tokenizer, completion, request.sampling.stop, job.after(completion.request)
        ),
        "finish_reason": completion.finish,
        "prompt_tokens": len(request.prompt),
        "completion_tokens": len(completion.tokens_T),
    }
    return found if job.config.logprobs is None else found | {"tokens": _tokens(job.opened.tokenizer, completion)}


def _tokens(tokenizer: Any, completion: Completion) -> list[dict[str, Any]]:
    """Return each token with its log-probs: under the whole softmax, where it is known, and as it was drawn."""
    ids = completion.tokens_T.tolist()
    columns = (
        ids,
        tokenizer.convert_ids_to_tokens(ids),
        [None if math.isnan(logp) else logp for logp in completion.softmax_logp_T.tolist()],
        completion.logp_T.tolist(),
    )
    names = ("id", "token", "logprob", "drawn_logprob")
    found: list[dict[str, Any]] = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
    if completion.alternatives is not None:
        for each, others, logps in zip(found, *map(np.ndarray.tolist, completion.alternatives), strict=True):
            listed = zip(others, tokenizer.convert_ids_to_tokens(others), logps, strict=True)
            each["top_logprobs"] = [dict(zip(names, values, strict=False)) for values in listed]
    return found


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("s" if number != 1 else "")


def _print(words: str) -> None:
    sys.stdout.write(terminal.harmless(words))
    sys.stdout.flush()


def _header(console: Console, job: Job) -> None:
    """Say what is about to happen, to a person who watches."""
    replies = sum(prompt.replies > 0 for prompt in job.prompts)
    if replies:
        console.print(f"{replies} of {_count(len(job.prompts), 'prompt')} end with a reply, which is left out.")
    if not console.is_terminal:
        return
    opened, chosen = job.opened, job.requests[0].sampling
    lengths = [len(request.prompt) for request in job.requests]
    span = f"{min(lengths)} to {max(lengths)}" if min(lengths) < max(lengths) else lengths[0]
    where = (
        f"{jnp.dtype(opened.compute.dtype).name} on {opened.mesh.size} x {opened.mesh.devices.flat[0].device_kind}"
        if job.config.rollout_engine == "local"
        else f"vLLM ({_count(len(job.config.vllm_urls) or job.config.vllm_servers, 'server')})"
    )
    lines = {
        "model": f"{opened.name}, {display.quantity(param.count(opened.model.spec))} parameters, computed in {where}",
        "prompts": f"{len(lengths)}, of {span} tokens; {_count(job.config.num_generations, 'completion')} of each",
        "sampling": f"temperature {chosen.temperature:g}, top_k {chosen.top_k}, top_p {chosen.top_p:g}, "
        f"min_p {chosen.min_p:g}, at most {chosen.max_new_tokens} tokens",
    }
    display.table(console, "luthier generate", lines)
