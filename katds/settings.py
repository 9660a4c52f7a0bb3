"""The building block of recipes. A stop rule or objective declares its settings next to its algorithm, with this.

Nothing but pydantic: `katds.core` may import it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from operator import or_
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, SerializationInfo, TypeAdapter, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

NUMBERS = {int, float, type(None)}


def leaf_types(annotation: Any) -> set[Any]:
    """The types that a value may have: `Annotated[int, ...] | None` gives {int, NoneType}; `tuple[int]`, {tuple}."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return leaf_types(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return set().union(*map(leaf_types, get_args(annotation)))
    return {origin or annotation}


Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Nucleus = Annotated[float, Field(gt=0, le=1)]
Moment = Annotated[float, Field(ge=0, lt=1)]
Scale = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """Frozen; an unknown key is an error. Docstrings and descriptions of its subclasses are the text of `--help`."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_value_as_number(cls, data: Any) -> Any:
        for name, info in cls.model_fields.items():
            # pydantic would read `window: yes` as 1.
            if isinstance(data, dict) and isinstance(data.get(name), bool) and leaf_types(info.annotation) <= NUMBERS:
                raise PydanticCustomError("truth_value", "a truth value is not a number", {"field": name})
        return data


class ByKind:
    """Annotation of a setting that holds one of several sections, told apart by their `kind`.

    The sections are asked for at each use and not once at import: a kind that is registered later, from outside the package,
    is known to recipes, messages and `--help` as well.
    """

    def __init__(self, sections: Callable[[], Mapping[str, type[Section]]]) -> None:
        self._sections = sections

    def sections(self) -> dict[str, type[Section]]:
        """By kind."""
        found = dict(self._sections())
        for kind, section in found.items():
            told = section.model_fields["kind"].default
            assert told == kind, f"{section.__name__} is registered as {kind!r} but its kind is {told!r}"
        return found

    def _read(self, value: Any) -> Any:
        union: Any = Annotated[reduce(or_, self.sections().values()), Field(discriminator="kind")]
        return TypeAdapter(union).validate_python(value)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        def dump(section: Section, info: SerializationInfo) -> dict[str, Any]:
            return section.model_dump(mode=info.mode, exclude_defaults=info.exclude_defaults)

        write = core_schema.plain_serializer_function_ser_schema(dump, info_arg=True)
        return core_schema.no_info_plain_validator_function(self._read, serialization=write)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"kinds": list(self.sections())}
