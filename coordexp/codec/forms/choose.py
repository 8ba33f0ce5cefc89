"""The form that a prompt's `answer_form` names."""

from __future__ import annotations

from coordexp.codec.forms.base import AnswerForm
from coordexp.codec.forms.compact import CompactForm
from coordexp.codec.forms.json_form import JsonForm
from coordexp.codec.layout import COORDJSON, NUMBERS, QWEN
from coordexp.errors import ConfigError

_LAYOUTS = {"coordjson": COORDJSON, "coordjson_numbers": NUMBERS, "qwen": QWEN}
FORMS = (*_LAYOUTS, CompactForm.name)


def form_of(name: str = "coordjson", field_order: str = "desc_first") -> AnswerForm:
    """The form of this name.

    field_order: `custom.object_field_order`, of CoordJSON; Qwen's own form and the compact one have an order of theirs.
    Raises ConfigError for an unknown name or order.
    """
    if name not in FORMS:
        raise ConfigError(f"answer form {name!r}: expected one of {', '.join(FORMS)}")
    if name == CompactForm.name:
        return CompactForm()
    return JsonForm(name, _LAYOUTS[name], "geometry_first" if name == "qwen" else field_order)
