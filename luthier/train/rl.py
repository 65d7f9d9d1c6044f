"""Reinforcement learning, whole: prompts, groups of completions, rewards, advantages, policy steps, evaluation.

``run`` reads top to bottom: what a user can get wrong is checked in the order of what it costs to check, the steps are
compiled while weights are read, then comes the loop. Everything random follows from the seed and from how many prompts
were taken, so that a resumed run samples what the run would have sampled.

Left out on purpose: a value model (PPO), and rewards for parts of a completion.
"""

from __future__ import annotations

if __name__ == "__main__":  # the command line is parsed before anything heavy is imported
    from luthier.cli import entry

    entry("rl")

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from luthier import mesh as mesh_lib
from luthier import parting, processes, runtime
from luthier.checkpoint import source as source_lib
from luthier.checkpoint import tokenizer as tokenizer_lib
from luthier.checkpoint.state import Checkpoints
from luthier.config import RlConfig
from luthier.errors import RunError, UserError
from luthier.model.model import Model
from luthier.model.param import Tree
from luthier.rollout import checks, failures
from luthier.rollout.vllm.engine import VllmEngine
from luthier.rollout.workers import Scorers
from luthier.train import (
    display,
    folder,
    metrics,
    optimizer,
    report,
    rl_plan,
    rl_report,
    rl_setup,
    rl_vllm,
    saving,
    step,
)
from luthier.train.feed import Ahead, Feed, InTurn
from luthier.train.feed_apart import ApartAhead, ApartInTurn
from luthier.train.job import Job, load, prepare, reference
from luthier.train.learner import Learner
from luthier.train.profile import Profile
from luthier.train.rollout_files import RolloutFiles, show
from luthier.train.sampler import Collected, Sampler, measures
from luthier.train.signals import EXIT_CODES, Stop


@dataclass(frozen=True)
class Run:
    """A job with who samples, who learns, how the one's weights become the other's, and its place in the world."""

    job: Job[RlConfig]
    sampler: Sampler
    learner: Learner
    weights: Callable[[Tree], Tree]
    total: int
    place: Path
    console: Console
    stop: Stop


def run(config: RlConfig) -> None:
    """Run ``luthier rl``.

    Raises UserError for what the user can mend, RunError where training cannot go on, and SystemExit with 143 or 130
    after saving where a signal stopped it.
    """
    processes.start(config)
    shares = rl_vllm.claim(config)
    source = source_lib.resolve(config)
    place = folder.check(config)
    model = Model.from_hf(source.config, source.name)
    if config.routing_replay:
        checks.check_routes(model)
    paths = rl_plan.reward_paths(config)
    runtime.start(config)
    console = display.console()
    trains, samples = (mesh_lib.make(config, devices) for devices in rl_plan.devices(config))
    with Stop() as stop, mesh_lib.use(trains), parting.losses_named(), ThreadPoolExecutor(1) as background:
        job = prepare(config, source, model, trains)
        rl_vllm.check(job)
        objective = rl_plan.objective(config, job.compute.dtype)
        tokenizer = tokenizer_lib.load(source, config.tokenizer_path, config.hf_access_token)
        game = rl_setup.game(config, job, tokenizer)
        tasks, held_out = rl_setup.tasks(config, game, console)
        processes.check_alike("the prompts", tasks.fingerprint)
        total = total_steps(config, len(tasks))
        layout = rl_setup.layout(config, job, tasks.longest, tasks.shortest)
        plan = rl_setup.plan_memory(job, layout)
        length = rl_setup.length(config, game, tasks, held_out)
        processes.by_first(lambda: folder.open_(config))
        with (
            saving.out_of_memory(*rl_setup.memory_settings(config, layout)),
            Scorers(
                paths,
                config.reward_kwargs,
                workers=config.reward_workers,
                timeout=config.reward_timeout,
                output=place / "rewards.log",
            ) as scorers,
            rl_vllm.side(job, tokenizer, length, shares, console, place) as servers,
            contextlib.ExitStack() as engines,
        ):
            scorers.check_columns(tasks.columns, config.hf_path)
            with saving.checkpoints(config, place) as checkpoints:
                saving.check_done(checkpoints, total, place)
                programs = rl_setup.compile_steps(job, objective, layout, background)
                base, state, data = load(job, checkpoints)
                data = data or {"step": 0, "position": 0}
                check_same(data, tasks.fingerprint, place)
                held_against = reference(job, base) if config.beta else None
                weights = rl_setup.weights(job, base, samples)
                if servers is None:
                    # No name for the weights: they are the engine's from here on, which gives them up for newer ones.
                    engine = rl_setup.engine(
                        job, weights(state.params), data["step"], samples, plan, tasks, held_out, tokenizer
                    )
                else:
                    engine = engines.enter_context(
                        rl_vllm.engine(job, servers, base, state.params, data["step"], tokenizer, length, console)
                    )
                sampler = rl_setup.sampler(job, objective, game, engine, tasks, held_out, scorers, samples)
                learner = Learner(config, objective, layout, programs, trains, held_against, base)
                rl_report.header(console, job, sampler, learner, plan, total, place)
                this = Run(job, sampler, learner, weights, total, place, console, stop)
                state, evaluations = train(this, checkpoints, state, data)
        report.export(job, "rl", base, state.params, tokenizer, place)
        rl_report.summary(console, place, evaluations, job.tuning)


