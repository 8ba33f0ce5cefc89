"""Two spellings of one word are one description."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordexp.codec.descs import canonical_desc, folded_desc

CAFE, DECOMPOSED = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize(
    ("desc", "expected"),
    [
        (DECOMPOSED, CAFE),
        (CAFE, CAFE),
        ("\u00a0 red  box\n", "red  box"),
        ("\u1100\u1161", "\uac00"),  # two parts of a Hangul syllable
        ("Cat", "Cat"),
        (" ", ""),
    ],
)
def test_the_canonical_form(desc, expected):
    assert canonical_desc(desc) == expected


@given(st.text())
def test_every_unicode_form_has_the_same_canonical_form(desc):
    canonical = canonical_desc(desc)
    assert unicodedata.is_normalized("NFC", canonical)
    assert canonical_desc(canonical) == canonical
    assert canonical_desc(unicodedata.normalize("NFD", desc)) == canonical
    assert folded_desc(desc) == folded_desc(canonical) == folded_desc(unicodedata.normalize("NFD", desc))


@pytest.mark.parametrize(
    ("desc", "expected"),
    [
        ("Red  Box", "red box"),
        ("\tred box\n", "red box"),
        ("Stra\u00dfe", "strasse"),
        (DECOMPOSED.upper(), CAFE),
        ("red\u00a0box", "red box"),
    ],
)
def test_the_folded_form_forgives_case_and_blanks(desc, expected):
    assert folded_desc(desc) == expected
