"""A rollout as a dump sample: its texts, roles, boxes and picture."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from coordexp.codec.parse import parse_rollout
from coordexp.codec.schema import BoxObject
from coordexp.matching import match_objects
from coordexp.rollout.types import Rollout
from coordexp.targets import DroppedSample, SampleDropReason, TargetBuilder
from coordexp.telemetry.token_page import ROLE_COLORS
from coordexp.trainers.rollouts.dumps import dump_sample
from coordexp.trainers.rollouts.metrics import RolloutOutcome

sys.path.insert(0, str(Path(__file__).parents[3] / "fixtures" / "codec"))

from codec_tokenizers import MAKERS, encode

TOK = MAKERS["demo"]()
IMAGE_PADS = "<|image_pad|>" * 50
PROMPT = f"<|im_start|>user\n{IMAGE_PADS}ask<|im_end|>\n<|im_start|>assistant\n"
PREFIX = (
    '{"objects": [{"desc": "cat", "bbox_2d": [<|coord_0|>, <|coord_0|>, <|coord_500|>, <|coord_999|>]}, '
    '{"desc": "dog", "bbox_2d": [<|coord_700|>, <|coord_0|>, <|coord_800|>, <|coord_90|>]}'
)
MISSED = '{"desc": "bird", "bbox_2d": [<|coord_600|>, <|coord_600|>, <|coord_999|>, <|coord_999|>]}'
GTS = [BoxObject("cat", "bbox_2d", (0, 0, 500, 999)), BoxObject("bird", "bbox_2d", (600, 600, 999, 999))]


def outcome_of(response):
    ids, prompt_ids = tuple(encode(TOK, response)), tuple(encode(TOK, PROMPT))
    parsed = parse_rollout(ids, TOK)
    match = match_objects(parsed.objects, GTS)
    sample = TargetBuilder(TOK).from_rollout(
        prompt_ids, parsed, match, GTS, generation_prompt_ids=prompt_ids, sample_id="a:1"
    )
    rollout = Rollout(prompt_ids, ids, (), "stop", 0.1, policy_version=7)
    return RolloutOutcome(rollout, parsed, match, len(GTS), sample)


def test_the_texts_roles_and_boxes_of_a_rollout():
    found = dump_sample(outcome_of(PREFIX + ', {"desc": "x"}]}<|im_end|>'), GTS, TOK, sample_id="a:1")
    short_prompt = PROMPT.replace(IMAGE_PADS, "<|image_pad|> (x 50) ")
    assert found.prompt == short_prompt
    assert found.rollout == PREFIX + ', {"desc": "x"}]}'
    assert found.target == PREFIX + ', {"desc": "x"}, ' + MISSED + "]}<|im_end|>"
    assert "".join(text for text, _ in found.target_tokens) == short_prompt + found.target
    roles = {role for _, role in found.target_tokens}
    assert roles == set(ROLE_COLORS) - {"ground truth"}
    by_role = {role: "".join(text for text, r in found.target_tokens if r == role) for role in roles}
    assert "cat" in by_role["matched prefix"]
    assert "dog" in by_role["fp prefix"]
    assert "bird" in by_role["fn tail"]
    assert found.preds == [("cat", (0, 0, 500, 999)), ("dog", (700, 0, 800, 90))]
    assert found.gts == [(gt.desc, gt.bins) for gt in GTS]
    assert found.matched == ((0, 0),)
    assert found.draw is None
    assert found.facts["dropped"] == {"missing_geom": 1}
    assert found.facts["flags"] == []
    assert (found.facts["matched and supervised"], found.facts["policy version"]) == (1, 7)


def test_a_rollout_that_gave_no_target():
    outcome = outcome_of("Sure: " + PREFIX)
    dropped = DroppedSample("a:1", SampleDropReason.TAIL_CHANGED, "why")
    found = dump_sample(
        RolloutOutcome(outcome.rollout, outcome.parsed, outcome.match, 2, dropped), GTS, TOK, sample_id="a:1"
    )
    assert (found.target, found.target_tokens) == ("", ())
    assert found.facts["no target"] == "tail_changed: why"
    assert found.facts["flags"] == ["truncated", "leading_text"]


def test_the_picture_shows_both_sides(tmp_path):
    Image.new("RGB", (101, 51), "#888888").save(tmp_path / "a.png")
    found = dump_sample(outcome_of(PREFIX), GTS, TOK, sample_id="a:1", image=str(tmp_path / "a.png"))
    picture = found.draw()
    colors = {color for _, color in picture.getcolors(1 << 24)}
    assert {(0x00, 0x9E, 0x73), (0xCC, 0x79, 0xA7), (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colors
    assert picture.width > 2 * 101