def train(
    this: Run, checkpoints: Checkpoints | None, state: step.TrainState, data: dict[str, Any]
) -> tuple[step.TrainState, report.Evaluations]:
    """Take the steps that are left from ``state``; return the last state and the evaluations by step."""
    config, done = this.job.config, data["step"]
    if done:
        this.console.print(f"Going on after step {done} of {this.total}.")
    rate = optimizer.schedule(config, this.total)
    profile, apart = Profile(config, this.place / "profile", done + 1), False
    files = RolloutFiles(this.place / "rollouts", done)
    with (
        metrics.Writer(this.place, done) as writer,
        display.Steps(this.console, this.total, done, rl_report.NUMBERS) as shown,
    ):
        feed = _feed(this, done, data["position"])
        try:
            _look(this, feed, writer, done)
            this.stop.armed = True
            for number in range(done + 1, this.total + 1):
                profile.before(number, state)
                started = time.perf_counter()
                collected = feed.next()
                files.write(collected)  # first, so that there is something to look at where the next line raises
                _check(this, collected)
                waited = time.perf_counter()
                groups = [group.trajectories() for group in collected.kept]
                learning_rate = rate(number - 1)
                state, learned = this.learner.learn(state, [group for group in groups if group], learning_rate)
                trained = time.perf_counter()
                feed.publish(state.params, number, now=_evaluates(this, writer, number))
                finished = time.perf_counter()
                seconds = {"waiting": waited - started, "training": trained - waited, "sync": finished - trained}
                seconds |= collected.seconds
                numbers = learned | measures(collected) | {f"seconds/{name}": value for name, value in seconds.items()}
                numbers |= {"learning_rate": learning_rate, "seconds": finished - started}
                apart = _report(this, writer, shown, collected, numbers, apart)
                stopped = this.stop.agreed()  # asked once: a signal that comes later is for the next step
                last = number == this.total or stopped is not None
                if checkpoints is not None and (last or number % config.checkpoint_period == 0):
                    checkpoints.save(number, state, _place_in_data(this, number, collected.position))
                if stopped is not None:
                    saved = "Nothing is saved" if checkpoints is None else "Saved: the same command goes on"
                    this.console.print(f"Stopped by {stopped.name} after step {number}. {saved}.")
                    raise SystemExit(EXIT_CODES[stopped])
                _look(this, feed, writer, number)
            this.stop.armed = False
            profile.close(state)
        finally:
            feed.close()
    stopped = this.stop.agreed()
    if stopped is not None:  # during the last step, which is saved
        raise SystemExit(EXIT_CODES[stopped])
    return state, writer.evaluations


def total_steps(config: RlConfig, prompts: int) -> int:
    """Return the number of steps: ``steps`` or what ``num_epoch`` gives, whichever ends first."""
    epochs = config.num_epoch or (1.0 if config.steps == -1 else math.inf)
    in_epochs = math.inf if math.isinf(epochs) else math.ceil(epochs * prompts / config.prompts_per_step)
    return int(in_epochs if config.steps == -1 else min(config.steps, in_epochs))


