"""Targets small enough to write down: role, type, weight and slot of every token."""

from __future__ import annotations

import pytest
from codec_tokenizers import encode, spell
from support.targets import GTS, PROMPT, RED, WEIGHTS, box, described, geometry, pairing, rollout_sample

from coordexp.codec.parse import parse_rollout
from coordexp.codec.pieces import pieces_of
from coordexp.codec.schema import BoxObject
from coordexp.losses.modules import ForwardKind
from coordexp.targets import TargetBuilder, TokenRole
from coordexp.targets.rows import ce_weights

RESPONSE = (
    '{"objects": [{"desc": "red box", "bbox_2d": [<|coord_12|>, <|coord_22|>, <|coord_310|>, <|coord_402|>]}, '
    '{"desc": "dog", "bbox_2d": [<|coord_700|>, <|coord_0|>, <|coord_800|>, <|coord_90|>]}, '
    '{"desc": ""}]}<|im_end|>'
)


def test_a_rollout_with_a_match_a_false_positive_a_dropped_record_and_a_miss(bytewise):
    sample = rollout_sample(bytewise, RESPONSE, GTS)
    assert described(sample, bytewise, ForwardKind.ROLLOUT) == [
        ("ask: ", TokenRole.PROMPT, 0.0),
        ('{"objects": [', TokenRole.PREFIX, 0.0),
        ('{"desc": "', TokenRole.MATCHED_PREFIX, 0.75),
        ("red box", TokenRole.MATCHED_PREFIX, 0.0),
        ('", "bbox_2d": [', TokenRole.MATCHED_PREFIX, 0.75),
        *geometry(TokenRole.MATCHED_PREFIX, 0.75, 12, 22, 310, 402),
        ("]}", TokenRole.MATCHED_PREFIX, 0.75),
        (", ", TokenRole.PREFIX, 0.0),
        (
            RESPONSE[RESPONSE.index('{"desc": "dog') : RESPONSE.index(', {"desc": ""')],
            TokenRole.FP_PREFIX,
            0.0,
        ),
        (", ", TokenRole.PREFIX, 0.0),
        ('{"desc": ""}', TokenRole.DROPPED_PREFIX, 0.0),
        (', {"desc": "', TokenRole.FN_TAIL, 2.0),  # an invalid prediction was dropped: structure counts twice
        ("cat", TokenRole.FN_TAIL, 0.25),
        ('", "bbox_2d": [', TokenRole.FN_TAIL, 2.0),
        *geometry(TokenRole.FN_TAIL, 2.0, 500, 501, 900, 901),
        ("]}", TokenRole.FN_TAIL, 2.0),
        ("]}", TokenRole.CLOSURE, 1.0),
        ("<|im_end|>", TokenRole.EOS, 1.0),
    ]
    text = RESPONSE.removesuffix("]}<|im_end|>")
    assert sample.target_text == (
        text
        + ', {"desc": "cat", "bbox_2d": [<|coord_500|>, <|coord_501|>, <|coord_900|>, <|coord_901|>]}]}<|im_end|>'
    )
    tokens = [
        bytewise.convert_ids_to_tokens(row.tolist()) for row in sample.token_ids_T[sample.box_positions_B4]
    ]
    assert tokens == [
        ["<|coord_12|>", "<|coord_22|>", "<|coord_310|>", "<|coord_402|>"],
        ["<|coord_500|>", "<|coord_501|>", "<|coord_900|>", "<|coord_901|>"],
    ]
    assert sample.box_bins_B4.tolist() == [[10, 20, 300, 400], [500, 501, 900, 901]]
    assert (sample.num_matched, sample.num_boxes, sample.dropped_invalid) == (1, 2, True)
    assert sample.prompt_length == 5
    assert sample.prompt_length + sample.prefix_length + sample.appended_length == sample.num_tokens
    assert sample.target_ids[sample.prefix_length :].tolist() == encode(
        bytewise, sample.target_text.removeprefix(text)
    )


