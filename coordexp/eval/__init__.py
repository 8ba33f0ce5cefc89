"""How good detections are: COCO metrics, precision / recall / F1, confidence scores and the report."""
