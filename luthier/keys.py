"""What a key is, and how a configuration is read from recipe, environment and command line.

A configuration is resolved once, from defaults, then the recipe, then ``LUTHIER_KEY`` environment variables, then the
command line, and is frozen. The keys themselves stand in ``config``.

Left out on purpose: anything that needs jax, a model or the network to check. This module must import in well under a
second, so that a typo is refused at once.
"""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from luthier.errors import UserError, did_you_mean


def key(default: Any, doc: str, *aliases: str, saved: bool = True, **constraints: Any) -> Any:
    """Declare a key: its default, its meaning for the table of keys, and other names that are accepted for it.

    One that is not ``saved`` says where a command runs, not what it does.
    """
    return Field(default, description=doc, json_schema_extra={"aliases": list(aliases), "saved": saved}, **constraints)


class Keys(BaseModel):
    """What all groups of keys share: frozen, unknown keys refused, aliases accepted."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), validate_default=True, allow_inf_nan=False
    )


K = TypeVar("K", bound=Keys)


class Row(NamedTuple):
    """A key as the table of keys shows it."""

    name: str
    type: str
    default: str
    meaning: str


def read(model: type[K], arguments: Sequence[str], environment: Mapping[str, str]) -> K:
    """Return the frozen configuration ``model`` from a command's arguments, ``[recipe.yml] key=value ...``.

    Raises UserError naming the first key that is unknown or whose value does not fit, and where it was set.
    """
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for place, name, value in _settings(arguments, environment):
        field = _field(model, name, place)
        if place.startswith("recipe ") and places.get(field) == place:
            raise UserError(f"key `{field}` stands twice ({place}). Keep one.")
        values[field] = _parse(model.model_fields[field].annotation, value)
        places[field] = place
    try:
        return model(**values)
    except ValidationError as error:
        raise UserError(_explain(model, error, places)) from None


def save(config: Keys, path: Path) -> None:
    """Write every key as resolved, as a recipe that repeats the run elsewhere too."""
    path.write_text(yaml.safe_dump(saved(config), sort_keys=False, allow_unicode=True), encoding="utf-8")


def saved(config: Keys, *, defaults: bool = True) -> dict[str, Any]:
    """Return the keys as resolved, or those alone that are not at their ``defaults``.

    Secrets, which have no repr, are left out, and so is what is not saved.
    """
    fields = type(config).model_fields.items()
    others = {name for name, field in fields if not (field.repr and _is_saved(field))}
    return config.model_dump(exclude=others, exclude_defaults=not defaults)


def table(model: type[Keys]) -> dict[str, list[Row]]:
    """Return the keys of ``model`` by group, each group named by what it is about.

    A key that a command declares anew, with another default, stays in the group that declared it first.
    """
    groups: dict[str, list[Row]] = {}
    listed: set[str] = set()
    for group in reversed(model.__mro__):
        declared = inspect.get_annotations(group)
        names = [name for name in declared if name in model.model_fields and name not in listed]
        listed |= set(names)
        if names:
            title = (group.__doc__ or group.__name__).splitlines()[0]
            groups[title] = [_row(name, model.model_fields[name]) for name in names]
    return groups


def _row(name: str, field: Any) -> Row:
    also = f" Also `{'`, `'.join(_aliases(field))}`." if _aliases(field) else ""
    return Row(name, _type_name(field.annotation), _yaml(field.default), (field.description or "") + also)


def _settings(arguments: Sequence[str], environment: Mapping[str, str]) -> list[tuple[str, str, Any]]:
    """Return (place, name, value) of everything that was set, the weakest first."""
    recipes = [argument for argument in arguments if "=" not in argument]
    if len(recipes) > 1:
        raise UserError(f"more than one recipe: {' '.join(recipes)}. Give one, then key=value pairs.")
    settings = [(f"recipe {recipe}", name, value) for recipe in recipes for name, value in _read_recipe(recipe)]
    for variable, value in sorted(environment.items()):
        if variable.startswith("LUTHIER_"):
            name = variable.removeprefix("LUTHIER_").lower()
            settings.append((f"environment variable {variable}", name, value))
    pairs = [argument.partition("=") for argument in arguments if "=" in argument]
    settings += [("command line", name.removeprefix("--"), value) for name, _, value in pairs]
    return settings


def _read_recipe(name: str) -> list[tuple[str, Any]]:
    """Return the lines of a recipe: scalars as they are written, so that they read as on the command line."""
    if name.startswith("-"):
        raise UserError(f"unknown option {name}. Keys are given as key=value; `luthier sft --help` shows how.")
    try:
        loader = yaml.SafeLoader(Path(name).read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is None:
            return []
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"recipe {name}: expected `key: value` lines.")
        return [
            (
                str(key.value),
                value.value if isinstance(value, yaml.ScalarNode) else loader.construct_object(value, True),
            )
            for key, value in node.value
        ]
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"recipe {name}: {reason}. Give a YAML file, or keys as key=value.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {name}: not valid YAML: {error}") from None


def _field(model: type[Keys], name: str, place: str) -> str:
    """Return the key that ``name`` stands for, through aliases; raise with a suggestion when there is none."""
    known = {}
    for field, info in model.model_fields.items():
        known |= dict.fromkeys([field, *_aliases(info)], field)
    if name not in known:
        hint = did_you_mean(name, list(known)) or " `luthier keys` lists them all."
        raise UserError(f"unknown key `{name}` ({place}).{hint}")
    return known[name]


def _parse(annotation: Any, value: Any) -> Any:
    """Read text as JSON or YAML where the key takes a list or a mapping; pydantic reads text, numbers and switches.

    Text that is neither is a list of one, so that one item needs no brackets.
    """
    if not isinstance(value, str):
        return value
    choices = get_args(annotation) if _is_union(annotation) else (annotation,)
    if type(None) in choices and value.strip().lower() in ("", "none", "null", "~"):
        return None
    kinds = [get_origin(choice) for choice in choices]
    wanted = tuple(kind for kind in (list, dict) if kind in kinds)
    if not wanted:
        return value
    # YAML reads nearly all JSON, but 1e-5 as text.
    for read, failure in ((json.loads, ValueError), (yaml.safe_load, yaml.YAMLError)):
        try:
            parsed = read(value)
        except failure:
            continue
        if isinstance(parsed, wanted):
            return parsed
    one_item = list in wanted and value.strip() and value.strip()[0] not in "[{"
    return [value] if one_item else value


def _explain(model: type[Keys], error: ValidationError, places: Mapping[str, str]) -> str:
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return message + "."
    row = _row(str(first["loc"][0]), model.model_fields[str(first["loc"][0])])
    message = message[0].lower() + message[1:]
    place = places.get(row.name, "default")
    value = _yaml(first["input"]) if model.model_fields[row.name].repr else "..."
    return f"{row.name}={value} ({place}): {message}. It takes {row.type}: {row.meaning}"


def _aliases(field: Any) -> list[str]:
    return (field.json_schema_extra or {}).get("aliases", [])


def _is_saved(field: Any) -> bool:
    return (field.json_schema_extra or {}).get("saved", True)


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" if choice else "empty" for choice in get_args(annotation))
    if _is_union(annotation):
        return " or ".join(_type_name(choice) for choice in get_args(annotation) if choice is not type(None))
    if get_origin(annotation) is Annotated:
        return _type_name(get_args(annotation)[0])
    names = {int: "integer", float: "number", str: "text", bool: "true or false", list: "list", dict: "mapping"}
    return names[get_origin(annotation) or annotation]


def _yaml(value: Any) -> str:
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")
