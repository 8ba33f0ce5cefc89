"""How good detections are: COCO metrics, precision / recall / F1, confidence scores and the report."""

from coordexp.eval.predictions.box_confidence import expected_iou

__all__ = ["expected_iou"]