def _feed(this: Run, done: int, position: int) -> Feed:
    config, engine = this.job.config, this.sampler.engine
    if isinstance(engine, VllmEngine):
        if not config.max_staleness:
            return ApartInTurn(this.sampler, engine, done + 1, position)
        return ApartAhead(this.sampler, engine, done + 1, this.total, position, config.max_staleness)
    if not config.max_staleness:
        return InTurn(this.sampler, this.weights, done + 1, position)
    return Ahead(this.sampler, this.weights, done + 1, this.total, position, config.max_staleness)


def _look(this: Run, feed: Feed, writer: metrics.Writer, number: int) -> None:
    """Evaluate on the held-out prompts, if it is time to."""
    if not _evaluates(this, writer, number):
        return
    values, failed = feed.ask(Sampler.evaluate)
    writer.evaluations[number] = values
    writer.write(number, {f"eval/{name}": value for name, value in values.items()})
    rl_report.evaluation(this.console, number, values)
    _warn_of(this, failed, f"held-out prompts at step {number}")


def _evaluates(this: Run, writer: metrics.Writer, number: int) -> bool:
    """Say whether there are held-out prompts, it is time for them, and a run that is resumed has not had them."""
    interval = this.job.config.eval_interval
    due = number in (0, this.total) or (interval > 0 and number % interval == 0)
    return this.sampler.held_out is not None and due and number not in writer.evaluations


def _check(this: Run, collected: Collected) -> None:
    """Warn of rewards that failed or teach nothing.

    Raises RunError where too many failed, none is there at all, or the model that sampled gives no numbers any more,
    which the loss does not show where nothing is trained.
    """
    if not collected.finite:
        raise _diverged(this, collected.number, "log-probs of the sampler that are no numbers")
    limit, place = this.job.config.max_reward_failures, f"step {collected.number}"
    failures.check(collected.failures, collected.completions, limit)
    _warn_of(this, collected.failures, place)
    if not collected.rewarded:
        why = "what did not fail gave None" if collected.failures else "each function gave None"
        raise RunError(
            f"{place}: not one of {collected.completions} completions has a reward: {why}. Are "
            f"reward_functions={list(collected.names)} the right ones for these rows?"
        )
    if not collected.trained:
        display.warn(this.console, rl_report.nothing_trained(collected, this.sampler.habits))


def _warn_of(this: Run, failed: Sequence[failures.Failure], place: str) -> None:
    if failed:
        lost = sum(failure.lost for failure in failed)
        display.warn(this.console, f"{place}: {lost} rewards failed. The first: {failed[0]}")


def _report(
    this: Run,
    writer: metrics.Writer,
    shown: display.Steps,
    collected: Collected,
    numbers: dict[str, float],
    was_apart: bool,
) -> bool:
    """Write and show the numbers of a step, and return whether sampler and trainer are too far apart.

    It is said where they were not before. Raises RunError where the step went wrong.
    """
    config, number = this.job.config, collected.number
    if not (math.isfinite(numbers["loss"]) and math.isfinite(numbers["grad_norm"])):
        raise _diverged(this, number, f"loss {numbers['loss']}, gradient norm {numbers['grad_norm']}")
    numbers["tokens_per_second"] = numbers["num_tokens"] / numbers["seconds"]
    shown.update(number, numbers)
    if number % config.log_period == 0:
        writer.write(number, numbers)
    if config.log_completions_steps and (number == 1 or number % config.log_completions_steps == 0):
        show(this.console, collected)
    difference = numbers["sampling/logp_difference/mean"]
    is_apart = difference > config.max_logp_difference
    if is_apart and not was_apart:
        display.warn(this.console, rl_report.mismatch(config, this.job.compute, number, difference))
    return is_apart


def _diverged(this: Run, number: int, what: str) -> RunError:
    return RunError(
        f"step {number}: {what}. Nothing of this step is saved; an earlier checkpoint stands. Its completions are in "
        f"{this.place}/rollouts. Lower learning_rate, in a run of another run_name."
    )


def _place_in_data(this: Run, number: int, position: int) -> dict[str, Any]:
    return {"step": number, "position": position, "prompts": this.sampler.tasks.fingerprint}


def check_same(data: dict[str, Any], fingerprint: str, place: Path) -> None:
    """Raise UserError where a run is resumed on other prompts than it was begun with."""
    if data["step"] and data["prompts"] != fingerprint:
        raise UserError(
            f"{place}: the prompts are not those that the run was begun with: the dataset, tokenizer, chat template, "
            "system_prompt, shuffling or seed has changed. Restore it, or give another run_name."
        )
