"""Prompt variants that the research code's files name, in our wording: the files hold the names alone."""

from __future__ import annotations

from coordexp.config.schema.prompt import DEFAULT_PROMPT

COCO_80 = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, "
    "mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, "
    "teddy bear, hair drier, toothbrush"
)

PROMPT_VARIANTS: dict[str, str] = {
    "default": DEFAULT_PROMPT,
    "coco_80": f"{DEFAULT_PROMPT} Use only these names: {COCO_80}.",
}
