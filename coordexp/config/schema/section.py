"""Base of every typed section: strict types, frozen, no unknown keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """A mapping of the run configuration. Unknown keys and silent conversions are errors.

    null in place of a mapping inside it means that the mapping is left out: so a file takes back what the file it
    extends says.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_mapping_is_left_out(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        return {key: value for key, value in data.items() if value is not None or not cls._is_mapping(key)}

    @classmethod
    def _is_mapping(cls, key: Any) -> bool:
        field = cls.model_fields.get(key) if isinstance(key, str) else None
        annotation = None if field is None else field.annotation
        return isinstance(annotation, type) and issubclass(annotation, Section)
