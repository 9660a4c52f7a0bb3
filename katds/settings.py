"""The building block of recipes. A stop rule or objective declares its settings next to its algorithm, with this.

Nothing but pydantic: `katds.core` may import it.
"""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

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
