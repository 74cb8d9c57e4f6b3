"""Configuration: frozen keyword-only dataclasses <-> plain mappings <-> YAML, dotted overrides, digests.

A field is a bool, int, float, str, Literal, a tuple of these, any of them `| None`, or such a dataclass: a section.
Under each field stands a string literal that says its unit and effect: `field_docs` reads it, `--help` shows it.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import inspect
import itertools
import json
import math
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import yaml

from pipeline.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ConfigT = TypeVar("ConfigT", bound="DataclassInstance")

_SCALARS: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
_BOOL_WORDS = {"true": True, "1": True, "false": False, "0": False}


class ConfigError(InputError):
    """A configuration that cannot be used. The message names the dotted field, what is wrong, and what would do."""


class MissingFieldsError(ConfigError):
    """Fields without default that nobody gave; `names` are their dotted names."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(names)
        self.names = names

    def __str__(self) -> str:
        return "these fields have no default and must be given: " + ", ".join(self.names)


class Leaf(NamedTuple):
    """A field that is not a section: its dotted name, type, default (dataclasses.MISSING where required) and doc."""

    name: str
    type: Any
    default: Any
    doc: str


def closest(word: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the nearest of the known words, or an empty string when none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def type_name(tp: Any) -> str:
    """What a value of this field type is, in words, e.g. "a whole number or none"."""
    inner = non_optional(tp)
    if inner is not tp:
        return f"{type_name(inner)} or none"
    if typing.get_origin(tp) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(tp)))
    if typing.get_origin(tp) is tuple:
        return "a list of (" + ", ".join("..." if arg is ... else type_name(arg) for arg in typing.get_args(tp)) + ")"
    return "a section" if dataclasses.is_dataclass(tp) else _SCALARS[tp]


def non_optional(tp: Any) -> Any:
    """X of `X | None`, else the type itself."""
    if typing.get_origin(tp) not in (typing.Union, types.UnionType):
        return tp
    inner = [arg for arg in typing.get_args(tp) if arg is not types.NoneType]
    assert len(inner) == 1, f"{tp}: the only union a config field may have is X | None"
    return inner[0]


def _section(tp: Any) -> Any:
    """The dataclass of a section's type (`S` or `S | None`), else None."""
    inner = non_optional(tp)
    return inner if dataclasses.is_dataclass(inner) else None


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _element_types(tp: Any, count: int, where: str) -> list[Any]:
    args = typing.get_args(tp)
    if args[-1] is ...:
        return [args[0]] * count
    if count != len(args):
        raise ConfigError(_at(where, f"wants {len(args)} values, got {count}"))
    return list(args)


def _at(where: str, text: str) -> str:
    return f"{where}: {text}" if where else text


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def parse_value(tp: Any, text: str, where: str = "") -> Any:
    """The value of field type `tp` that a text of the command line means.

    "none" for an optional field; true, false, 1, 0 for a bool; comma-separated for a tuple ("" is the empty one).
    Raises ConfigError when the text means no such value.
    """
    inner, word = non_optional(tp), text.strip().lower()
    if inner is not tp:
        return None if word in ("none", "null") else parse_value(inner, text, where)
    if typing.get_origin(tp) is typing.Literal:
        by_text = {str(choice): choice for choice in typing.get_args(tp)}
        return _convert(tp, by_text.get(text, text), where)
    if typing.get_origin(tp) is tuple:
        items = [item.strip() for item in text.split(",")] if text.strip() else []
        element_types = _element_types(tp, len(items), where)
        return tuple(parse_value(element, item, where) for element, item in zip(element_types, items, strict=True))
    if tp is bool:
        return _convert(tp, _BOOL_WORDS.get(word, text), where)
    value: Any = text
    if tp is int or tp is float:
        with contextlib.suppress(ValueError):
            value = tp(text)
    return _convert(tp, value, where)


def _convert(tp: Any, value: Any, where: str) -> Any:
    """`value` as field type `tp` wants it (list -> tuple, int -> float), else ConfigError."""
    inner = non_optional(tp)
    if inner is not tp:
        return None if value is None else _convert(inner, value, where)
    if typing.get_origin(tp) is typing.Literal:
        return _convert_literal(tp, value, where)
    if typing.get_origin(tp) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(_at(where, f"wants {type_name(tp)}, got {value!r}"))
        element_types = _element_types(tp, len(value), where)
        pairs = zip(element_types, value, strict=True)
        return tuple(_convert(element, item, f"{where}[{i}]") for i, (element, item) in enumerate(pairs))
    if dataclasses.is_dataclass(tp):
        assert isinstance(tp, type)
        return value if isinstance(value, tp) else _construct(tp, partial_dict(tp, value, where), where, None)
    return _convert_scalar(tp, value, where)


