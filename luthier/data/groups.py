"""Completions and their prompts -> the rows of the policy step. Pure functions over numpy.

A row holds each of its prompts once and then completions of it, so that a prompt is computed once for its group
(arXiv 2506.05433) and not once for each completion. All shapes are fixed by a ``Layout``, so a step costs what its rows
cost, and packing is after few rows: a group goes where its rest fits most tightly; if that is nowhere, as many of its
completions as fit go where the most room is, and the others take their prompt along to the next place.

Left out on purpose: cutting a completion in two, and choosing which completions are trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from luthier.types import PolicyBatch, Rollouts, Trajectory


@dataclass(frozen=True)
class Layout:
    """The shapes of a micro-batch, which one compiled program serves.

    It has ``rows`` rows of ``row_length`` tokens. In a row, at most ``scored`` tokens are trained and ``sequences``
    completions stand, each of at most ``completion_length`` tokens. Where prompts are not ``shared``, each completion
    stands behind a prompt of its own. ``routes`` are the layers with experts and a token's experts in each, where the
    sampler's are replayed.
    """

    rows: int
    row_length: int
    scored: int
    sequences: int
    completion_length: int
    shared: bool = True
    routes: tuple[int, int] | None = None


@dataclass(frozen=True)
class Packed:
    """A micro-batch, its arrays numpy's, and ``members_BS``: the trajectory in each of its slots, -1 for none."""

    batch: PolicyBatch
    members_BS: np.ndarray


@dataclass
class _Row:
    """A row that is being filled: (prompt, completions of it) by number, and what room is left."""

    tokens: int
    scored: int
    sequences: int
    pieces: list[tuple[int, list[int]]] = field(default_factory=list)


def pack(trajectories: Sequence[Trajectory], layout: Layout) -> list[Packed]:
    """Return micro-batches that hold each trajectory once; what is left of the last one is padding.

    Trajectories of equal prompts, which were sent to the same experts, are a group, in whatever order they come. Where
    it is not known where a token is to be sent, its routes are -1. Rollouts have old and reference log-probs
    where the trajectories have. Raises ValueError where a trajectory does not fit in a row, lacks a prompt, or only
    some have such log-probs.
    """
    _check(trajectories, layout)
    rows = _filled(trajectories, layout)
    return [
        _laid_out(rows[start : start + layout.rows], trajectories, layout) for start in range(0, len(rows), layout.rows)
    ]


def unpack(
    packed: Sequence[Packed], values_BSC: Sequence[np.ndarray], trajectories: Sequence[Trajectory]
) -> list[np.ndarray]:
    """Return for each trajectory its tokens' values out of those ``[B, S, C]`` of each micro-batch."""
    found = [np.empty(0)] * len(trajectories)
    for micro, values in zip(packed, values_BSC, strict=True):
        for row, slot in np.argwhere(micro.members_BS >= 0).tolist():
            number = int(micro.members_BS[row, slot])
            found[number] = np.asarray(values[row, slot, : len(trajectories[number].tokens_T)])
    return found


def _check(trajectories: Sequence[Trajectory], layout: Layout) -> None:
    for number, one in enumerate(trajectories):
        prompt, tokens, scored = len(one.prompt_T), len(one.tokens_T), int(one.mask_T.sum())
        too_long = prompt + tokens > layout.row_length or tokens > layout.completion_length or scored > layout.scored
        if too_long or not prompt:
            raise ValueError(
                f"trajectory {number}: a prompt of {prompt} and a completion of {tokens} tokens, {scored} of them "
                f"trained, do not fit {layout}"
            )
    if len({(one.old_logp_T is None, one.reference_logp_T is None) for one in trajectories}) > 1:
        raise ValueError("some trajectories have old or reference log-probs and some have none")


def _filled(trajectories: Sequence[Trajectory], layout: Layout) -> list[_Row]:
    """Return the rows, by the module's rule; large groups first, and of a group long completions first."""
    groups: dict[bytes | int, list[int]] = {}
    for number, one in enumerate(trajectories):
        groups.setdefault(_prompt(one, layout) if layout.shared else number, []).append(number)
    lengths = [len(one.tokens_T) for one in trajectories]
    scored = [int(one.mask_T.sum()) for one in trajectories]
    rows: list[_Row] = []
    for group in sorted(groups.values(), key=lambda group: -sum(lengths[number] for number in group)):
        prompt = len(trajectories[group[0]].prompt_T)
        rest = sorted(group, key=lambda number: -lengths[number])
        while rest:
            whole = (prompt + sum(lengths[i] for i in rest), sum(scored[i] for i in rest), len(rest))
            fitting = [row for row in rows if _fits(row, *whole)]
            row = (
                min(fitting, key=lambda row: row.tokens)
                if fitting
                else max(rows, key=lambda row: row.tokens, default=None)
            )
            taken = _take(row, prompt, rest, lengths, scored) if row else []
            if row is None or not taken:
                row = _Row(layout.row_length, layout.scored, layout.sequences)
                rows.append(row)
                taken = _take(row, prompt, rest, lengths, scored)
            row.pieces.append((group[0], taken))
            rest = [number for number in rest if number not in taken]
    return rows


def _prompt(one: Trajectory, layout: Layout) -> bytes:
    """Return what trajectories have alike that share their prompt's computation."""
    if layout.routes is None or one.routes_TLk is None:
        return one.prompt_T.tobytes()
    return one.prompt_T.tobytes() + one.routes_TLk[: len(one.prompt_T)].tobytes()


