"""The form that a prompt's `answer_form` names."""

from __future__ import annotations

from coordexp.codec.forms.base import AnswerForm
from coordexp.codec.forms.json_form import JsonForm
from coordexp.codec.layout import COORDJSON, NUMBERS, QWEN
from coordexp.errors import ConfigError

FORMS = ("coordjson", "coordjson_numbers", "qwen")
_LAYOUTS = dict(zip(FORMS, (COORDJSON, NUMBERS, QWEN), strict=True))


def form_of(name: str = "coordjson", field_order: str = "desc_first") -> AnswerForm:
    """The form of this name. field_order: `custom.object_field_order`; Qwen's own form has its own order.

    Raises ConfigError for an unknown name or order.
    """
    if name not in FORMS:
        raise ConfigError(f"answer form {name!r}: expected one of {', '.join(FORMS)}")
    return JsonForm(name, _LAYOUTS[name], "geometry_first" if name == "qwen" else field_order)
