"""Rotary frequencies and factors against Transformers', and where they are read from in a ``config.json``."""

from __future__ import annotations

import math

import numpy as np
import pytest

from luthier.errors import UserError
from luthier.model.rope import ROPE_TYPES, Rope, inverse_frequencies

HEAD = 16
SHORT, LONG = [1.0 + 0.1 * i for i in range(8)], [2.0 + i for i in range(8)]
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
PARAMETERS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": YARN,
    "yarn-mscale": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 8, "beta_slow": 2},
    "yarn-untruncated": YARN | {"truncate": False, "factor": 32.0},
    "yarn-factor": YARN | {"attention_factor": 1.5},
    "yarn-one-pair": YARN | {"beta_fast": 4, "beta_slow": 3.9, "truncate": False},
    "longrope": {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG},
    "longrope-factor": {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "factor": 3.0},
    "longrope-attention": {
        "rope_type": "longrope",
        "short_factor": SHORT,
        "long_factor": LONG,
        "attention_factor": 1.2,
        "original_max_position_embeddings": 64,
    },
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.25},
}
BESIDE = {"max_position_embeddings": 512, "original_max_position_embeddings": 64, "rope_theta": 5000.0}


def config_of(name: str) -> dict:
    """Return a flat config; only longrope has its original length outside of the settings."""
    beside = BESIDE if name.startswith("longrope") else BESIDE | {"original_max_position_embeddings": None}
    return beside | {"rope_parameters": PARAMETERS[name]}


def theirs(config: dict, seq_len: int | None = None) -> tuple[np.ndarray, float]:
    """Return Transformers' inverse frequencies and attention factor."""
    pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    given = {name: value for name, value in config.items() if value is not None}
    given["rope_parameters"] = dict(given["rope_parameters"])
    twin = LlamaConfig(hidden_size=4 * HEAD, num_attention_heads=4, head_dim=HEAD, **given)
    frequencies, factor = ROPE_INIT_FUNCTIONS[twin.rope_parameters["rope_type"]](twin, None, seq_len=seq_len)
    return frequencies.numpy(), factor


@pytest.mark.parametrize("name", [name for name in PARAMETERS if name != "default"])
def test_every_type_equals_transformers(name: str) -> None:
    rope = Rope.from_hf(config_of(name))
    hash(rope)
    for seq_len in (None, 65):
        frequencies, factor = theirs(config_of(name), seq_len)
        ours = inverse_frequencies(rope, HEAD, long=seq_len is not None)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, frequencies, rtol=2e-6)
        assert rope.table_factor == pytest.approx(factor, rel=1e-6)


@pytest.mark.parametrize("name", ["linear", "llama3", "yarn"])
def test_a_part_of_the_head_has_frequencies_of_its_own_size(name: str) -> None:
    config = config_of(name) | {"partial_rotary_factor": 0.5}
    rope = Rope.from_hf(config)
    assert rope.rotary_dim(HEAD) == 8
    np.testing.assert_allclose(inverse_frequencies(rope, HEAD), theirs(config)[0], rtol=2e-6)


def test_default_frequencies_are_powers_of_the_base() -> None:
    frequencies = inverse_frequencies(Rope(rope_theta=100.0), 8)
    np.testing.assert_allclose(frequencies, [1, 100**-0.25, 100**-0.5, 100**-0.75], rtol=1e-6)


def test_the_types_differ() -> None:
    """The parities above would hold for types that all came out as the default."""
    first_of = {Rope.from_hf(config_of(name)).rope_type: name for name in reversed(PARAMETERS)}
    assert set(first_of) == set(ROPE_TYPES)
    seen = {inverse_frequencies(Rope.from_hf(config_of(name)), HEAD).tobytes() for name in first_of.values()}
    assert len(seen) == len(ROPE_TYPES)


@pytest.mark.parametrize("name", PARAMETERS)
def test_settings_are_the_same_in_both_places(name: str) -> None:
    new = config_of(name)
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    settings = {key: value for key, value in PARAMETERS[name].items() if key != "rope_type"}
    old["rope_scaling"] = settings | {"type": PARAMETERS[name]["rope_type"]}
    assert Rope.from_hf(old) == Rope.from_hf(new)


@pytest.mark.parametrize("rope_type", ["su", "yarn"])
def test_phi3_calls_longrope_by_other_names(rope_type: str) -> None:
    config = config_of("longrope")
    renamed = config | {"rope_parameters": None, "rope_scaling": PARAMETERS["longrope"] | {"rope_type": rope_type}}
    assert Rope.from_hf(renamed) == Rope.from_hf(config)


def test_each_kind_of_layer_has_its_own_settings() -> None:
    linear = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    parameters = {"full_attention": linear, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    old = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    for config in ({"rope_parameters": parameters}, old):
        assert Rope.from_hf(config, "full_attention") == Rope(1e6, "linear", factor=8.0)
        assert Rope.from_hf(config, "sliding_attention") == Rope(1e4)


def test_without_a_local_base_layers_that_slide_share_the_base_and_not_the_scaling() -> None:
    config = {"rope_theta": 5e5, "rope_scaling": YARN}
    assert Rope.from_hf(config, "sliding_attention") == Rope(5e5)
    assert Rope.from_hf(config, "full_attention").rope_type == "yarn"


def test_the_base_of_last_resort() -> None:
    assert Rope.from_hf({}).rope_theta == 10_000.0
    assert Rope.from_hf({}, theta=1e6).rope_theta == 1e6
    assert Rope.from_hf({"rope_theta": 5.0}, theta=1e6).rope_theta == 5.0


def test_score_factor_is_the_square_of_the_stretch_by_all_dimensions() -> None:
    config = config_of("yarn-mscale")
    assert Rope.from_hf(config).score_factor == pytest.approx((1 + 0.1 * 0.7 * math.log(8)) ** 2)
    assert Rope.from_hf(config_of("yarn")).score_factor == 1.0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_scaling": {"type": "dynamic"}}, "`dynamic` is not supported for model type `some`. Supported: default"),
        ({"rope_theta": -1}, "rope_theta=-1 is not a positive number"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, 'factor="2" is not a positive number'),
        ({"rope_scaling": YARN | {"truncate": 1}}, "truncate=1 is not true or false"),
        (
            {"rope_scaling": PARAMETERS["longrope"] | {"long_factor": [1.0, "2"]}},
            "long_factor=.* is not a list of positive",
        ),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters are those of full_attention, .* kind `all`"),
    ],
)
def test_what_cannot_be_read_is_refused(config: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Rope.from_hf({"model_type": "some"} | config)


@pytest.mark.parametrize("rope_type", ["linear", "yarn"])
def test_a_missing_factor_is_named(rope_type: str) -> None:
    with pytest.raises(KeyError, match="factor"):
        Rope.from_hf({"rope_scaling": {"type": rope_type}})


def test_what_does_not_fit_the_head_is_refused() -> None:
    with pytest.raises(UserError, match="short_factor has 8 numbers, heads have 4 turned pairs"):
        inverse_frequencies(Rope.from_hf(config_of("longrope")), 8)
    with pytest.raises(UserError, match=r"partial_rotary_factor=0.3 of heads of 10 numbers is 3"):
        inverse_frequencies(Rope(partial_rotary_factor=0.3), 10)
