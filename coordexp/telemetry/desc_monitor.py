"""Do the descriptions of matched pairs still mean the same? Numbers only: no loss ever sees them.

    monitor = DescMonitor(settings.rollout_matching.desc_monitor)
    if monitor.wants(step):
        store.add_all(monitor.compare(pairs).entries())

Mode `exact` compares normalised texts. Mode `semantic` also embeds them with a sentence-transformers model and takes
a cosine similarity of at least `semantic_threshold` as the same. Where the model cannot be had, the monitor says so
once and goes on with the exact comparison.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from coordexp.codec.descs import folded_desc
from coordexp.config.schema.rollout import DescMonitorSettings
from coordexp.metrics import keys_rollout as keys

logger = logging.getLogger(__name__)

CACHE_SIZE = 8192
"""Embeddings kept, by text."""
_HUB_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class DescCounts:
    """Sums over compared pairs; add those of several calls or ranks with `+`."""

    num_pairs: int = 0
    num_exact: int = 0
    """Equal normalised texts."""
    num_semantic_pairs: int = 0
    """Pairs compared while the embedding model was at hand."""
    num_same: int = 0
    """Those among them that are equal or similar enough."""
    num_similarities: int = 0
    """Those among them with two embeddings: neither text is empty."""
    similarity_sum: float = 0.0
    semantic_enabled: bool = False

    def __add__(self, other: DescCounts) -> DescCounts:
        sums = {name: getattr(self, name) + getattr(other, name) for name in _SUMMED}
        return DescCounts(**sums, semantic_enabled=self.semantic_enabled or other.semantic_enabled)

    def entries(self) -> dict[str, float | tuple[float, float]]:
        """The `rollout/desc_*` keys for `MetricStore.add_all`; similarity keys only where there were embeddings."""
        entries: dict[str, float | tuple[float, float]] = {
            keys.DESC_PAIRS_TOTAL: float(self.num_pairs),
            keys.DESC_EXACT_ACC_ON_MATCHED: (float(self.num_exact), float(self.num_pairs)),
            keys.DESC_SEM_ENABLED: float(self.semantic_enabled),
        }
        if self.semantic_enabled:
            entries[keys.DESC_SEM_ACC_ON_MATCHED] = float(self.num_same), float(self.num_semantic_pairs)
            entries[keys.DESC_SEM_SIM_MEAN] = self.similarity_sum, float(self.num_similarities)
            entries[keys.DESC_SEM_SIM_COUNT] = float(self.num_similarities)
        return entries

    def values(self) -> dict[str, float]:
        """The same keys as plain numbers; a mean over nothing is left out."""
        return {
            key: value[0] / value[1] if isinstance(value, tuple) else value
            for key, value in self.entries().items()
            if not (isinstance(value, tuple) and value[1] == 0)
        }


_SUMMED = tuple(item.name for item in fields(DescCounts) if item.name != "semantic_enabled")


class DescMonitor:
    """Compares (predicted, true) descriptions.

    The embedding model is loaded at the first comparison that needs it, on `desc_monitor.semantic_device` (`auto`:
    `device`), and leaves the random state of training alone.
    """

    def __init__(self, settings: DescMonitorSettings, *, device: str = "cpu") -> None:
        self.settings = settings
        self._device = device if settings.semantic_device == "auto" else settings.semantic_device
        self._model: Any = None
        self._is_out = settings.mode != "semantic"
        self._cache: OrderedDict[str, NDArray[np.float32]] = OrderedDict()

    def wants(self, step: int) -> bool:
        """Whether optimizer step `step` is one to compare on."""
        return self.settings.enabled and step % self.settings.every_steps == 0

    def compare(self, pairs: Sequence[tuple[str, str]], *, max_pairs: int | None = None) -> DescCounts:
        """Counts over (predicted, true) descriptions of matched pairs: the first `max_pairs` of them.

        max_pairs: None takes `desc_monitor.max_pairs`, the limit of a training step; evaluation passes len(pairs).
        """
        pairs = pairs[: self.settings.max_pairs if max_pairs is None else max_pairs]
        texts = [(folded_desc(pred), folded_desc(true)) for pred, true in pairs]
        exact = [pred == true for pred, true in texts]
        counts = DescCounts(num_pairs=len(pairs), num_exact=sum(exact))
        if not self._has_model():
            return counts
        self._embed({text for pair in texts for text in pair if text})
        similarities = [
            float(self._cache[pred] @ self._cache[true]) if pred and true else None for pred, true in texts
        ]
        self._forget_oldest()
        threshold = self.settings.semantic_threshold
        known = [value for value in similarities if value is not None]
        same = (
            e or (value is not None and value >= threshold)
            for e, value in zip(exact, similarities, strict=True)
        )
        return counts + DescCounts(0, 0, len(pairs), sum(same), len(known), sum(known), True)

    def _has_model(self) -> bool:
        if self._model is None and not self._is_out:
            self._model = _load(self.settings.semantic_model, self._device)
            self._is_out = self._model is None
            if self._model is not None and self.settings.max_length is not None:
                self._model.max_seq_length = self.settings.max_length
        return self._model is not None

    def _embed(self, texts: Iterable[str]) -> None:
        """Put the embeddings of all `texts` into the cache, the new ones by one call of the model."""
        texts = sorted(texts)
        new = [text for text in texts if text not in self._cache]
        if new:
            embeddings = self._model.encode(
                new,
                batch_size=self.settings.batch_size,
                normalize_embeddings=True,
                convert_to_numpy=True,
                show_progress_bar=False,
            )
            self._cache.update(zip(new, embeddings, strict=True))
        for text in texts:
            self._cache.move_to_end(text)

    def _forget_oldest(self) -> None:
        while len(self._cache) > CACHE_SIZE:
            self._cache.popitem(last=False)


def _load(name: str, device: str) -> Any:
    """The sentence-transformers model, or None after one warning."""
    try:
        from sentence_transformers import SentenceTransformer

        with torch.random.fork_rng(devices=[]):
            return SentenceTransformer(name, device=device, local_files_only=not _hub_has(name))
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        logger.warning(
            "desc_monitor: the model %r cannot be loaded (%s). Descriptions are compared by text only. Set "
            "rollout_matching.desc_monitor.semantic_model to a folder that holds it, or mode: exact.",
            name,
            str(error).split("\n", maxsplit=1)[0],
        )
        return None


def _hub_has(name: str) -> bool:
    """Whether the model hub answers, soon, that it has this model. Loading would try much longer to reach it."""
    if Path(name).is_dir():
        return False
    import httpx
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, timeout=_HUB_TIMEOUT_S)
    except (OSError, ValueError, httpx.HTTPError):
        return False
    return True