@pytest.mark.parametrize(
    ("forward", "struct", "desc"),
    [
        (ForwardKind.TEACHER_FORCED, 1.0, 0.5),
        (ForwardKind.ANCHOR, 1.0, 0.5),
        (ForwardKind.SELF_CONTEXT, 1.0, 0.0),
    ],
)
def test_ground_truth(bytewise, forward, struct, desc):
    prompt_ids = encode(bytewise, PROMPT)
    sample = TargetBuilder(bytewise).from_ground_truth(prompt_ids, GTS, sample_id="train.jsonl:1")
    gt = TokenRole.GROUND_TRUTH
    assert described(sample, bytewise, forward) == [
        ("ask: ", TokenRole.PROMPT, 0.0),
        ('{"objects": [{"desc": "', gt, struct),
        ("red box", gt, desc),
        ('", "bbox_2d": [', gt, struct),
        *geometry(gt, struct, 10, 20, 300, 400),
        (']}, {"desc": "', gt, struct),
        ("cat", gt, desc),
        ('", "bbox_2d": [', gt, struct),
        *geometry(gt, struct, 500, 501, 900, 901),
        ("]}", gt, struct),
        ("]}", TokenRole.CLOSURE, 1.0),
        ("<|im_end|>", TokenRole.EOS, 1.0),
    ]
    assert sample.box_bins_B4.tolist() == [list(obj.bins) for obj in GTS]
    assert (sample.prefix_length, sample.num_matched, sample.dropped_invalid) == (0, 0, False)


def test_an_image_without_objects_teaches_the_empty_container(bytewise):
    sample = TargetBuilder(bytewise).from_ground_truth(encode(bytewise, PROMPT), [], sample_id="a")
    assert described(sample, bytewise, ForwardKind.TEACHER_FORCED)[1:] == [
        ('{"objects": [', TokenRole.GROUND_TRUTH, 1.0),
        ("]}", TokenRole.CLOSURE, 1.0),
        ("<|im_end|>", TokenRole.EOS, 1.0),
    ]
    assert sample.box_positions_B4.shape == (0, 4)


FALLBACK_CASES = {
    "no container": ("I see a cat.", 1),
    "another key first": ('{"n": 1, "objects": [' + RED + "]}", 1),
    "nothing at all": ("", 1),
    "text before a container whose object would match": ('Sure: {"objects": [' + RED + "]}", 1),
    "a code fence": ('```json\n{"objects": []}', 1),
}


@pytest.mark.parametrize("case", FALLBACK_CASES)
def test_without_a_trainable_prefix_every_ground_truth_is_appended_to_the_empty_container(bytewise, case):
    response, num_missed = FALLBACK_CASES[case]
    gts = [box("red", 1, 2, 30, 40)]
    sample = rollout_sample(bytewise, response + "<|im_end|>", gts)
    opening, *tail, closing, eos = described(sample, bytewise, ForwardKind.ROLLOUT)[1:]
    assert opening == ('{"objects": [', TokenRole.PREFIX, 0.0)
    assert "".join(text for text, _, _ in tail) == RED
    assert {role for _, role, _ in tail} == {TokenRole.FN_TAIL}
    assert (closing, eos) == (("]}", TokenRole.CLOSURE, 1.0), ("<|im_end|>", TokenRole.EOS, 1.0))
    assert sample.num_matched == 0
    assert sample.num_boxes == num_missed


def test_all_found_appends_only_the_closing_brackets(bytewise):
    sample = rollout_sample(bytewise, '{"objects": [' + RED + "]}<|im_end|>", [box("red", 1, 2, 30, 40)])
    assert described(sample, bytewise, ForwardKind.ROLLOUT)[-3:] == [
        ("]}", TokenRole.MATCHED_PREFIX, 0.75),
        ("]}", TokenRole.CLOSURE, 1.0),
        ("<|im_end|>", TokenRole.EOS, 1.0),
    ]


