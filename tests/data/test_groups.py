"""Packing completions beside their prompts: random trials of what must hold for any of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from luthier.data.groups import Layout, Packed, pack, unpack
from luthier.types import Trajectory


def trajectories(seed: int, groups: int = 5, *, reference: bool = False) -> list[Trajectory]:
    """Return groups of up to 6 completions of up to 12 tokens, some with observations or no trained token, mixed."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(groups):
        prompt_T = random.integers(0, 99, random.integers(1, 15)).astype(np.int32)
        for _ in range(random.integers(1, 7)):
            length = random.integers(1, 13)
            mask_T = random.random(length) < random.choice([0.0, 0.6, 1.0])
            logps = -random.random((3, length)).astype(np.float32)
            tokens_T = random.integers(0, 99, length).astype(np.int32)
            one = Trajectory(prompt_T, tokens_T, mask_T, *logps, float(random.normal()))
            found.append(one if reference else replace(one, reference_logp_T=None))
    return [found[i] for i in random.permutation(len(found))]


def layout(seed: int, *, shared: bool = True) -> Layout:
    random = np.random.default_rng(seed)
    row_length, scored, sequences = random.integers(27, 80), random.integers(12, 60), random.integers(1, 9)
    return Layout(int(random.integers(1, 4)), int(row_length), int(scored), int(sequences), 12, shared)


def seen(packed: Packed, row: int, place: int) -> np.ndarray:
    """Return the places of a row that attention lets ``place`` see, by its definition."""
    batch = packed.batch
    segments, before = batch.segments_BT[row], np.arange(batch.tokens_BT.shape[1]) <= place
    own = segments == segments[place]
    if batch.prefixes_BT is not None:
        own |= segments == batch.prefixes_BT[row, place]
    return np.flatnonzero(own & before)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_each_trained_token_is_scored_once_behind_its_own_prompt_and_beginning(seed: int, shared: bool) -> None:
    ours, shapes = trajectories(seed), layout(seed, shared=shared)
    packed = pack(ours, shapes)
    members = np.concatenate([micro.members_BS.ravel() for micro in packed])
    assert sorted(members[members >= 0]) == list(range(len(ours)))
    for micro in packed:
        batch, used = micro.batch, set()
        for row, slot in np.argwhere(micro.members_BS >= 0):
            one = ours[micro.members_BS[row, slot]]
            whole_T = np.concatenate([one.prompt_T, one.tokens_T])
            for token in np.flatnonzero(one.mask_T):
                place = batch.places_BSC[row, slot, token]
                used.add((row, place))
                source, target = batch.sources_BM[row, place], batch.targets_BM[row, place]
                context = seen(micro, row, source)
                assert target == one.tokens_T[token]
                np.testing.assert_array_equal(batch.tokens_BT[row, context], whole_T[: len(one.prompt_T) + token])
                np.testing.assert_array_equal(batch.positions_BT[row, context], np.arange(len(context)))
        assert len(used) == sum(ours[i].mask_T.sum() for i in micro.members_BS[micro.members_BS >= 0])


@pytest.mark.parametrize("seed", range(4))
def test_rollouts_are_the_trajectories_and_padding_is_empty(seed: int) -> None:
    ours = trajectories(seed, reference=True)
    for micro in pack(ours, layout(seed)):
        rollouts = micro.batch.rollouts
        for sequence, member in enumerate(micro.members_BS.ravel()):
            mask_T = rollouts.mask_BT[sequence]
            if member < 0:
                assert not mask_T.any()
                continue
            one = ours[member]
            np.testing.assert_array_equal(mask_T[: len(one.mask_T)], one.mask_T)
            assert mask_T.sum() == one.mask_T.sum()
            assert rollouts.advantages_B[sequence] == np.float32(one.advantage)
            np.testing.assert_array_equal(rollouts.sampler_logp_BT[sequence][mask_T], one.sampler_logp_T[one.mask_T])
            np.testing.assert_array_equal(rollouts.old_logp_BT[sequence][mask_T], one.old_logp_T[one.mask_T])
            np.testing.assert_array_equal(
                rollouts.reference_logp_BT[sequence][mask_T], one.reference_logp_T[one.mask_T]
            )


@pytest.mark.parametrize("seed", range(4))
def test_shapes_are_the_layouts(seed: int) -> None:
    shapes = layout(seed)
    B, S, C = shapes.rows, shapes.sequences, shapes.completion_length
    for micro in pack(trajectories(seed), shapes):
        batch = micro.batch
        assert batch.tokens_BT.shape == batch.prefixes_BT.shape == (B, shapes.row_length)
        assert batch.sources_BM.shape == batch.targets_BM.shape == (B, shapes.scored)
        assert batch.places_BSC.shape == (B, S, C)
        assert batch.rollouts.mask_BT.shape == (B * S, C)
        assert batch.rollouts.reference_logp_BT is None
    assert pack(trajectories(seed), replace(shapes, shared=False))[0].batch.prefixes_BT is None


def test_a_group_that_fits_has_its_prompt_once() -> None:
    ours = trajectories(0, groups=1)
    packed = pack(ours, Layout(1, 90, 72, 6, 12))
    tokens = len(ours[0].prompt_T) + sum(len(one.tokens_T) for one in ours)
    assert len(packed) == 1
    assert (packed[0].batch.segments_BT > 0).sum() == tokens


def test_rows_are_full() -> None:
    """Groups of 10 + 8 x 24 tokens in rows of 160: cut in equal halves they would fill two thirds."""
    random = np.random.default_rng(0)
    ones = np.ones(24, np.float32)
    ours = [
        Trajectory(random.integers(0, 99, 10), ones.astype(np.int32), ones > 0, ones, ones, None, 1.0)
        for _ in range(16)
        for _ in range(8)
    ]
    ours = [replace(one, prompt_T=ours[number // 8].prompt_T) for number, one in enumerate(ours)]
    packed = pack(ours, Layout(1, 160, 160, 8, 24))
    assert np.mean([(micro.batch.segments_BT > 0).mean() for micro in packed]) > 0.85


def test_values_go_back_to_their_trajectories() -> None:
    ours, shapes = trajectories(3), layout(3)
    packed = pack(ours, shapes)
    logps = [micro.batch.rollouts.sampler_logp_BT.reshape(micro.batch.places_BSC.shape) for micro in packed]
    for one, logp_T in zip(ours, unpack(packed, logps, ours), strict=True):
        np.testing.assert_array_equal(logp_T, np.where(one.mask_T, one.sampler_logp_T, 0))


def test_what_does_not_fit_is_refused() -> None:
    ours = trajectories(0)
    for shapes in (Layout(1, 10, 60, 8, 12), Layout(1, 40, 5, 8, 12), Layout(1, 40, 40, 8, 6)):
        with pytest.raises(ValueError, match="do not fit Layout"):
            pack(ours, shapes)
    with pytest.raises(ValueError, match="prompt of 0"):
        pack([replace(ours[0], prompt_T=ours[0].prompt_T[:0])], layout(0))
    with pytest.raises(ValueError, match="reference"):
        pack([ours[0], replace(ours[1], reference_logp_T=ours[1].old_logp_T)], layout(0))
