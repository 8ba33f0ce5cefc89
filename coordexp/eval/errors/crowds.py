"""Predictions inside crowd regions, which count neither way."""

from __future__ import annotations

import numpy as np

from coordexp.eval.predictions.image_result import ImageResult
from coordexp.geometry import FloatArray, box_areas


def share_in_crowd(image: ImageResult, *, any_desc: bool = False) -> FloatArray:
    """The largest share of each prediction's box inside one crowd region of its description (or of any).  [P]"""
    boxes_P4 = image.pred.boxes_N4
    share_P = np.zeros(len(boxes_P4))
    regions = np.flatnonzero(image.gt.crowd_N).tolist()
    if not regions:
        return share_P
    areas_P, descs = box_areas(boxes_P4), np.array(image.pred.descs, dtype=object)
    for g in regions:
        region = image.gt.boxes_N4[g]
        sides = np.minimum(boxes_P4[:, 2:], region[2:]) - np.maximum(boxes_P4[:, :2], region[:2])
        shared_P = np.clip(sides, 0.0, None).prod(axis=1)
        of_region = np.divide(shared_P, areas_P, out=np.zeros_like(shared_P), where=areas_P > 0)
        share_P = np.maximum(share_P, of_region * (any_desc | (descs == image.gt.descs[g])))
    return share_P
