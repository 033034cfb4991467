"""A section of the settings, and how a setting's class follows from where the setting stands."""

import inspect
from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any, ClassVar, TypeAlias, TypeGuard, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticKnownError

T = TypeVar("T")


class SettingClass(Enum):
    """What a run's setting decides, and so what a change of it between two starts means."""

    IDENTITY = "identity"
    EXPOSURE = "exposure"
    OPERATION = "operation"


# Around the type of a setting that decides the weights and what leaves a client too: `bottom_layers: Exposure[int]`.
Exposure: TypeAlias = Annotated[T, SettingClass.EXPOSURE]


class Section(BaseModel):
    """A frozen group of settings; the sentence under each field is its documentation (docs/configuration.md)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)

    decides: ClassVar[SettingClass | None] = None
    """The class of all settings that a section declares itself; None for one machine's own."""

    @field_validator("*", mode="before")
    @classmethod
    def _guesses_nothing(cls, value: object, info: ValidationInfo) -> object:
        """Take no `true`, "3" or 3.0 for a whole number; pydantic's own strict mode refuses lists and paths too."""
        wanted = cls.model_fields[str(info.field_name)].annotation
        if wanted is int and type(value) is not int:
            raise PydanticKnownError("int_type")
        if wanted is float and type(value) not in (int, float):
            raise PydanticKnownError("float_type")
        if wanted is bool and type(value) is not bool:
            raise PydanticKnownError("bool_type")
        return value


def is_section(annotation: Any) -> TypeGuard[type[Section]]:
    """Tell a section from a setting by the type of a tree's field."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def classes_of(section: type[Section], name: str) -> tuple[SettingClass, ...]:
    """Return the classes of a setting: that of where it stands, and exposure where it is marked so."""
    stands = next(each for each in section.__mro__ if name in inspect.get_annotations(each))
    marks = {mark for mark in section.model_fields[name].metadata if isinstance(mark, SettingClass)}
    if issubclass(stands, Section) and stands.decides is not None:
        marks.add(stands.decides)
    return tuple(sorted(marks, key=list(SettingClass).index))


def of_class(section: type[Section], values: Mapping[str, Any], wanted: SettingClass) -> dict[str, Any]:
    """Return of a section's plain values the settings of one class, sections that have none left out."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        if is_section(field.annotation):
            if inner := of_class(field.annotation, values[name], wanted):
                found[name] = inner
        elif wanted in classes_of(section, name):
            found[name] = values[name]
    return found
