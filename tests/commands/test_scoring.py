"""Scores of sequences of any lengths against whole logits, one sequence at a time."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from luthier import mesh as mesh_lib
from luthier.commands.scoring import Scorer, widths
from luthier.config import InferenceKeys
from luthier.rollout.opened import open_model
from luthier.types import Batch
from tiny import ROOT


@pytest.mark.parametrize(
    ("longest", "expected"),
    [(10, [32]), (32, [32]), (33, [32, 48, 64]), (97, [32, 48, 64, 96, 128]), (160, [32, 48, 64, 96, 128, 160])],
)
def test_widths_are_few_and_enough(longest, expected):
    assert widths(longest) == expected


def test_scores_are_those_of_the_logits(tiny_model):
    opened = open_model(
        InferenceKeys(load_parameters_path=str(tiny_model), dtype="float32", jax_cache_dir=str(ROOT / ".cache" / "jax"))
    )
    random = np.random.default_rng(0)
    sequences = [random.integers(0, 259, length).tolist() for length in (3, 40, 1, 33, 17, 32, 2, 5, 48, 31)]
    with mesh_lib.use(opened.mesh):
        scored = list(Scorer(opened, 1, 48).score(sequences))
        assert sorted(index for index, _, _ in scored) == list(range(len(sequences)))
        for index, logp_T, greedy_T in scored:
            ids_T = np.array(sequences[index], np.int32)
            tokens_BT = np.zeros((8, 48), np.int32)
            tokens_BT[:, : len(ids_T)] = ids_T
            segments_BT = np.zeros_like(tokens_BT)
            segments_BT[:, : len(ids_T)] = 1
            places_BT = np.broadcast_to(np.arange(48, dtype=np.int32), tokens_BT.shape)
            batch = Batch(tokens_BT, places_BT, segments_BT, segments_BT > 0)
            logp_TV = np.asarray(jax.nn.log_softmax(opened.model.logits(opened.params, batch, opened.compute)[0]))
            before = np.arange(len(ids_T) - 1)
            np.testing.assert_allclose(logp_T[1:], logp_TV[before, ids_T[1:]], atol=1e-5)
            assert logp_T[0] == 0
            assert greedy_T[1:].tolist() == (logp_TV[before].argmax(axis=1) == ids_T[1:]).tolist()