def _convert_literal(tp: Any, value: Any, where: str) -> Any:
    choices = typing.get_args(tp)
    # True == 1, so the types are compared as well.
    if any(type(value) is type(choice) and value == choice for choice in choices):
        return value
    raise ConfigError(_at(where, f"wants {type_name(tp)}; got {value!r}{closest(str(value), map(str, choices))}"))


def _convert_scalar(tp: Any, value: Any, where: str) -> Any:
    assert tp in _SCALARS, f"{where}: {tp} is no type for a config field"
    accepted = (int, float) if tp is float else (tp,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and tp is not bool):
        raise ConfigError(_at(where, f"wants {_SCALARS[tp]} ({tp.__name__}), got {value!r}"))
    if tp is float and not math.isfinite(value):
        raise ConfigError(_at(where, f"wants a finite number, got {value!r}"))
    return tp(value)


def to_dict(config: DataclassInstance) -> dict[str, Any]:
    """The configuration as nested plain JSON types, keys in the order of the fields: tuples are lists, and a float
    field holds a float even where an int was given, so that equal configurations have equal digests."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: _plain(_convert(_hints(type(config))[name], value, name)) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return to_dict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def from_dict(cls: type[ConfigT], mapping: Mapping[str, Any], where: str = "") -> ConfigT:
    """The configuration that a nested mapping means; what it leaves out keeps its default.

    A section given in part is laid over the default that its parent has for it; a section without default is built of
    its own defaults. `where` is the dotted place of the mapping, for messages.
    Raises ConfigError: unknown key, wrong type, missing field, or what a dataclass's own checks refuse.
    """
    return _construct(cls, partial_dict(cls, mapping, where), where, None)


def partial_dict(cls: type, mapping: Any, where: str = "") -> dict[str, Any]:
    """A nested mapping for `cls`, perhaps with fields left out, its keys and types checked and its values converted."""
    if not isinstance(mapping, Mapping):
        raise ConfigError(_at(where, f"wants a mapping of fields, got {mapping!r}"))
    hints = {field.name: _hints(cls)[field.name] for field in dataclasses.fields(cls)}
    checked: dict[str, Any] = {}
    for key, value in mapping.items():
        if key not in hints:
            raise ConfigError(_at(where, f"unknown key {str(key)!r}{closest(str(key), hints)}"))
        section = _section(hints[key])
        if section is not None and isinstance(value, section):
            value = to_dict(value)
        nested = section is not None and isinstance(value, Mapping)
        place = _join(where, key)
        checked[key] = partial_dict(section, value, place) if nested else _convert(hints[key], value, place)
    return checked


def _construct(cls: type[ConfigT], checked: Mapping[str, Any], where: str, base: ConfigT | None) -> ConfigT:
    """Build `cls` from a checked mapping, over `base` where there is one."""
    values: dict[str, Any] = {}
    missing: list[str] = []
    for field in dataclasses.fields(cls):
        place = _join(where, field.name)
        section = _section(_hints(cls)[field.name])
        default = _default(field) if base is None else getattr(base, field.name)
        given = checked.get(field.name, MISSING)
        try:
            if section is not None and isinstance(given, Mapping):
                under = default if dataclasses.is_dataclass(default) else None
                values[field.name] = _construct(section, given, place, typing.cast(Any, under))
            elif section is not None and given is MISSING and default is MISSING:
                values[field.name] = _construct(section, {}, place, None)
            elif given is MISSING and default is MISSING:
                missing.append(place)
            else:
                values[field.name] = default if given is MISSING else given
        except MissingFieldsError as error:
            missing.extend(error.names)
    if missing:
        raise MissingFieldsError(missing)
    try:
        return cls(**values)
    except (InputError, ValueError) as error:
        # ValueError too: the dataclasses of pipeline.gan check themselves and know nothing of ours.
        raise ConfigError(_at(where, str(error))) from error


def override(config: ConfigT, overrides: Mapping[str, Any]) -> ConfigT:
    """The configuration with some fields changed, named by dotted names such as "train.total_kimg".

    A value is a Python value or a text that `parse_value` reads by the field's type. Raises ConfigError.
    """
    return _construct(type(config), nest(type(config), overrides), "", config)


def nest(cls: type, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted overrides as a checked nested mapping, later ones over earlier ones (see `override`, `partial_dict`)."""
    nested: dict[str, Any] = {}
    for name, value in overrides.items():
        tp = _type_at(cls, name)
        parsed = parse_value(tp, value, name) if isinstance(value, str) and _section(tp) is None else value
        *sections, last = name.split(".")
        layer: dict[str, Any] = {last: parsed}
        for section in reversed(sections):
            layer = {section: layer}
        nested = merge(nested, partial_dict(cls, layer))
    return nested


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Two checked nested mappings as one; where both say something, `over` wins."""
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _type_at(cls: type, dotted: str) -> Any:
    tp: Any = cls
    for name in dotted.split("."):
        section = _section(tp)
        if section is None or name not in _hints(section):
            raise ConfigError(f"unknown key {dotted!r}{closest(dotted, (leaf.name for leaf in leaves(cls)))}")
        tp = _hints(section)[name]
    return tp


_LIST_TAG = "tag:yaml.org,2002:seq"
_SCIENTIFIC = re.compile(r"^[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """Safe loading that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Safe dumping with lists on one line."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - the signature is PyYAML's
        return True


