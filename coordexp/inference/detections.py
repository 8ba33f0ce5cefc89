"""What a model finds on one picture: boxes with names and scores, and what became of the rest of the answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
from PIL import Image

from coordexp.codec.descs import folded_desc
from coordexp.errors import ConfigError, RecordError
from coordexp.eval.predictions.artifacts import BAD_PICTURE, INVALID_ROLLOUT, TRUNCATED
from coordexp.eval.predictions.confidence import Scoring, allows_expected_iou, score_lines
from coordexp.eval.predictions.image_result import ImageId, ImageResult, Objects
from coordexp.geometry import FloatArray, IntArray, quantize_boxes, xyxy_to_xywh
from coordexp.inference.asked_pictures import AskedPicture
from coordexp.inference.class_names import NOT_IN_CLASSES

if TYPE_CHECKING:
    import supervision

Categories = Mapping[str, int] | Sequence[str] | Sequence[Mapping[str, Any]]
"""Names with their ids, names in the order of ids from 1, or the `categories` of a COCO file."""

_OF_THE_ANSWER = (TRUNCATED, INVALID_ROLLOUT, BAD_PICTURE)
DRAWN_SIDE = 1600


@dataclass(frozen=True, eq=False)
class Detections:
    """The N objects that a model names on one picture, in the order of its answer.

    Attributes:
        xyxy: Boxes x1, y1, x2, y2 in pixels of the upright picture, float64 [N, 4]. A corner is a pixel centre, from 0
            to width - 1.
        bins: The same corners in the bins 0..999 that the model wrote, int64 [N, 4].
        labels: The N names; with `classes`, as they are written there.
        scores: Confidences in (0, 1], float64 [N].
        text: The model's whole answer.
        dropped: How many objects of the answer are not among the N, by reason: those of the parser
            (`coordexp.codec.schema.DropReason`), those of scoring (`ScoreFailure`), and `not_in_classes`.
        score_source: How the scores were made, such as `expected_iou_times_desc_probability`.
        truncated: Whether the answer was cut before its end; a guided one is closed where it is cut.
        invalid: Whether the answer cannot be read at all.
        points: Of each object its flat pixel coordinates: those of the box, or of the outline where the model wrote one
            (`xyxy` is then the box around it).
        classes: What was asked for; None for any class.
        picture: The picture.
    """

    xyxy: FloatArray
    bins: IntArray
    labels: tuple[str, ...]
    scores: FloatArray
    text: str
    dropped: dict[str, int]
    score_source: str
    truncated: bool
    invalid: bool
    points: tuple[tuple[float, ...], ...]
    picture: AskedPicture
    classes: tuple[str, ...] | None = field(default=None)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def name(self) -> str:
        """The picture's name."""
        return self.picture.name

    @property
    def width(self) -> int:
        """Of the picture, in pixels."""
        return self.picture.width

    @property
    def height(self) -> int:
        """Of the picture, in pixels."""
        return self.picture.height

    def class_ids(self) -> dict[str, int]:
        """Name -> number from 0: the order of `classes`, else the labels of this picture sorted."""
        names = self.classes if self.classes is not None else sorted(set(self.labels))
        return {name: number for number, name in enumerate(names)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values: name, size, objects (label, score, box in pixels and bins), and what was dropped."""
        rows = zip(
            self.labels,
            self.scores.tolist(),
            self.xyxy.tolist(),
            self.bins.tolist(),
            self.points,
            strict=True,
        )
        return {
            "image": self.name,
            "width": self.width,
            "height": self.height,
            "objects": [
                {
                    "label": label,
                    "score": score,
                    "xyxy": box,
                    "bins": bins,
                    **({} if len(points) == 4 else {"polygon": list(points)}),
                }
                for label, score, box, bins, points in rows
            ],
            "dropped": self.dropped,
            "truncated": self.truncated,
            "invalid": self.invalid,
            "score_source": self.score_source,
            "text": self.text,
        }

    def to_json(self, *, indent: int | None = None) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=indent)

    def to_coco(self, image_id: ImageId, categories: Categories | None = None) -> list[dict[str, Any]]:
        """Entries of a COCO results list: image_id, category_id, bbox (x, y, width, height in pixels), score.

        Args:
            image_id: Of the picture in the ground truth.
            categories: Whose ids to use: names with ids, names in the order of ids from 1, or the `categories` of a
                COCO file. None numbers `classes` from 1 where they were given, else the labels of this picture,
                sorted; give them to have the same ids on every picture. Names are compared without case.

        Returns:
            One entry per object, with a `segmentation` where the model wrote an outline.

        Raises:
            RecordError: A label is no category.
        """
        ids = self._category_ids(categories)
        entries = []
        boxes = xyxy_to_xywh(self.xyxy).tolist()
        for label, box, score, points in zip(
            self.labels, boxes, self.scores.tolist(), self.points, strict=True
        ):
            entry = {
                "image_id": image_id,
                "category_id": ids[label],
                "bbox": box,
                "score": score,
            }
            entries.append(entry if len(points) == 4 else {**entry, "segmentation": [list(points)]})
        return entries

    def _category_ids(self, categories: Categories | None) -> dict[str, int]:
        """Label -> id."""
        given = {name: number + 1 for name, number in self.class_ids().items()}
        if categories is not None:
            given = _ids_of(categories)
        folded = {folded_desc(name): number for name, number in given.items()}
        ids = {label: given.get(label, folded.get(folded_desc(label))) for label in self.labels}
        unknown = [label for label, number in ids.items() if number is None]
        if unknown:
            raise RecordError(
                f"{self.name}: label {unknown[0]!r} is none of the {len(given)} categories; give `classes` when "
                "asking, so that other answers are dropped"
            )
        return {label: number for label, number in ids.items() if number is not None}

    def to_supervision(self) -> supervision.Detections:
        """As `supervision.Detections`: xyxy float32, confidence, class_id (see `class_ids`), data["class_name"].

        Raises:
            ConfigError: The package `supervision` is not installed.
        """
        try:
            import supervision
        except ImportError:
            raise ConfigError(
                "to_supervision needs the package supervision: pip install supervision"
            ) from None
        ids = self.class_ids()
        return supervision.Detections(
            xyxy=self.xyxy.astype(np.float32).reshape(-1, 4),
            confidence=self.scores.astype(np.float32),
            class_id=np.array([ids[label] for label in self.labels], dtype=np.int64),
            data={"class_name": np.array(self.labels, dtype=np.str_)},
        )

    def to_image_result(self, image_id: ImageId, gt: Objects) -> ImageResult:
        """As evaluation takes it, with the ground truth of the picture."""
        pred = Objects.of(self.labels, self.points, scores=self.scores)
        return ImageResult(image_id, self.name, self.width, self.height, gt, pred, errors=self.dropped)

    def draw(self, *, scores: bool = True, max_side: int | None = DRAWN_SIDE) -> Image.Image:
        """The picture with its boxes and labels. A class has the same colour on every picture.

        Args:
            scores: Write scores beside the labels.
            max_side: A larger picture is reduced until its longer side has so many pixels; None never.
        """
        from coordexp.eval.report.pictures import CLASS_COLORS, DrawnBox, draw_colored

        order = {} if self.classes is None else self.class_ids()
        number = {label: order.get(label, crc32(label.encode())) for label in self.labels}
        boxes = [
            DrawnBox(
                box,
                f"{label} {score:.2f}" if scores else label,
                CLASS_COLORS[number[label] % len(CLASS_COLORS)],
            )
            for box, label, score in zip(self.xyxy.tolist(), self.labels, self.scores.tolist(), strict=True)
        ]
        return draw_colored(self.picture.open(), boxes, max_side=max_side)


def detections_of(
    picture: AskedPicture,
    line: Mapping[str, Any],
    trace: Mapping[str, Any],
    classes: Sequence[str] | None = None,
) -> Detections:
    """The scored detections of one answer.

    line, trace: of `gt_vs_pred.jsonl` and the token trace.  classes: others are dropped; None keeps all.
    """
    (scored,), _ = score_lines([dict(line)], [dict(trace)], scoring_of(line, trace))
    errors = {**scored["errors"], **scored.get("pred_score_failures", {})}
    kept, dropped = scored["pred"], {key: count for key, count in errors.items() if key not in _OF_THE_ANSWER}
    labels = [obj["desc"] for obj in kept]
    if classes is not None:
        names = {folded_desc(name): name for name in classes}
        named = [(obj, names[key]) for obj in kept if (key := folded_desc(obj["desc"])) in names]
        if len(named) < len(kept):
            dropped[NOT_IN_CLASSES] = len(kept) - len(named)
        kept, labels = [obj for obj, _ in named], [name for _, name in named]
    objects = Objects.of(labels, [obj["points"] for obj in kept], scores=[obj["score"] for obj in kept])
    boxes_N4 = objects.boxes_N4
    return Detections(
        xyxy=boxes_N4,
        bins=quantize_boxes(boxes_N4, picture.width, picture.height),
        labels=tuple(labels),
        scores=objects.scores_N,
        text=trace["text"],
        dropped=dropped,
        score_source=scored["pred_score_source"],
        truncated=TRUNCATED in errors or trace["finish_reason"] == "length",
        invalid=INVALID_ROLLOUT in errors,
        points=tuple(tuple(map(float, obj["points"])) for obj in kept),
        picture=picture,
        classes=None if classes is None else tuple(classes),
    )


def scoring_of(line: Mapping[str, Any], trace: Mapping[str, Any]) -> Scoring:
    """The best score that an answer allows.

    Expected IoU of the box times the probability of the name, where the backend shows the distributions of coordinates
    and all objects are boxes; else the log-probabilities of the coordinates; 1.0 where a server gives none.
    """
    if trace["generated_token_text"] and not trace["token_logprobs"]:
        return Scoring("constant")
    return Scoring("expected_iou" if allows_expected_iou(line, trace) else "logprob")


def _ids_of(categories: Categories) -> dict[str, int]:
    if isinstance(categories, Mapping):
        return {str(name): int(number) for name, number in categories.items()}
    ids: dict[str, int] = {}
    for number, entry in enumerate(categories, start=1):
        if isinstance(entry, Mapping):
            ids[str(entry["name"])] = int(entry["id"])
        else:
            ids[str(entry)] = number
    return ids
