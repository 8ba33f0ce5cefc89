"""The form of an answer, and the two settings that name it."""

from __future__ import annotations

from typing import Literal

from coordexp.config.schema.prompt import AnswerFormName

AnswerFormat = Literal["coordjson", "qwen", "compact"]

_FORMS: dict[tuple[AnswerFormat, bool], AnswerFormName] = {
    ("coordjson", True): "coordjson",
    ("coordjson", False): "coordjson_numbers",
    ("qwen", False): "qwen",
    ("compact", True): "compact",
}
"""(custom.answer_format, custom.coord_tokens.enabled) -> form."""


def form_name(answer_format: AnswerFormat, coord_tokens: bool) -> AnswerFormName:
    """The form of `custom.answer_format` and `custom.coord_tokens.enabled`.

    Of two that do not go together (`form_problems` refuses them) the one that the format has.
    """
    return _FORMS.get((answer_format, coord_tokens)) or _FORMS[answer_format, not coord_tokens]


def settings_of(form: AnswerFormName) -> tuple[AnswerFormat, bool]:
    """`custom.answer_format` and `custom.coord_tokens.enabled` that mean a form."""
    return next(settings for settings, name in _FORMS.items() if name == form)


def writes_numbers(form: AnswerFormName) -> bool:
    """Whether coordinates are numbers, and not coordinate tokens."""
    return not settings_of(form)[1]
