"""Descriptions that are one word to a reader and several to a program."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping

import numpy as np

from coordexp.data.check.findings import Finding, Level, found
from coordexp.eval.coco.annotations import Dataset


def name_findings(dataset: Dataset) -> list[Finding]:
    """Groups of descriptions that differ only by case, by blanks or by their Unicode form."""
    counts = Counter(dict(zip(written_names(dataset), objects_per_category(dataset), strict=True)))
    groups = alike(counts)
    finding = found(
        Level.WARNING, "names_alike",
        "{count} [description is|descriptions are] written in several ways that differ only by case, blanks or Unicode "
        "form: a model learns each of them as a word of its own. Write one",
        range(len(groups)), lambda row: " / ".join(f"{name!r} ({counts[name]})" for name in groups[row]),
    )  # fmt: skip
    return [finding] if finding is not None else []


def written_names(dataset: Dataset) -> list[str]:
    """The category names as the file has them, blanks and all."""
    return [
        str(category.get("name", name)) if isinstance(category, Mapping) else name
        for category, name in zip(dataset.categories, dataset.category_names, strict=True)
    ]


def objects_per_category(dataset: Dataset) -> list[int]:
    """How many annotations each category has."""
    counts: list[int] = np.bincount(dataset.category_M, minlength=len(dataset.category_ids)).tolist()
    return counts


def alike(counts: Counter[str]) -> list[list[str]]:
    """The groups of names that are alike, the most frequent form first."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in counts:
        groups[folded(name)].append(name)
    return [sorted(group, key=lambda name: -counts[name]) for group in groups.values() if len(group) > 1]


def folded(name: str) -> str:
    """A name without what readers overlook: case, blanks around and in a row, underscores and hyphens for blanks."""
    text = unicodedata.normalize("NFKC", name).casefold().replace("_", " ").replace("-", " ")
    return " ".join(text.split())
