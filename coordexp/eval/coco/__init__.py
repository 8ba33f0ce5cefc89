"""COCO files and average precision."""

from coordexp.eval.coco.evaluate import evaluate_coco

__all__ = ["evaluate_coco"]