# YAML 1.1 takes 2e-4 for a text. Both sides must know better, or a text that looks so would come back as a float.
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _SCIENTIFIC, list("-+.0123456789"))
_Dumper.add_representer(list, lambda dumper, items: dumper.represent_sequence(_LIST_TAG, items, flow_style=True))


def to_yaml(config: DataclassInstance) -> str:
    """The configuration as YAML in ASCII, keys in the order of the fields; `from_yaml` reads an equal one back."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=math.inf)


def from_yaml(cls: type[ConfigT], text: str, source: str = "") -> ConfigT:
    """The configuration that a YAML text means (see `from_dict`). `source` is where the text came from, for messages.

    Raises ConfigError, for what is no YAML as well.
    """
    mapping = mapping_from_yaml(text, source)
    try:
        return from_dict(cls, mapping)
    except ConfigError as error:
        raise ConfigError(_at(source, str(error))) from error


def mapping_from_yaml(text: str, source: str = "") -> dict[str, Any]:
    """The mapping a YAML text holds, not checked against any dataclass; an empty text is an empty mapping."""
    try:
        loaded = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(_at(source, f"is not YAML: {' '.join(str(error).split())}")) from error
    if not isinstance(loaded, dict | None):
        raise ConfigError(_at(source, f"wants a mapping of fields, got {loaded!r}"))
    return loaded or {}


def canonical_json(mapping: Mapping[str, Any]) -> bytes:
    """JSON with sorted keys, no spaces, ASCII, floats by repr: equal mappings give equal bytes."""
    return json.dumps(mapping, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def digest(config: DataclassInstance | Mapping[str, Any]) -> str:
    """sha256 in hex (64 characters) of the canonical JSON of a configuration or of a plain mapping."""
    mapping = config if isinstance(config, Mapping) else to_dict(config)
    return hashlib.sha256(canonical_json(mapping)).hexdigest()


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """Field name -> the string literal under it in the class's source, on one line; inherited fields too."""
    docs: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if dataclasses.is_dataclass(owner):
            docs.update(_own_docs(owner))
    return docs


def _own_docs(cls: type) -> dict[str, str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    assert isinstance(tree.body[0], ast.ClassDef)
    body = tree.body[0].body
    docs: dict[str, str] = {}
    for field, under in itertools.pairwise(body):
        is_text = isinstance(under, ast.Expr) and isinstance(under.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
            docs[field.target.id] = " ".join(str(typing.cast(Any, under).value.value).split())
    return docs


def leaves(cls: type, where: str = "", base: Any = None) -> Iterator[Leaf]:
    """Every field that is not a section, depth first in the order of the fields, with the default that holds there.

    Names begin with `where`; the defaults are those of `base`, an instance, where there is one.
    """
    for field in dataclasses.fields(cls):
        tp = _hints(cls)[field.name]
        default = _default(field) if base is None else getattr(base, field.name)
        place = _join(where, field.name)
        if _section(tp) is None:
            yield Leaf(place, tp, default, field_docs(cls).get(field.name, ""))
        else:
            yield from leaves(_section(tp), place, default if dataclasses.is_dataclass(default) else None)
