"""Base class and field types of all sections: strict numbers, no unknown keys, unions by key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    NamedTuple,
    TypeVar,
    cast,
    get_args,
    get_origin,
)

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core.core_schema import (
    CoreSchema,
    no_info_after_validator_function,
    no_info_before_validator_function,
)

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

_T = TypeVar("_T")

# Strict, since pydantic would otherwise read `true` as 1 and "5" as 5.
Int = Annotated[int, Field(strict=True)]
Float = Annotated[float, Field(strict=True)]
Size = tuple[Annotated[Int, Field(ge=1)], Annotated[Int, Field(ge=1)]]
Positive = Annotated[Float, Field(gt=0)]
Share = Annotated[Float, Field(ge=0, le=1)]
Decay = Annotated[Float, Field(ge=0, lt=1)]


def _each_once(value: tuple[_T, ...]) -> tuple[_T, ...]:
    twice = sorted({str(item) for item in value if value.count(item) > 1})
    if twice:
        raise ValueError(f"has {', '.join(twice)} twice, got {[*value]}; give each once")
    return value


class _Distinct:
    def __get_pydantic_core_schema__(
        self, source: object, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return no_info_after_validator_function(_each_once, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {**handler(schema), "uniqueItems": True}


Distinct = _Distinct()
"""For the annotation of a tuple in which nothing may stand twice."""


def as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Several = BeforeValidator(as_list)
"""For the annotation of a list of texts, or of sections with a `shorthand`: a text alone is a list
of one."""


class Section(BaseModel):
    """Base class of all sections: unknown keys are errors, instances are immutable."""

    shorthand: ClassVar[str | None] = None
    """The field that a text in place of the whole section stands for."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    # A validator of the section and not part of `Int`, from where it would keep the bounds of the
    # number out of the JSON schema; nor of the fields, where a union's `kind` may have none.
    @model_validator(mode="before")
    @classmethod
    def _normalized(cls, data: object) -> object:
        """2e3 is a float to YAML and a whole number to its writer, as 2.0 is to JSON's schema; a
        section whose fields are all commented out is null to YAML and stands for its default."""
        data = cls.spelled_out(data)
        if not isinstance(data, dict):
            return data
        return {
            name: int(value) if isinstance(value, float) and _is_whole(value) else value
            for name, value in cast("dict[str, object]", data).items()
            if value is not None or not _null_is_default(cls.model_fields.get(name))
        }

    @classmethod
    def spelled_out(cls, data: object) -> object:
        """The mapping that a text stands for; `data` itself if it is no text."""
        return {cls.shorthand: data} if cls.shorthand and isinstance(data, str) else data


def _is_whole(value: float) -> bool:
    # 1e300 is exact as an integer too, but no setting that counts something means it.
    return value.is_integer() and abs(value) < 2**63


def _null_is_default(field: FieldInfo | None) -> bool:
    if field is None or field.is_required() or NoneType in get_args(field.annotation):
        return False
    return bool(sections_of(field.annotation))


def sections_of(annotation: Any) -> list[type[Section]]:
    """The sections that a field may hold: itself, the members of a union, the items of a list."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_of(part)]


def is_section(field: FieldInfo) -> bool:
    """Whether a field holds one section, not a list of them."""
    return bool(sections_of(field.annotation)) and get_origin(field.annotation) is not tuple


def shorthand_of(field: FieldInfo | None) -> type[Section] | None:
    """The section that a text in the list of sections `field` stands for; None if it is none."""
    sections = sections_of(field.annotation) if field is not None else []
    return next((section for section in sections if section.shorthand), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Keyed:
    """Lets a union's `key` be left out for `default` and, with `text`, be all that is given."""

    key: str
    default: str
    text: bool = False

    def complete(self, value: object) -> object:
        """`value` with the key in it, if it is a mapping (or a text that may stand for one)."""
        if self.text and isinstance(value, str):
            return {self.key: value}
        if isinstance(value, dict) and self.key not in value:
            return {self.key: self.default, **cast("dict[str, object]", value)}
        return cast("object", value)

    def __get_pydantic_core_schema__(
        self, source: object, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return no_info_before_validator_function(self.complete, handler(source))


class Members(NamedTuple):
    """A union of sections: which section each value of its key stands for."""

    keyed: Keyed
    sections: Mapping[str, type[Section]]


def members_of(field: FieldInfo | None) -> Members | None:
    """The union that a field holds; None if it holds none."""
    keyed = next((k for k in field.metadata if isinstance(k, Keyed)), None) if field else None
    if field is None or keyed is None:
        return None
    sections = sections_of(field.annotation)
    return Members(keyed, {s.model_fields[keyed.key].default: s for s in sections})
