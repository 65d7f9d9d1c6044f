"""What follows from a weight's one line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_variants import VARIANTS

from luthier import mesh
from luthier.config import ModelKeys
from luthier.model import param
from luthier.model.model import Model
from luthier.model.param import Param
from tiny import CONFIGS, TINY, torch_twin

Q = Param("layers.{layer}.q", "(n h) d -> d n h", ("embed", "heads", "head_dim"), (6, 2, 4))


def test_layouts_run_both_ways() -> None:
    tensor = np.arange(8 * 6).reshape(8, 6)
    assert Q.tensor_shape == (8, 6)
    piece = Q.from_tensor(tensor)
    assert piece.shape == Q.shape
    assert piece[5, 1, 2] == tensor[1 * 4 + 2, 5]
    back = np.zeros_like(tensor)
    Q.into_tensor(piece, back)
    np.testing.assert_array_equal(back, tensor)


def test_stacking_names_each_tensor_and_its_place() -> None:
    stacked = param.stacked({"q": Q}, "layer", [3, 5])["q"]
    assert stacked.shape == (2, 6, 2, 4)
    assert stacked.axes == ("layer", "embed", "heads", "head_dim")
    assert stacked.slice_shape == Q.shape
    assert stacked.tensors() == {"layers.3.q": (0,), "layers.5.q": (1,)}


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_shapes_are_those_of_transformers(name: str) -> None:
    pytest.importorskip("torch")
    spec = Model.from_hf(CONFIGS[name], name).spec
    theirs = {name: tuple(weight.shape) for name, weight in torch_twin(CONFIGS[name]).named_parameters()}
    assert dict(param.tensor_shapes(spec)) == theirs
    assert param.count(spec) == sum(np.prod(shape) for shape in theirs.values())


@pytest.mark.parametrize("name", VARIANTS)
def test_only_matrices_decay(name: str) -> None:
    """No norm, bias, sink or correction, whatever its shape."""
    for path, leaf in param.leaves(Model.from_hf(VARIANTS[name].config, name).spec).items():
        vector = path.endswith(("norm", "bias", "_attention", "_mlp", "sinks", "correction"))
        assert leaf.decays != vector, path


def test_random_weights_depend_on_the_seed_and_not_on_the_mesh() -> None:
    spec = Model.from_hf(TINY, "tiny").spec
    one, eight = mesh.make(ModelKeys(), jax.devices()[:1]), mesh.make(ModelKeys(ici_tensor_parallelism=2))
    here = param.initialise(spec, jax.random.key(0), jnp.float32, one)
    there = param.initialise(spec, jax.random.key(0), jnp.float32, eight)
    other = param.initialise(spec, jax.random.key(1), jnp.float32, one)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), jax.device_get(here), jax.device_get(there))
    assert np.std(here["embed"]) == pytest.approx(0.02, rel=0.05)
    assert not np.array_equal(here["embed"], other["embed"])
    assert np.all(np.asarray(here["layers"]["0"]["before_attention"]) == 1)
