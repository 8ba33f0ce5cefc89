"""What several sampled answers to a question know together, and what the one greedy answer does not say of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from coordexp.errors import ContractError
from coordexp.eval.box_matching import match_at_threshold
from coordexp.eval.predictions.image_result import ImageId, ImageResult
from coordexp.geometry import pairwise_iou


@dataclass(frozen=True)
class UnsaidObject:
    """An annotated object that some sampled answer found and the greedy one did not.

    gt_index: among the image's objects.  box: xyxy in pixels.  num_found: answers that found it.
    """

    image_id: ImageId
    file_name: str
    gt_index: int
    desc: str
    box: tuple[float, ...]
    num_found: int


@dataclass(frozen=True)
class Oracle:
    """Objects found, summed over images; an object is found by a box of its description at IoU `iou`.

    num_greedy: by the greedy answer.  num_each: by each sampled one, over all images.
    num_best: by the best sampled answer of each image.  num_any: by at least one.
    unsaid: in the order of images and objects.
    """

    iou: float
    num_gt: int
    num_greedy: int
    num_each: tuple[int, ...]
    num_best: int
    num_any: int
    unsaid: tuple[UnsaidObject, ...]

    def as_json(self) -> dict[str, Any]:
        """With the recalls worked out; those of no object are null."""

        def recall(found: float) -> float | None:
            return found / self.num_gt if self.num_gt else None

        return {
            "k": len(self.num_each),
            "iou": self.iou,
            "num_gt": self.num_gt,
            "recall_greedy": recall(self.num_greedy),
            "recall_sampled": recall(sum(self.num_each) / len(self.num_each)),
            "recall_best_of_k": recall(self.num_best),
            "recall_any_of_k": recall(self.num_any),
            "num_unsaid": len(self.unsaid),
            "unsaid": [asdict(one) for one in self.unsaid],
        }


def oracle_of(
    greedy: Sequence[ImageResult], answers: Sequence[Sequence[ImageResult]], *, iou: float = 0.5
) -> Oracle:
    """Compare the greedy answers with K sampled ones of the same images, in the same order.

    Raises ContractError without a sampled answer, or where they are of other images.
    """
    ids = [image.image_id for image in greedy]
    if not answers or any([image.image_id for image in images] != ids for images in answers):
        raise ContractError("the sampled answers are not of the greedy answers' images, in their order")
    num_gt = num_greedy = num_best = num_any = 0
    num_each, unsaid = [0] * len(answers), []
    for said, *sampled in zip(greedy, *answers, strict=True):
        found = [found_objects(image, iou) for image in sampled]
        mine, times = found_objects(said, iou), Counter(gt for one in found for gt in one)
        num_gt += int((~said.gt.crowd_N).sum())
        num_greedy += len(mine)
        num_best += max(map(len, found))
        num_any += len(found_by_any(found))
        num_each = [number + len(one) for number, one in zip(num_each, found, strict=True)]
        unsaid += [
            UnsaidObject(
                said.image_id,
                said.file_name,
                gt,
                said.gt.descs[gt],
                tuple(map(float, said.gt.boxes_N4[gt])),
                times[gt],
            )
            for gt in sorted(found_by_any(found) - mine)
        ]
    return Oracle(iou, num_gt, num_greedy, tuple(num_each), num_best, num_any, tuple(unsaid))


def found_by_any(found: Iterable[Iterable[int]]) -> set[int]:
    """Objects that at least one answer found. found: the objects of each answer, by index."""
    return {gt for one in found for gt in one}


def found_objects(image: ImageResult, iou: float) -> set[int]:
    """Annotated objects, crowd regions aside, with a predicted box of their description at this IoU, one to one."""
    pred, gt = image.pred, image.gt
    if not (len(pred) and len(gt)):
        return set()
    iou_PG = pairwise_iou(pred.boxes_N4, gt.boxes_N4)
    for g, desc in enumerate(gt.descs):
        if gt.crowd_N[g]:
            iou_PG[:, g] = 0.0
        for p, other in enumerate(pred.descs):
            if other != desc:
                iou_PG[p, g] = 0.0
    return {g for _, g in match_at_threshold(iou_PG, iou)}
