"""Fields of a config.json: what is wrong is named with its value."""

import pytest

from luthier.errors import UserError
from luthier.model.reading import FULL, SLIDING, Fields


@pytest.mark.parametrize(
    ("read", "config", "words"),
    [
        (lambda f: f.size("a"), {"a": 0}, ["a=0", "positive integer"]),
        (lambda f: f.size("a"), {"a": 2.5}, ["a=2.5", "positive integer"]),
        (lambda f: f.size("a"), {"a": True}, ["a=true", "positive integer"]),
        (lambda f: f.some("a"), {"a": -1}, ["a=-1", "positive integer"]),
        (lambda f: f.number("a"), {"a": "1"}, ['a="1"', "positive number"]),
        (lambda f: f.bound("a"), {"a": 0}, ["a=0", "positive number"]),
        (lambda f: f.flag("a"), {"a": "yes"}, ['a="yes"', "true or false"]),
        (lambda f: f.choice("a", ("silu",), "silu"), {"a": "relu"}, ["a=`relu`", "silu"]),
        (
            lambda f: f.heads(),
            {"hidden_size": 10, "num_attention_heads": 4},
            ["hidden_size=10", "num_attention_heads=4"],
        ),
        (lambda f: f.heads(), {"hidden_size": 9, "num_attention_heads": 3}, ["head_dim=3", "odd"]),
        (lambda f: f.layer_types([FULL]), {"num_hidden_layers": 2}, ["layer_types", "2"]),
        (lambda f: f.layer_types([FULL]), {"num_hidden_layers": 1, "layer_types": ["linear"]}, ["linear", SLIDING]),
    ],
)
def test_what_is_wrong_is_named(read, config, words) -> None:
    with pytest.raises(UserError) as caught:
        read(Fields(config))
    assert all(word in str(caught.value) for word in ["config.json", *words]), caught.value


def test_what_is_left_out_or_null_has_its_default() -> None:
    fields = Fields({"a": None})
    assert (fields.size("a", 3), fields.number("a", 0.5), fields.flag("a", True)) == (3, 0.5, True)
    assert (fields.some("a"), fields.bound("a"), fields.get("a", 7)) == (None, None, 7)
    with pytest.raises(KeyError):
        fields.size("a")
