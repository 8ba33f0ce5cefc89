"""When two descriptions are the same one."""

from __future__ import annotations

import unicodedata


def canonical_desc(desc: str) -> str:
    """The one form of a description: Unicode NFC, no blanks at the ends. Equal forms are the same description."""
    if not desc.isascii():
        desc = unicodedata.normalize("NFC", desc)
    return desc.strip()


def folded_desc(desc: str) -> str:
    """For comparisons that forgive spelling: the canonical form without case, runs of blanks as one space."""
    return " ".join(unicodedata.normalize("NFC", unicodedata.normalize("NFC", desc).casefold()).split())
