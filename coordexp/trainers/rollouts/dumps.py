"""A rollout and what became of it, as plain values for the monitor dumps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from PIL import Image

from coordexp.codec.pieces import TokenPieces, pieces_of
from coordexp.codec.schema import BoxObject
from coordexp.eval.predictions.image_result import objects_of
from coordexp.eval.report.pictures import XYXY, side_by_side
from coordexp.pictures import open_picture
from coordexp.targets import EncodedSample, TokenRole
from coordexp.telemetry.dumps import DumpSample
from coordexp.trainers.rollouts.metrics import RolloutOutcome

_LONGEST_RUN = 3  # equal prompt tokens in a row that are shown one by one: image placeholders are many


def dump_sample(
    outcome: RolloutOutcome,
    gts: Sequence[BoxObject],
    tok: Any,
    *,
    sample_id: str,
    image: str | bytes | None = None,
) -> DumpSample:
    """What a monitor dump shows of one rollout.

    gts: the record's objects, as they were matched.
    image: the first one, a path or the bytes of a file; drawn with all boxes.
    """
    pieces, sample, parsed = pieces_of(tok), outcome.sample, outcome.parsed
    built = sample if isinstance(sample, EncodedSample) else None
    preds, prompt_ids = parsed.objects, outcome.rollout.prompt_token_ids
    matched = tuple(outcome.match.matched)
    return DumpSample(
        sample_id=sample_id,
        prompt="".join(text for text, _ in _prompt_tokens(prompt_ids, pieces.texts(prompt_ids))),
        rollout=parsed.text,
        target="" if built is None else built.target_text,
        target_tokens=() if built is None else tuple(_tokens(built, pieces)),
        gts=[(gt.desc, gt.bins) for gt in gts],
        preds=[(pred.desc, pred.bins) for pred in preds],
        matched=matched,
        draw=None if image is None else lambda: answer_picture(image, gts, preds, matched),
        facts=_facts(outcome),
    )


def _facts(outcome: RolloutOutcome) -> dict[str, Any]:
    parsed, rollout, sample = outcome.parsed, outcome.rollout, outcome.sample
    facts: dict[str, Any] = {
        "gt objects": outcome.num_gt,
        "valid predictions": len(parsed.objects),
        "matched": len(outcome.match.matched),
        "matched and supervised": outcome.num_supervised,
        "maskIoU of matches": [round(value, 3) for value in outcome.match.maskious],
        "dropped": {str(reason): count for reason, count in parsed.dropped_by_reason.items()},
        "generated tokens": len(parsed.response_token_ids),
        "finish reason": rollout.finish_reason,
        "policy version": rollout.policy_version,
    }
    flags = ("truncated", "invalid_rollout", "leading_text")
    facts["flags"] = [name for name in flags if getattr(parsed, name)]
    if rollout.repeat_terminated:
        facts["flags"].append("repeat_terminated")
    if not isinstance(sample, EncodedSample):
        facts["no target"] = f"{sample.reason}: {sample.detail}"
    return facts


def _tokens(sample: EncodedSample, pieces: TokenPieces) -> list[tuple[str, str]]:
    """(text, role name) of every token; runs of one prompt token (image placeholders) as one."""
    split = sample.prompt_length
    texts = pieces.texts(sample.token_ids_T.tolist())
    roles = [TokenRole(role).name.lower().replace("_", " ") for role in sample.roles_T[split:].tolist()]
    target = list(zip(texts[split:], roles, strict=True))
    return _prompt_tokens(sample.token_ids_T[:split].tolist(), texts[:split]) + target


def _prompt_tokens(token_ids: Sequence[int], texts: Sequence[str]) -> list[tuple[str, str]]:
    tokens: list[tuple[str, str]] = []
    for _, run in groupby(zip(token_ids, texts, strict=True), key=lambda token: token[0]):
        shown = [text for _, text in run]
        if len(shown) > _LONGEST_RUN:
            shown = [shown[0], f" (x {len(shown)}) "]
        tokens += [(text, TokenRole.PROMPT.name.lower()) for text in shown]
    return tokens


def answer_picture(
    source: str | bytes | Image.Image,
    gts: Sequence[BoxObject],
    preds: Sequence[BoxObject],
    matched: Sequence[tuple[int, int]],
) -> Image.Image:
    """Ground truth and prediction side by side; `source` is a path, the bytes of a file, or the picture."""
    image = source if isinstance(source, Image.Image) else open_picture(source)
    return side_by_side(image, _boxes(gts, image.size), _boxes(preds, image.size), matched)


def _boxes(objects: Sequence[BoxObject], size: tuple[int, int]) -> list[tuple[str, XYXY]]:
    """Pixel boxes (of polygons: the tightest ones), for an image of (width, height) `size`."""
    found = objects_of(objects, *size)
    return list(zip(found.descs, found.boxes_N4.tolist(), strict=True))
