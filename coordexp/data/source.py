"""Where a sample came from: its dataset and its line, carried through ms-swift as text beside the sample.

ms-swift hands one text column, `channel`, from a row through encoding, caching and packing to the collator.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from coordexp.codec.records import Record, dataset_name
from coordexp.errors import RecordError

SOURCE_COLUMN = "channel"


@dataclass(frozen=True)
class SampleSource:
    """dataset: see `codec.records.dataset_name`.  sample_id: `FILE:LINE` of the record.

    in_place_of: `FILE:LINE` of a record that could not be encoded, for which this one is trained; None as a rule.
    part: the data set of `custom.fusion` that it was drawn from; empty without one.
    """

    dataset: str = ""
    sample_id: str = "unknown sample"
    in_place_of: str | None = None
    part: str = ""

    def to_text(self) -> str:
        """What stands in the column."""
        return json.dumps([self.dataset, self.sample_id, self.in_place_of, self.part], ensure_ascii=False)

    @classmethod
    def of_sample(cls, sample: Mapping[str, Any]) -> SampleSource:
        """The source of a row or encoded sample; nameless for one that did not come from our data files."""
        text = sample.get(SOURCE_COLUMN)
        return cls() if text is None else cls(*json.loads(text))


@contextmanager
def naming_sample(row: Mapping[str, Any]) -> Iterator[None]:
    """Errors about the data of a row, or of an encoded sample, begin with its file and line."""
    sample_id = SampleSource.of_sample(row).sample_id
    try:
        yield
    except RecordError as error:
        text = str(error)
        raise RecordError(text if text.startswith(sample_id) else f"{sample_id}: {text}") from error


def source_of(record: Record) -> SampleSource:
    """The source of a record that was read from a file."""
    return SampleSource(dataset_name(record), f"{record.file}:{record.line}")


@dataclass(frozen=True)
class DatasetFilter:
    """Which datasets count: those that match an `include` pattern and no `exclude` pattern.

    Patterns are names or shell patterns (`lvis*`; `*` is any dataset); upper and lower case are the same.
    """

    include: tuple[str, ...]
    exclude: tuple[str, ...] = ()

    def __call__(self, name: str) -> bool:
        return _matches(name, self.include) and not _matches(name, self.exclude)

    def complaint(self, names: Collection[str]) -> str | None:
        """What to tell a user whose datasets `names` are all left out; None where one of them counts."""
        if any(map(self, names)):
            return None
        found = ", ".join(sorted(name or "(no name)" for name in names))
        return (
            f"no sample belongs to a dataset that counts: datasets found: {found}; include: {list(self.include)}, "
            f"exclude: {list(self.exclude)}. Write one of these names, or include: ['*'] for all."
        )


@lru_cache(maxsize=1024)
def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name.casefold(), pattern.casefold()) for pattern in patterns)
