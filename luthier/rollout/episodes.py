"""Episodes: prompts are asked, environments answer, and a group is handed out once all of its completions are there.

The samples of a prompt share its reading. Each further turn is a request of its own, for the prompt and everything
since; it goes before what waits, so that it finds the row of the cache that its last turn has left.

A token's noise follows from the task's seed, the sample and the turn. With environments that are ``quick`` the order
of all requests follows from the tasks, so an engine of the same size gives the same to the bit. With others a turn may
come a step of the engine earlier or later, and its numbers then differ by the rounding of differently sized programs,
from which now and then another token follows; so do they where weights are changed on the way.

Left out on purpose: rewards of functions (``reward``), and what is trained on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from luthier.errors import UserError
from luthier.rollout import prompts, text
from luthier.rollout.calls import Calls, Outcome, described
from luthier.rollout.engine import Completion, Request, Sampling, SteppedEngine, check_idle
from luthier.rollout.environment import Environment, SingleTurn
from luthier.rollout.playing import Playing
from luthier.rollout.prompts import Prompt
from luthier.rollout.reward import Group


@dataclass(frozen=True)
class Task:
    """A prompt with its tokens, and the seed of all that is drawn for it."""

    prompt: Prompt
    ids: Sequence[int]
    seed: int


@dataclass(frozen=True)
class Episode:
    """One completion of a task: all that came after ``prompt_T``, as the model read it.

    ``mask_T`` is true on the tokens that the model drew; the others are what the environment answered. ``logp_T`` fp32
    is under the whole softmax at the sampling temperature, ``versions_T`` int32 of the weights that drew the token; 0
    and -1 outside the mask. ``finish`` is "length" where the limit on tokens, or on turns, ended it, and "failed" where
    the environment did, ``failure`` saying how. ``reward`` is the sum of what the environment gave, None if it gave
    none or failed. ``text`` is the tokens as text; a single turn's without the stop text of the sampling that ended it.
    ``routes_TLk`` as in ``engine.Completion``, where the engine records them.
    """

    prompt_T: np.ndarray
    tokens_T: np.ndarray
    mask_T: np.ndarray
    logp_T: np.ndarray
    versions_T: np.ndarray
    text: str
    turns: int
    finish: Literal["stop", "length", "failed"]
    stopped_by: int | str | None = None
    reward: float | None = None
    failure: str | None = None
    routes_TLk: np.ndarray | None = None

    @property
    def failed(self) -> bool:
        """Whether the environment failed, so that nothing is to be learnt from this."""
        return self.failure is not None


def play(
    engine: SteppedEngine,
    tasks: Iterable[Task],
    samples: int,
    sampling: Sampling,
    tokenizer: Any,
    *,
    make_environment: Callable[[], Environment] | None = None,
    max_turns: int = 8,
    continues: bool = False,
    ahead: int | None = None,
    workers: int = 32,
    timeout: float = 60.0,
    between: Callable[[], None] | None = None,
) -> Iterator[tuple[int, list[Episode]]]:
    """Yield (index of the task, its episodes in the order of samples) of each task as soon as all of them are there.

    ``sampling.max_new_tokens`` bounds an episode as a whole, observations included; its seed is not used. At most
    ``ahead`` tasks are taken before the first of them is done, None: all. ``continues`` says that completions go on
    from the text of their prompt, as without a chat template. ``between`` is called before each step of the engine.
    Environments that are not ``quick`` are called in ``workers`` threads, each call for ``timeout`` seconds at most;
    whatever they raise ends the episode alone.

    Raises RuntimeError where the engine is busy, and UserError naming a task that the engine cannot serve. Closing the
    iterator ends the rest.
    """
    check_idle(engine)
    engine.forget()
    show = functools.partial(_text, tokenizer, sampling.stop, continues)
    calls = Calls(workers, timeout, shared=make_environment is not None)
    stage = _Stage(engine, samples, sampling, make_environment or SingleTurn, max_turns, calls, show)
    yet_to_come = enumerate(tasks)
    try:
        more = True
        while more or stage.groups:
            while more and (ahead is None or len(stage.groups) < ahead):
                more = (following := next(yet_to_come, None)) is not None
                if following is not None:
                    stage.begin(*following)
            stage.hear()
            if engine.busy:
                if between is not None:
                    between()
                stage.draw()
            yield from stage.finished()
    finally:
        stage.end()


def group(task: Task, episodes: Sequence[Episode]) -> Group:
    """Return a task's episodes as reward functions see them; ``completion_ids`` are the model's and the answers'."""
    return prompts.group(task.prompt, [each.text for each in episodes], [each.tokens_T.tolist() for each in episodes])


@dataclass
class _Party:
    """A task under way: its players in the order of samples, and how many of them have not begun or not ended."""

    task: Task
    players: list[Playing]
    to_begin: int
    to_end: int