def _fits(row: _Row, tokens: int, scored: int, sequences: int) -> bool:
    return tokens <= row.tokens and scored <= row.scored and sequences <= row.sequences


def _take(row: _Row, prompt: int, group: list[int], lengths: list[int], scored: list[int]) -> list[int]:
    """Return as many of the group as fit into the row, in their order, and lessen the row's room."""
    taken = []
    for number in group:
        tokens = lengths[number] + (0 if taken else prompt)
        if _fits(row, tokens, scored[number], 1):
            row.tokens, row.scored, row.sequences = row.tokens - tokens, row.scored - scored[number], row.sequences - 1
            taken.append(number)
    return taken


def _laid_out(rows: Sequence[_Row], trajectories: Sequence[Trajectory], layout: Layout) -> Packed:
    """Return the arrays of ``layout.rows`` rows, those that are not given empty."""
    packed = _empty(layout, trajectories[0])
    for number, row in enumerate(rows):
        start, scored, slot, segment = 0, 0, 0, 1
        for prompt_of, members in row.pieces:
            first = trajectories[prompt_of]
            prompt_T = first.prompt_T
            prompt = slice(start, start + len(prompt_T))
            _write(packed.batch, number, prompt, prompt_T, 0, segment, segment)
            _write_routes(packed.batch, number, prompt, first, 0)
            start, prefix = prompt.stop, segment
            for member in members:
                one = trajectories[member]
                segment += layout.shared
                here = slice(start, start + len(one.tokens_T))
                _write(packed.batch, number, here, one.tokens_T, len(prompt_T), segment, prefix)
                _write_routes(packed.batch, number, here, one, len(prompt_T))
                scored = _score(packed.batch, number, slot, one, here, prompt.stop - 1, scored)
                _write_rollout(packed.batch.rollouts, number * layout.sequences + slot, one)
                packed.members_BS[number, slot] = member
                start, slot = here.stop, slot + 1
            segment += 1
    return packed


def _write(
    batch: PolicyBatch, row: int, here: slice, tokens_T: np.ndarray, position: int, segment: int, prefix: int
) -> None:
    batch.tokens_BT[row, here] = tokens_T
    batch.positions_BT[row, here] = position + np.arange(len(tokens_T))
    batch.segments_BT[row, here] = segment
    if batch.prefixes_BT is not None:
        batch.prefixes_BT[row, here] = prefix


def _write_routes(batch: PolicyBatch, row: int, here: slice, one: Trajectory, position: int) -> None:
    """Enter where the trajectory's tokens from ``position`` on were sent; not known of its last one."""
    if batch.routes_BTLk is not None and one.routes_TLk is not None:
        routes_TLk = one.routes_TLk[position : position + here.stop - here.start]
        batch.routes_BTLk[row, here.start : here.start + len(routes_TLk)] = routes_TLk


def _score(batch: PolicyBatch, row: int, slot: int, one: Trajectory, here: slice, before: int, scored: int) -> int:
    """Enter a completion's trained tokens after the ``scored`` ones of its row, and return how many those are now.

    A token is predicted from the state before it; that of the first is ``before``, the prompt's last.
    """
    tokens_K = np.flatnonzero(one.mask_T)
    places_K = scored + np.arange(len(tokens_K))
    batch.sources_BM[row, places_K] = np.where(tokens_K > 0, here.start + tokens_K - 1, before)
    batch.targets_BM[row, places_K] = one.tokens_T[tokens_K]
    batch.places_BSC[row, slot, tokens_K] = places_K
    return scored + len(tokens_K)


def _write_rollout(rollouts: Rollouts, sequence: int, one: Trajectory) -> None:
    length = len(one.tokens_T)
    rollouts.mask_BT[sequence, :length] = one.mask_T
    rollouts.advantages_B[sequence] = one.advantage
    pairs = (
        (rollouts.sampler_logp_BT, one.sampler_logp_T),
        (rollouts.old_logp_BT, one.old_logp_T),
        (rollouts.reference_logp_BT, one.reference_logp_T),
    )
    for logp_BT, logp_T in pairs:
        if logp_BT is not None and logp_T is not None:
            logp_BT[sequence, :length] = np.where(one.mask_T, logp_T, 0.0)


def _empty(layout: Layout, like: Trajectory) -> Packed:
    """Return a micro-batch of padding, with the log-probs that a trajectory has."""
    B, T, S, C = layout.rows, layout.row_length, layout.sequences, layout.completion_length

    def ids(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.int32)

    def logps() -> np.ndarray:
        return np.zeros((B * S, C), np.float32)

    batch = PolicyBatch(
        tokens_BT=ids(B, T),
        positions_BT=ids(B, T),
        segments_BT=ids(B, T),
        prefixes_BT=ids(B, T) if layout.shared else None,
        sources_BM=ids(B, layout.scored),
        targets_BM=ids(B, layout.scored),
        places_BSC=ids(B, S, C),
        rollouts=Rollouts(
            mask_BT=np.zeros((B * S, C), bool),
            sampler_logp_BT=logps(),
            old_logp_BT=None if like.old_logp_T is None else logps(),
            reference_logp_BT=None if like.reference_logp_T is None else logps(),
            advantages_B=np.zeros(B * S, np.float32),
        ),
        routes_BTLk=None if layout.routes is None else np.full((B, T, *layout.routes), -1, np.int16),
    )
    return Packed(batch, np.full((B, S), -1, np.int32))
