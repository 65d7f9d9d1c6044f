"""Fields of a config.json: what is wrong is named with its value, whatever family reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from family_variants import VARIANTS

from luthier.errors import UserError
from luthier.model.model import Model
from luthier.model.reading import FULL, SLIDING, Fields

Path = tuple[str, ...]
WRONG = ("x", -1, 1.5, [], {}, None)
OUTER = ("tie_word_embeddings", "max_position_embeddings")  # read of the whole config.json, ignored in its objects


@pytest.mark.parametrize(
    ("read", "config", "words"),
    [
        (lambda f: f.size("a"), {"a": 0}, ["a=0", "positive integer"]),
        (lambda f: f.size("a"), {"a": 2.5}, ["a=2.5", "positive integer"]),
        (lambda f: f.size("a"), {"a": True}, ["a=true", "positive integer"]),
        (lambda f: f.count("a", 1), {"a": -1}, ["a=-1", "integer of 0 or more"]),
        (lambda f: f.count("a", 1), {"a": False}, ["a=false", "integer of 0 or more"]),
        (lambda f: f.some("a"), {"a": -1}, ["a=-1", "integer of 0 or more"]),
        (lambda f: f.some("a"), {"a": []}, ["a=[]", "integer of 0 or more"]),
        (lambda f: f.number("a"), {"a": "1"}, ['a="1"', "positive number"]),
        (lambda f: f.bound("a"), {"a": 0}, ["a=0", "positive number"]),
        (lambda f: f.number("a"), {"a": float("inf")}, ["a=Infinity", "positive number"]),
        (lambda f: f.factor("a"), {"a": ""}, ['a=""', "positive number"]),
        (lambda f: f.integers("a", ()), {"a": [1, -1]}, ["a=[1, -1]", "list of integers"]),
        (lambda f: f.integers("a", (), 3), {"a": [1, 0]}, ["a=[1, 0]", "list of 3 integers"]),
        (lambda f: f.numbers("a"), {"a": [1, 0]}, ["a=[1, 0]", "list of positive numbers"]),
        (lambda f: f.group("a"), {"a": [1]}, ["a=[1]", "object"]),
        (lambda f: f.text_config(("x",)), {"text_config": [1]}, ["text_config=[1]", "object"]),
        (lambda f: f.text_config(("x", "y")), {"text_config": {"model_type": "z"}}, ["text_config", "`z`", "x and y"]),
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
    assert (fields.size("a", 3), fields.count("a", 0), fields.number("a", 0.5), fields.flag("a", True)) == (
        3,
        0,
        0.5,
        True,
    )
    assert (fields.some("a"), fields.bound("a"), fields.factor("a"), fields.group("a")) == (None, None, None, {})
    assert fields.integers("a", (1, 2), 2) == (1, 2)
    for read in (fields.size, fields.number, fields.numbers):
        with pytest.raises(KeyError):
            read("a")


def test_0_may_stand_for_what_is_left_out() -> None:
    fields = Fields({"a": 0})
    assert (fields.some("a"), fields.factor("a"), fields.count("a", 3)) == (None, None, 0)


class Watched(dict):
    """Fields that note which of them are read."""

    read: set[str]

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)


def names_read(monkeypatch: pytest.MonkeyPatch, config: Mapping[str, Any]) -> set[str]:
    """Return the names that are read of a ``config.json``, those in objects of its own too."""
    read: set[str] = set()
    plain = Fields.__init__

    def watched(fields: Fields, config: Mapping[str, Any]) -> None:
        plain(fields, config)
        fields.config = Watched(fields.config)
        fields.config.read = read

    with monkeypatch.context() as patch:
        patch.setattr(Fields, "__init__", watched)
        Model.from_hf(config, "x")
    return read


def objects(config: Mapping[str, Any], read: set[str], place: Path = ()) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Yield the objects of a ``config.json`` that are read, itself too, and where they stand in it."""
    yield place, config
    for name, value in config.items():
        if isinstance(value, Mapping) and name in read:
            yield from objects(value, read, (*place, name))


def changed(config: Mapping[str, Any], place: Path, value: Any) -> dict[str, Any]:
    name, *rest = place
    return {**config, name: changed(config[name], tuple(rest), value) if rest else value}


def refusal(config: Mapping[str, Any]) -> str | None:
    """Return why a ``config.json`` is refused, None where it gives a model."""
    try:
        Model.from_hf(config, "x")
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", VARIANTS)
def test_a_wrong_value_of_any_field_is_refused_or_leaves_a_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = VARIANTS[name].config
    read = names_read(monkeypatch, config)
    for place, fields in objects(config, read):
        for field in sorted(read):
            for value in WRONG:
                said = refusal(changed(config, (*place, field), value))
                if said is not None:
                    assert field in said.replace("model type", "model_type"), (place, field, value, said)
                elif fields.get(field) is not None and not (place and field in OUTER):
                    assert value != "x", (place, field)