@dataclass
class _Stage:
    """What is under way: ``groups`` by task, and the players that each request of the engine is drawing for."""

    engine: SteppedEngine
    samples: int
    sampling: Sampling
    make_environment: Callable[[], Environment]
    max_turns: int
    calls: Calls
    show: Callable[[Playing], str]
    groups: dict[int, _Party] = field(default_factory=dict)
    requests: dict[int, list[Playing]] = field(default_factory=dict)
    unfinished: dict[int, int] = field(default_factory=dict)

    def begin(self, index: int, task: Task) -> None:
        """Let the environments of a task begin."""
        players = [Playing(index, sample, task.prompt.place) for sample in range(self.samples)]
        self.groups[index] = _Party(task, players, self.samples, self.samples)
        for player in players:
            try:
                environment = player.environment = self.make_environment()
            except Exception as error:  # whatever a stranger's class raises
                self._begun(player, Outcome(None, described(error)))
            else:
                call = functools.partial(environment.reset, task.prompt)
                self.calls.submit(player.key, call, here=environment.quick)

    def hear(self) -> None:
        """Take what environments have said; where there is nothing else to do, wait for it."""
        idle = not self.engine.busy and not any(not party.to_end for party in self.groups.values())
        for (index, sample), outcome in self.calls.collect(wait=idle):
            player = self.groups[index].players[sample]
            if player.turns:
                self._answered(player, outcome)
            else:
                self._begun(player, outcome)

    def draw(self) -> None:
        """Take a step of the engine, and hand the turns that it ended to their environments."""
        for event in self.engine.step():
            if not isinstance(event, Completion):
                continue
            player = self.requests[event.request][event.sample]
            self.unfinished[event.request] -= 1
            if not self.unfinished[event.request]:
                del self.requests[event.request], self.unfinished[event.request]
            if player.environment is not None and not player.failure:
                player.take(event)
                call = functools.partial(player.environment.step, event.tokens_T)
                self.calls.submit(player.key, call, here=player.environment.quick)

    def finished(self) -> Iterator[tuple[int, list[Episode]]]:
        """Yield the tasks of which nothing is under way any more."""
        for index in [index for index, party in self.groups.items() if not party.to_end]:
            yield index, [self._episode(player) for player in self.groups.pop(index).players]

    def end(self) -> None:
        """Take back what the engine has not done yet."""
        for number in self.requests:
            self.engine.cancel(number)
        if self.requests:
            self.engine.step()  # which reports them, and draws nothing

    def _begun(self, player: Playing, outcome: Outcome) -> None:
        player.begun(outcome)
        party = self.groups[player.task]
        party.to_begin -= 1
        if not party.to_begin:
            self._ask(party)

    def _ask(self, party: _Party) -> None:
        """Ask for the first turn of all players at once."""
        well = [player for player in party.players if player.failure is None]
        for player in party.players:
            if player.failure is None and player.own_prompt != well[0].own_prompt:
                player.fail("it began with another prompt than the group's first sample: it must follow from the row")
        party.to_end = len(well := [player for player in well if player.failure is None])
        if not well:
            return
        own = well[0].own_prompt
        for player in party.players:
            player.prompt_T = np.asarray(party.task.ids if own is None else own, np.int32)
        how = self._sampling(well[0], seed=party.task.seed, limit=self.sampling.max_new_tokens)
        try:
            self._submit(Request(well[0].prompt_T.tolist(), self.samples, how), party.players)
        except UserError as error:
            if own is None:
                raise UserError(f"{party.task.prompt.place}: {error}") from None
            for player in well:
                player.fail(f"its prompt cannot be served: {error}")
            party.to_end = 0

    def _answered(self, player: Playing, outcome: Outcome) -> None:
        """Take what an environment says to a turn, and ask for the next one, or be done."""
        player.answered(outcome)
        if player.finish is None:
            room = self._room(player)
            if player.turns == self.max_turns or room < 1:
                player.finish = "length"
            else:
                self._ask_again(player, room)
        if player.finish is not None:
            self.groups[player.task].to_end -= 1

    def _ask_again(self, player: Playing, room: int) -> None:
        seed = _seed(self.groups[player.task].task.seed, player.sample, player.turns)
        request = Request(player.sequence_T.tolist(), 1, self._sampling(player, seed, room))
        try:
            self._submit(request, [player], first=True)
        except UserError as error:
            player.fail(f"its observation cannot be read: {error}")
        else:
            player.go_on()

    def _room(self, player: Playing) -> int:
        """Return how many tokens are left for the next turn, after the observation that there is."""
        used = player.length + len(player.observation_T)
        length = self.engine.length
        left = self.sampling.max_new_tokens - used
        return left if length is None else min(left, length - len(player.prompt_T) - used)

    def _sampling(self, player: Playing, seed: int, limit: int) -> Sampling:
        own = () if player.environment is None else player.environment.stop
        return replace(self.sampling, seed=seed, max_new_tokens=limit, stop=(*self.sampling.stop, *own))

    def _submit(self, request: Request, players: list[Playing], first: bool = False) -> None:
        number = self.engine.submit(request, first=first)
        self.requests[number], self.unfinished[number] = players, len(players)

    def _episode(self, player: Playing) -> Episode:
        if player.finish is None:
            raise RuntimeError(f"{player.place}, sample {player.sample}: handed out before its end")
        columns = player.columns()
        return Episode(
            player.prompt_T,
            *columns,
            text=self.show(player),
            turns=player.turns,
            finish=player.finish,
            stopped_by=player.stopped_by,
            reward=player.reward,
            failure=player.failure,
            routes_TLk=player.routes_TLk,
        )


def _text(tokenizer: Any, stop: Sequence[str], continues: bool, player: Playing) -> str:
    after = player.prompt_T.tolist() if continues else ()
    shown = stop if player.turns == 1 else ()
    return text.decode_tokens(tokenizer, player.columns().tokens_T.tolist(), player.stopped_by, shown, after)


def _seed(seed: int, sample: int, turn: int) -> int:
    return int(np.random.SeedSequence([seed, sample, turn]).generate_state(1, np.uint64)[0] >> 1)
