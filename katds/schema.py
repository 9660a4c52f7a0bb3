"""Walks over the recipe's pydantic schema: flags, error messages and `--help` are all made from it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, NamedTuple, get_args

from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

from katds.settings import Section

Members = dict[str, type[Section]]


class Leaf(NamedTuple):
    """One setting. `kind` is the union member that it belongs to, e.g. "stop.kind kat", or empty."""

    path: str
    info: FieldInfo
    kind: str


def members(info: FieldInfo) -> Members:
    """The sections a field may hold: by kind for a union, under "" for a plain section, none for a leaf."""
    types = get_args(info.annotation) if info.discriminator else (info.annotation,)
    sections = [t for t in types if isinstance(t, type) and issubclass(t, Section)]
    return {str(t.model_fields["kind"].default) if info.discriminator else "": t for t in sections}


@cache
def leaves(section: type[Section], prefix: str = "", kind: str = "") -> tuple[Leaf, ...]:
    """All settings below a section, in order of declaration; a union contributes the settings of every kind."""
    return tuple(_walk(section, prefix, kind))


def _walk(section: type[Section], prefix: str, kind: str) -> Iterator[Leaf]:
    for name, info in section.model_fields.items():
        below = members(info)
        if not below:
            yield Leaf(prefix + name, info, kind)
        for member_kind, member in below.items():
            inner = f"{prefix}{name}.kind {member_kind}" if member_kind else kind
            yield from leaves(member, f"{prefix}{name}.", inner)


def default_kinds(section: type[Section]) -> dict[str, Any]:
    """The kind of every union that has a default, as a nested mapping: {"stop": {"kind": "kat"}, ...}."""
    kinds: dict[str, Any] = {}
    for name, info in section.model_fields.items():
        below = members(info)
        if info.discriminator and not info.is_required():
            kinds[name] = {"kind": info.default.kind}
        elif "" in below and (inner := default_kinds(below[""])):
            kinds[name] = inner
    return kinds


def allowed(info: FieldInfo) -> str:
    """What a setting accepts, in words: "whole number >= 1 or null"."""
    if below := members(info):
        return f"section with kind: {' | '.join(below)}" if info.discriminator else "section of settings"
    annotated: Any = Annotated[(info.annotation, "setting", *info.metadata)]  # one annotation is obligatory
    return _words(TypeAdapter(annotated).json_schema())


def _words(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_words(option) for option in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return " | ".join(map(str, schema.get("enum", [schema.get("const")])))
    if "prefixItems" in schema:
        return f"[{', '.join(_words(item) for item in schema['prefixItems'])}]"
    if isinstance(schema.get("additionalProperties"), dict):
        return f"section with values: {_words(schema['additionalProperties'])}"
    if "pattern" in schema:
        return f"text matching {schema['pattern']}"
    names = {"integer": "whole number", "boolean": "true or false", "object": "section of settings", "string": "text"}
    name = "path" if schema.get("format") == "path" else names.get(schema["type"], schema["type"])
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]:.12g}" for key, sign in signs.items() if key in schema]
    return f"{name} {' and '.join(bounds)}".strip()
