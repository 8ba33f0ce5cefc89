"""What a record of LVIS data knows of its image beside the objects: the classes that annotators looked for.

In the metadata of a record and of a line of a predictions file:

    neg_categories              classes known to be absent
    not_exhaustive_categories   classes of which not every object is annotated
    category_frequencies        "r", "c" or "f" (rare, common, frequent) of the classes of the objects
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coordexp.codec.descs import canonical_desc
from coordexp.errors import RecordError

ABSENT, NOT_EXHAUSTIVE, FREQUENCIES = "neg_categories", "not_exhaustive_categories", "category_frequencies"
_KEYS = (ABSENT, NOT_EXHAUSTIVE, FREQUENCIES)


@dataclass(frozen=True)
class CheckedClasses:
    """Classes of one image by their names, in the canonical form of descriptions; see above."""

    absent: tuple[str, ...]
    not_exhaustive: tuple[str, ...]
    frequencies: Mapping[str, str]

    @classmethod
    def read(cls, metadata: Mapping[str, Any] | None, where: str) -> CheckedClasses | None:
        """From metadata; None where it does not say which classes are absent and which not exhaustive.

        where: of the metadata, for messages.  Raises RecordError for values of the wrong kind.
        """
        if not metadata or ABSENT not in metadata or NOT_EXHAUSTIVE not in metadata:
            return None
        lists = []
        for key in (ABSENT, NOT_EXHAUSTIVE):
            names = metadata[key]
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise RecordError(f"{where}.{key} is {names!r:.80}: expected a list of names")
            lists.append(tuple(map(canonical_desc, names)))
        found = metadata.get(FREQUENCIES) or {}
        if not isinstance(found, Mapping) or not all(isinstance(value, str) for value in found.values()):
            raise RecordError(
                f"{where}.{FREQUENCIES} is {found!r:.80}: expected an object of names with r, c or f"
            )
        return cls(lists[0], lists[1], {canonical_desc(name): value for name, value in found.items()})

    @property
    def names(self) -> set[str]:
        """Every class that is named."""
        return {*self.absent, *self.not_exhaustive, *self.frequencies}


def kept_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a line of a predictions file keeps of a record's metadata."""
    return {key: metadata[key] for key in _KEYS if key in metadata} if metadata else {}
