"""How coordinates are read where nobody says it."""

from __future__ import annotations

import pytest

from coordexp.codec.forms.choose import form_of
from coordexp.inference.settings import InferSettings

SERVER = {"backend": "openai", "base_url": "http://127.0.0.1:1/v1", "served_model": "m"}


@pytest.mark.parametrize(
    ("form", "settings", "expected"),
    [
        ("coordjson", {"coord": None}, "median"),
        ("compact", {"coord": None, "backend": "vllm"}, "median"),
        ("coordjson_numbers", {"coord": None}, "argmax"),
        ("coordjson", {"coord": None, **SERVER}, "argmax"),
        ("coordjson", {"coord": "expectation"}, "expectation"),
    ],
)
def test_the_median_is_read_where_there_is_a_distribution(form, settings, expected):
    assert InferSettings(**settings).readout_of(form_of(form)) == expected