def test_a_truncated_record_leaves_the_target_and_its_ground_truth_is_missed(bytewise):
    response = '{"objects": [' + RED + ', {"desc": "cat", "bbox_2d": [<|coord_500|>, <|coord_501|>'
    gts = [box("red", 1, 2, 30, 40), box("cat", 500, 501, 900, 901)]
    sample = rollout_sample(bytewise, response, gts)
    assert sample.target_text.startswith(
        '{"objects": [' + RED + ', {"desc": "cat", "bbox_2d": [<|coord_500|>'
    )
    assert sample.box_bins_B4.tolist() == [[1, 2, 30, 40], [500, 501, 900, 901]]
    roles = sample.roles_T[sample.box_positions_B4][:, 0].tolist()
    assert roles == [TokenRole.MATCHED_PREFIX, TokenRole.FN_TAIL]


def test_only_invalid_drops_raise_the_weight_of_the_tail(bytewise):
    """A record is ambiguous, and not invalid, when a coordinate is spelled by ordinary tokens."""
    opening, coord = '{"objects": [{"desc": "a", "bbox_2d": [', "<|coord_5|>"
    response = [
        *encode(bytewise, opening),
        *spell(bytewise, coord),
        *encode(bytewise, f", {coord}, {coord}, {coord}]}}]}}<|im_end|>"),
    ]
    assert parse_rollout(response, bytewise).dropped_ambiguous == 1
    sample = rollout_sample(bytewise, response, [box("red", 1, 2, 30, 40)])
    assert not sample.dropped_invalid
    assert (', {"desc": "', TokenRole.FN_TAIL, 1.0) in described(sample, bytewise, ForwardKind.ROLLOUT)


# --- tokens that hold more than one thing ---------------------------------------------------------------


def roles_of_piece(sample, tok, piece):
    pieces = pieces_of(tok)
    places = [
        i for i, token_id in enumerate(sample.token_ids_T.tolist()) if pieces[token_id] == piece.encode()
    ]
    weights = ce_weights(sample, WEIGHTS, ForwardKind.ROLLOUT).tolist()
    return [(TokenRole(sample.roles_T[i]), weights[i]) for i in places]


def geometry_first(desc, *bins):
    coords = ", ".join(f"<|coord_{k}|>" for k in bins)
    return f'{{"bbox_2d": [{coords}], "desc": "{desc}"}}'


def test_a_token_shared_with_a_false_positive_is_context(make_tokenizer):
    tok = make_tokenizer('"}, {"', '"}]}')
    records = [
        geometry_first("a", 1, 2, 3, 4),
        geometry_first("b", 5, 6, 7, 8),
        geometry_first("c", 9, 9, 10, 10),
    ]
    records.append(geometry_first("d", 20, 20, 30, 30))
    response = '{"objects": [' + ", ".join(records) + "]}<|im_end|>"
    gts = [box("a", 1, 2, 3, 4), box("b", 5, 6, 7, 8), box("d", 20, 20, 30, 30)]
    match = pairing([(0, 0), (1, 1), (3, 2)], num_preds=4, num_gts=3)
    sample = rollout_sample(tok, response, gts, match, field_order="geometry_first")
    assert roles_of_piece(sample, tok, '"}, {"') == [
        (TokenRole.MATCHED_PREFIX, 0.75),  # a | b
        (TokenRole.FP_PREFIX, 0.0),  # b | c
        (TokenRole.FP_PREFIX, 0.0),  # c | d
    ]
    # The last `"}]}` is cut after the record; nothing was missed, so the closing makes the same token of it again.
    assert described(sample, tok, ForwardKind.ROLLOUT)[-2:] == [
        ('"}]}', TokenRole.CLOSURE, 1.0),
        ("<|im_end|>", TokenRole.EOS, 1.0),
    ]


