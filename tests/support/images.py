"""Images with objects, written down briefly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coordexp.eval.predictions.image_result import ImageResult, Objects


def image_result(
    image_id: int | str,
    width: int,
    height: int,
    gt: Sequence[tuple[str, Sequence[float]]],
    pred: Sequence[tuple[Any, ...]] = (),
    *,
    crowd: Sequence[bool] | None = None,
    file_name: str = "",
    errors: Mapping[str, int] | None = None,
) -> ImageResult:
    """gt: (desc, points) of each object; pred: (desc, points) or (desc, points, score)."""
    scores = [score for _, _, score in pred] if pred and len(pred[0]) == 3 else None
    return ImageResult(
        image_id=image_id,
        file_name=file_name,
        width=width,
        height=height,
        gt=Objects.of([desc for desc, _ in gt], [points for _, points in gt], crowd=crowd),
        pred=Objects.of([p[0] for p in pred], [p[1] for p in pred], scores=scores),
        errors=errors or {},
    )
