"""How good are the answers themselves: the numbers stage 2 trains for, from its evaluation or a file of predictions.

    counts = sum((AnswerCounts.of(image) for image in images), AnswerCounts())
    counts.objects.scores.f1, counts.numbers()

Matching is that of stage 2 (mask IoU above a gate, descriptions ignored), so `rollout_f1` is what `eval_rollout/f1` is
for the same answers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass

import numpy as np

from coordexp.codec.schema import KIND_BBOX, DropReason
from coordexp.errors import ContractError
from coordexp.eval.detection import Counts
from coordexp.eval.predictions.artifacts import BAD_PICTURE, INVALID_ROLLOUT, TRUNCATED
from coordexp.eval.predictions.image_result import ImageResult


@dataclass(frozen=True)
class AnswerCounts:
    """Sums over images; add those of several images or ranks with `+`."""

    num_images: int = 0
    num_truncated: int = 0
    num_whole: int = 0
    """Answers that are a container and not truncated."""
    num_with_pred: int = 0
    num_with_match: int = 0
    num_pred: int = 0
    num_gt: int = 0
    num_matched: int = 0
    num_named: int = 0
    """Matched objects with the right description."""
    dropped_invalid: int = 0
    dropped_ambiguous: int = 0
    maskiou_sum: float = 0.0
    num_boxes: int = 0
    """Matched pairs of two boxes."""
    bin_error_sum: float = 0.0
    """Over those: mean absolute error of the four coordinates, in bins."""

    @classmethod
    def of(cls, image: ImageResult) -> AnswerCounts:
        """The counts of one image whose `match` is there; ContractError where it is not."""
        match = image.match
        if match is None:
            raise ContractError(f"image {image.image_id}: its predictions are not matched yet")
        preds, gts = image.bins(image.pred), image.bins(image.gt)
        errors = [
            float(np.abs(np.subtract(preds[p].bins, gts[g].bins)).mean())
            for p, g in match.matched
            if preds[p].kind == gts[g].kind == KIND_BBOX
        ]
        faults = (TRUNCATED, INVALID_ROLLOUT, BAD_PICTURE)
        dropped = {name: n for name, n in image.errors.items() if name not in faults}
        ambiguous = dropped.get(DropReason.AMBIGUOUS, 0)
        return cls(
            num_images=1,
            num_truncated=int(bool(image.errors.get(TRUNCATED))),
            num_whole=int(not any(map(image.errors.get, faults))),
            num_with_pred=int(bool(preds)),
            num_with_match=int(bool(match.matched)),
            num_pred=len(preds),
            num_gt=len(gts),
            num_matched=len(match.matched),
            num_named=sum(image.pred.descs[p] == image.gt.descs[g] for p, g in match.matched),
            dropped_invalid=sum(dropped.values()) - ambiguous,
            dropped_ambiguous=ambiguous,
            maskiou_sum=match.maskiou_sum,
            num_boxes=len(errors),
            bin_error_sum=sum(errors),
        )

    def __add__(self, other: AnswerCounts) -> AnswerCounts:
        return AnswerCounts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def objects(self) -> Counts:
        """Matched, falsely predicted and missed objects."""
        return Counts.of(self.num_matched, self.num_pred, self.num_gt)

    def numbers(self) -> dict[str, float]:
        """What is said about a file of predictions.

        rollout_precision, rollout_recall, rollout_f1   of matched objects (1 where there is nothing to be wrong about)
        desc_acc        share of matched objects with the right description
        bin_error       mean absolute error of the coordinates of matched boxes, in bins; absent without such boxes
        parse_rate      share of written objects that parsing kept
        answer_rate     share of images with a whole answer: a container, and not truncated
        """
        scores = self.objects.scores
        num_written = self.num_pred + self.dropped_invalid + self.dropped_ambiguous
        numbers = {
            "rollout_precision": scores.precision,
            "rollout_recall": scores.recall,
            "rollout_f1": scores.f1,
            "desc_acc": _share(self.num_named, self.num_matched),
            "parse_rate": _share(self.num_pred, num_written),
            "answer_rate": _share(self.num_whole, self.num_images),
        }
        return numbers | ({"bin_error": self.bin_error_sum / self.num_boxes} if self.num_boxes else {})


def on_policy_numbers(images: Iterable[ImageResult], *, gate: float = 0.3) -> dict[str, float]:
    """`AnswerCounts.numbers` over images, matched at a mask IoU of at least `gate`."""
    return sum((AnswerCounts.of(image.matched(gate)) for image in images), AnswerCounts()).numbers()


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 1.0