def test_a_missed_object_is_appended_in_the_tokens_of_a_ground_truth_target(make_tokenizer):
    """A model that writes `]}, {` as one token is taught to go on by the token it would go on with."""
    tok = make_tokenizer("]}, {")
    gts = [box("red", 1, 2, 30, 40), box("blue", 500, 500, 600, 700)]
    match = pairing([(0, 0)], num_preds=1, num_gts=2)
    sample = rollout_sample(tok, '{"objects": [' + RED + ', {"desc": "bl', gts, match)
    truth = TargetBuilder(tok).from_ground_truth(
        sample.token_ids_T[: sample.prompt_length], gts, sample_id="truth"
    )
    assert sample.token_ids_T.tolist() == truth.token_ids_T.tolist()
    assert roles_of_piece(sample, tok, "]}, {") == [(TokenRole.FN_TAIL, 1.0)]


def test_the_opening_of_an_empty_container_is_context(make_tokenizer):
    tok = make_tokenizer('[{"')
    sample = rollout_sample(tok, "no idea<|im_end|>", [box("red", 1, 2, 30, 40)], pairing([], 0, 1))
    assert sample.prefix_length == 0
    assert roles_of_piece(sample, tok, '[{"') == [(TokenRole.FN_TAIL, 1.0)]
    roles = sample.roles_T[sample.prompt_length :].tolist()
    opening = roles.index(TokenRole.FN_TAIL)
    assert opening > 0
    assert set(roles[:opening]) == {TokenRole.PREFIX}


STRAY_CASES = {
    # merge, text between a matched record and the next one, is the fused token supervised?
    "one separator": ("]}, ", ", ", True),
    "a stray brace": ("]}}", "}, ", False),
    "two commas": ("]},,", ",, ", False),
    "an element that is no object": ("]}, 5", ", 5, ", False),
}


@pytest.mark.parametrize("case", STRAY_CASES)
def test_a_token_that_also_holds_stray_text_is_not_supervised(make_tokenizer, case):
    merge, separator, is_supervised = STRAY_CASES[case]
    tok = make_tokenizer(merge)
    response = '{"objects": [' + RED + separator + RED + "]}<|im_end|>"
    parsed = parse_rollout(encode(tok, response), tok)
    gts = [box("red", 1, 2, 30, 40)]
    match = pairing([(0, 0)], num_preds=len(parsed.objects), num_gts=1)
    sample = rollout_sample(tok, response, gts, match)
    expected = (TokenRole.MATCHED_PREFIX, 0.75) if is_supervised else (TokenRole.PREFIX, 0.0)
    assert roles_of_piece(sample, tok, merge) == [expected]


def test_a_token_that_opens_the_container_and_a_matched_record_is_supervised(make_tokenizer):
    tok = make_tokenizer(' [{"')
    sample = rollout_sample(tok, '{"objects": [' + RED + "]}<|im_end|>", [box("red", 1, 2, 30, 40)])
    assert roles_of_piece(sample, tok, ' [{"') == [(TokenRole.MATCHED_PREFIX, 0.75)]


def test_ids_without_text_are_not_taught(bytewise):
    """A padded vocabulary has ids that the tokenizer does not know; a model can still write them."""
    unknown = len(bytewise) + 7
    ids = encode(bytewise, '{"objects": [' + RED + "]}")
    at = ids.index(bytewise.convert_tokens_to_ids("<|coord_2|>"))
    sample = rollout_sample(bytewise, [*ids[:at], unknown, *ids[at:]], [box("red", 1, 2, 30, 40)])
    place = sample.token_ids_T.tolist().index(unknown)
    assert sample.roles_T[place] == TokenRole.PREFIX
    assert ce_weights(sample, WEIGHTS, ForwardKind.ROLLOUT)[place] == 0
    assert sample.token_ids_T[sample.box_positions_B4].tolist() == [
        bytewise.convert_tokens_to_ids([f"<|coord_{k}|>" for k in (1, 2, 30, 40)])
    ]


