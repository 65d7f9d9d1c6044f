"""Every family against Transformers on tiny random models: one tolerance, never loosened."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luthier import mesh
from luthier.checkpoint import huggingface
from luthier.checkpoint.source import resolve
from luthier.config import ModelKeys
from luthier.errors import UserError
from luthier.model import families, param
from luthier.model.compute import Compute
from luthier.model.model import Model
from luthier.types import Batch
from tiny import CONFIGS, TINY, make_batch, params_from_torch, torch_twin

TOLERANCE = 1e-4


def plain_batch(rows: int = 2, length: int = 48) -> Batch:
    """Rows of one segment each, without padding."""
    tokens_BT = np.random.default_rng(0).integers(0, 256, (rows, length), dtype=np.int32)
    ones_BT = np.ones_like(tokens_BT)
    return Batch(tokens_BT, np.tile(np.arange(length, dtype=np.int32), (rows, 1)), ones_BT, ones_BT)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name: str) -> None:
    torch = pytest.importorskip("torch")
    model, twin, batch = Model.from_hf(CONFIGS[name], name), torch_twin(CONFIGS[name]), plain_batch()
    params = params_from_torch(model.spec, twin)
    with torch.no_grad():
        theirs_BTV = torch.log_softmax(twin(torch.from_numpy(batch.tokens_BT).long()).logits, -1).numpy()
    logits_BTV = jax.jit(lambda p: model.logits(p, batch, Compute()))(params)
    ours_BTV = np.asarray(jax.nn.log_softmax(logits_BTV))
    np.testing.assert_allclose(ours_BTV, theirs_BTV, atol=TOLERANCE, rtol=0)
    scores = jax.jit(lambda p: model.score(p, batch, Compute()))(params)
    targets = batch.tokens_BT[:, 1:, None]
    expected_BT = np.take_along_axis(theirs_BTV[:, :-1], targets, axis=-1)[..., 0]
    np.testing.assert_allclose(scores.logp_BT[:, 1:], expected_BT, atol=TOLERANCE, rtol=0)
    right_BT = theirs_BTV[:, :-1].argmax(-1) == batch.tokens_BT[:, 1:]
    np.testing.assert_array_equal(np.asarray(scores.correct_BT[:, 1:], bool), right_BT)


def test_a_long_rope_reaches_every_branch_of_llama31_scaling() -> None:
    """The scaled and the unscaled model differ, so the parity above does exercise the scaling."""
    config = CONFIGS["llama3.1"]
    batch = plain_batch()
    scaled, unscaled = (Model.from_hf(c, "x") for c in (config, config | {"rope_scaling": None}))
    one_device = mesh.make(ModelKeys(), jax.devices()[:1])
    params = param.initialise(scaled.spec, jax.random.key(0), jnp.float32, one_device)
    one, other = (np.asarray(model.logits(params, batch, Compute())) for model in (scaled, unscaled))
    assert np.abs(one - other).max() > 1e-3


def test_packed_rows_score_as_rows_of_their_own() -> None:
    torch = pytest.importorskip("torch")
    model, twin, batch = Model.from_hf(TINY, "tiny"), torch_twin(TINY), make_batch()
    params = params_from_torch(model.spec, twin)
    logp_BT = np.asarray(jax.jit(lambda p: model.score(p, batch, Compute()).logp_BT)(params))
    for row in range(len(batch.tokens_BT)):
        for segment in (1, 2):
            where = np.flatnonzero(batch.segments_BT[row] == segment)
            ids = torch.from_numpy(batch.tokens_BT[row, where][None]).long()
            with torch.no_grad():
                theirs_TV = torch.log_softmax(twin(ids).logits, -1)[0].numpy()
            expected_T = theirs_TV[np.arange(len(where) - 1), batch.tokens_BT[row, where[1:]]]
            np.testing.assert_allclose(logp_BT[row, where[1:]], expected_T, atol=TOLERANCE, rtol=0)


def test_families_are_found_by_model_type_and_an_unknown_one_is_refused() -> None:
    assert families.find({"model_type": "llama"}, "x").__name__.endswith("llama")
    with pytest.raises(UserError, match=r"x: model type `lama` is not supported\. Did you mean `llama`"):
        families.find({"model_type": "lama"}, "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act=`gelu` is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope type `yarn` is not supported"),
    ],
)
def test_a_config_that_cannot_be_computed_is_refused(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Model.from_hf(TINY | change, "x")


def test_a_config_that_lacks_a_field_is_refused() -> None:
    config = {name: value for name, value in TINY.items() if name != "vocab_size"}
    with pytest.raises(UserError, match=r"x: config\.json lacks 'vocab_size'"):
        Model.from_hf(config, "x")


def test_a_llama31_checkpoint_scores_as_its_recorded_reference(data_folder: Path) -> None:
    """Transformers' fp32 log-probs of a Llama 3.1 checkpoint on disk, through our own reading of it."""
    folder = data_folder / "maxtext" / "llama3.1-tiny-hf"
    source = resolve(ModelKeys(load_parameters_path=str(folder)))
    model, reference = Model.from_hf(source.config, source.name), np.load(folder / "reference.npz")
    tokens_BT = reference["tokens"].astype(np.int32)
    ones_BT = np.ones_like(tokens_BT)
    positions_BT = np.tile(np.arange(tokens_BT.shape[1], dtype=np.int32), (len(tokens_BT), 1))
    batch = Batch(tokens_BT, positions_BT, ones_BT, ones_BT)
    params = huggingface.load(source, model.spec, jnp.float32, mesh.make(ModelKeys(), jax.devices()[:1]))
    logits_BTV = jax.jit(lambda p: model.logits(p, batch, Compute()))(params)
    np.testing.assert_allclose(jax.nn.log_softmax(logits_BTV), reference["logp"], atol=TOLERANCE, rtol=0)