def test_closing_tokens_that_hold_the_end_of_a_record_are_closure(make_tokenizer):
    tok = make_tokenizer("}]}")
    sample = TargetBuilder(tok).from_ground_truth(encode(tok, PROMPT), GTS, sample_id="a")
    assert described(sample, tok, ForwardKind.TEACHER_FORCED)[-3:] == [
        ("]", TokenRole.GROUND_TRUTH, 1.0),
        ("}]}", TokenRole.CLOSURE, 1.0),
        ("<|im_end|>", TokenRole.EOS, 1.0),
    ]


def test_a_closing_token_that_reaches_into_a_description_keeps_its_weight(make_tokenizer):
    tok = make_tokenizer('t"}]}')
    builder = TargetBuilder(tok, field_order="geometry_first")
    sample = builder.from_ground_truth(encode(tok, PROMPT), GTS, sample_id="a")
    assert described(sample, tok, ForwardKind.SELF_CONTEXT)[-3:] == [
        ("ca", TokenRole.GROUND_TRUTH, 0.0),
        ('t"}]}', TokenRole.CLOSURE, 1.0),
        ("<|im_end|>", TokenRole.EOS, 1.0),
    ]


# --- polygons --------------------------------------------------------------------------------------------

TRIANGLE = BoxObject("hill", "poly", (100, 100, 300, 100, 200, 400))


def test_a_polygon_changes_nothing_for_the_boxes_beside_it(bytewise):
    prompt_ids = encode(bytewise, PROMPT)
    builder = TargetBuilder(bytewise)
    alone = builder.from_ground_truth(prompt_ids, GTS, sample_id="a")
    beside = builder.from_ground_truth(prompt_ids, [GTS[0], TRIANGLE, GTS[1]], sample_id="b")
    assert beside.box_bins_B4.tolist() == alone.box_bins_B4.tolist()
    assert (
        beside.token_ids_T[beside.box_positions_B4].tolist()
        == alone.token_ids_T[alone.box_positions_B4].tolist()
    )
    assert beside.poly_bins_N.tolist() == list(TRIANGLE.bins)
    assert bytewise.decode(beside.token_ids_T[beside.poly_positions_N]).replace("<|coord_", "").split(
        "|>"
    ) == [
        *map(str, TRIANGLE.bins),
        "",
    ]


MIXED_PAIRS = {
    # predicted, ground truth, bins the prediction's tokens are taught
    "box learns box": (box("x", 1, 2, 3, 4), box("y", 5, 6, 7, 8), [5, 6, 7, 8]),
    "box learns the tightest box of a polygon": (box("x", 1, 2, 3, 4), TRIANGLE, [100, 100, 300, 400]),
    # vertices lie far apart, so each one's transport goes to its nearest vertex alone
    "polygon learns its vertices": (
        BoxObject("x", "poly", (110, 95, 290, 105, 205, 390)), TRIANGLE, [100, 100, 300, 100, 200, 400],
    ),
    "polygon learns the corners of a box": (
        BoxObject("x", "poly", (11, 12, 9, 410, 395, 402, 405, 8)),
        box("y", 10, 10, 400, 400),
        [10, 10, 10, 400, 400, 400, 400, 10],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MIXED_PAIRS)
def test_true_bins_of_a_matched_pair(bytewise, case):
    pred, gt, bins = MIXED_PAIRS[case]
    coords = ", ".join(f"<|coord_{k}|>" for k in pred.bins)
    response = f'{{"objects": [{{"desc": "x", "{pred.kind}": [{coords}]}}]}}<|im_end|>'
    sample = rollout_sample(bytewise, response, [gt], pairing([(0, 0)], 1, 1))
    found = [*sample.box_bins_B4.ravel().tolist(), *sample.poly_bins_N.tolist()]
    assert found == bins
    positions = [*sample.box_positions_B4.ravel().tolist(), *sample.poly_positions_N.tolist()]
    tokens = bytewise.convert_ids_to_tokens(sample.token_ids_T[positions].tolist())
    assert tokens == [f"<|coord_{k}|>" for k in pred.bins]
