"""Targets small enough to write down: role, type, weight and slot of every token."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest
from codec_tokenizers import encode, spell
from tokenizers import normalizers

from coordexp.codec.parse import parse_rollout
from coordexp.codec.pieces import pieces_of
from coordexp.codec.schema import BoxObject
from coordexp.errors import ContractError, RecordError, RolloutError
from coordexp.losses.modules import TokenCE
from coordexp.losses.provenance import Forward
from coordexp.matching import MatchResult, match_objects
from coordexp.targets import DroppedSample, DropReason, EncodedSample, Role, TargetBuilder
from coordexp.targets.rows import ce_weights

WEIGHTS = TokenCE(
    desc_ce_weight=0.5,
    self_context_struct_ce_weight=0.1,
    rollout_fn_desc_weight=0.25,
    rollout_matched_prefix_struct_weight=0.75,
    rollout_drop_invalid_struct_ce_multiplier=2.0,
)
PROMPT = "ask: "


def box(desc, *bins):
    return BoxObject(desc, "bbox_2d", bins)


def pairing(pairs, num_preds, num_gts):
    """A match given by hand."""
    preds, gts = {p for p, _ in pairs}, {g for _, g in pairs}
    return MatchResult(
        matched=list(pairs),
        maskious=[1.0] * len(pairs),
        unmatched_pred=[p for p in range(num_preds) if p not in preds],
        unmatched_gt=[g for g in range(num_gts) if g not in gts],
        num_candidates=num_preds * num_gts,
        gating_rejections=0,
    )


def rollout_sample(tok, response, gts, match=None, prompt=PROMPT, **options):
    """The sample of a response given as text or token ids; matched for real unless `match` is given."""
    ids = encode(tok, response) if isinstance(response, str) else response
    parsed = parse_rollout(ids, tok, field_order=options.get("field_order", "desc_first"))
    prompt_ids = encode(tok, prompt)
    return TargetBuilder(tok, **options).from_rollout(
        prompt_ids,
        parsed,
        match_objects(parsed.objects, gts) if match is None else match,
        gts,
        generation_prompt_ids=prompt_ids,
        sample_id="val.jsonl:3",
    )


def described(sample, tok, forward):
    """(text, role, weight) of each run of tokens that agree in role and weight."""
    pieces, weights = pieces_of(tok), ce_weights(sample, WEIGHTS, forward).tolist()
    tokens = list(zip(sample.token_ids_T.tolist(), sample.roles_T.tolist(), weights, strict=True))
    return [
        (pieces.join(i for i, _, _ in run).decode(), Role(role), weight)
        for (role, weight), run in ((key, list(group)) for key, group in groupby(tokens, lambda t: t[1:]))
    ]


def geometry(role, weight, *tokens):
    """Runs of `[<|coord_a|>, ...]` after its key: separators have the weight, coordinates 0."""
    runs = []
    for i, token in enumerate(tokens):
        runs += [(", ", role, weight)] * (i > 0) + [(f"<|coord_{token}|>", role, 0.0)]
    return runs


RESPONSE = (
    '{"objects": [{"desc": "red box", "bbox_2d": [<|coord_12|>, <|coord_22|>, <|coord_310|>, <|coord_402|>]}, '
    '{"desc": "dog", "bbox_2d": [<|coord_700|>, <|coord_0|>, <|coord_800|>, <|coord_90|>]}, '
    '{"desc": ""}]}<|im_end|>'
)
GTS = [box("red box", 10, 20, 300, 400), box("cat", 500, 501, 900, 901)]


def test_a_rollout_with_a_match_a_false_positive_a_dropped_record_and_a_miss(bytewise):
    sample = rollout_sample(bytewise, RESPONSE, GTS)
    assert described(sample, bytewise, Forward.ROLLOUT) == [
        ("ask: ", Role.PROMPT, 0.0),
        ('{"objects": [', Role.PREFIX, 0.0),
        ('{"desc": "', Role.MATCHED_PREFIX, 0.75),
        ("red box", Role.MATCHED_PREFIX, 0.0),
        ('", "bbox_2d": [', Role.MATCHED_PREFIX, 0.75),
        *geometry(Role.MATCHED_PREFIX, 0.75, 12, 22, 310, 402),
        ("]}", Role.MATCHED_PREFIX, 0.75),
        (", ", Role.PREFIX, 0.0),
        (RESPONSE[RESPONSE.index('{"desc": "dog') : RESPONSE.index(', {"desc": ""')], Role.FP_PREFIX, 0.0),
        (", ", Role.PREFIX, 0.0),
        ('{"desc": ""}', Role.DROPPED_PREFIX, 0.0),
        (', {"desc": "', Role.FN_TAIL, 2.0),  # an invalid prediction was dropped: structure counts twice
        ("cat", Role.FN_TAIL, 0.25),
        ('", "bbox_2d": [', Role.FN_TAIL, 2.0),
        *geometry(Role.FN_TAIL, 2.0, 500, 501, 900, 901),
        ("]}", Role.FN_TAIL, 2.0),
        ("]}", Role.CLOSURE, 1.0),
        ("<|im_end|>", Role.EOS, 1.0),
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
    [(Forward.TEACHER_FORCED, 1.0, 0.5), (Forward.ANCHOR, 1.0, 0.5), (Forward.SELF_CONTEXT, 1.0, 0.0)],
)
def test_ground_truth(bytewise, forward, struct, desc):
    prompt_ids = encode(bytewise, PROMPT)
    sample = TargetBuilder(bytewise).from_ground_truth(prompt_ids, GTS, sample_id="train.jsonl:1")
    gt = Role.GROUND_TRUTH
    assert described(sample, bytewise, forward) == [
        ("ask: ", Role.PROMPT, 0.0),
        ('{"objects": [{"desc": "', gt, struct),
        ("red box", gt, desc),
        ('", "bbox_2d": [', gt, struct),
        *geometry(gt, struct, 10, 20, 300, 400),
        (']}, {"desc": "', gt, struct),
        ("cat", gt, desc),
        ('", "bbox_2d": [', gt, struct),
        *geometry(gt, struct, 500, 501, 900, 901),
        ("]}", gt, struct),
        ("]}", Role.CLOSURE, 1.0),
        ("<|im_end|>", Role.EOS, 1.0),
    ]
    assert sample.box_bins_B4.tolist() == [list(obj.bins) for obj in GTS]
    assert (sample.prefix_length, sample.num_matched, sample.dropped_invalid) == (0, 0, False)


def test_an_image_without_objects_teaches_the_empty_container(bytewise):
    sample = TargetBuilder(bytewise).from_ground_truth(encode(bytewise, PROMPT), [], sample_id="a")
    assert described(sample, bytewise, Forward.TEACHER_FORCED)[1:] == [
        ('{"objects": [', Role.GROUND_TRUTH, 1.0),
        ("]}", Role.CLOSURE, 1.0),
        ("<|im_end|>", Role.EOS, 1.0),
    ]
    assert sample.box_positions_B4.shape == (0, 4)


RED = '{"desc": "red", "bbox_2d": [<|coord_1|>, <|coord_2|>, <|coord_30|>, <|coord_40|>]}'
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
    opening, *tail, closing, eos = described(sample, bytewise, Forward.ROLLOUT)[1:]
    assert opening == ('{"objects": [', Role.PREFIX, 0.0)
    assert "".join(text for text, _, _ in tail) == RED
    assert {role for _, role, _ in tail} == {Role.FN_TAIL}
    assert (closing, eos) == (("]}", Role.CLOSURE, 1.0), ("<|im_end|>", Role.EOS, 1.0))
    assert sample.num_matched == 0
    assert sample.num_boxes == num_missed


def test_all_found_appends_only_the_closing_brackets(bytewise):
    sample = rollout_sample(bytewise, '{"objects": [' + RED + "]}<|im_end|>", [box("red", 1, 2, 30, 40)])
    assert described(sample, bytewise, Forward.ROLLOUT)[-3:] == [
        ("]}", Role.MATCHED_PREFIX, 0.75),
        ("]}", Role.CLOSURE, 1.0),
        ("<|im_end|>", Role.EOS, 1.0),
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
    assert roles == [Role.MATCHED_PREFIX, Role.FN_TAIL]


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
    assert (', {"desc": "', Role.FN_TAIL, 1.0) in described(sample, bytewise, Forward.ROLLOUT)


# --- tokens that hold more than one thing ---------------------------------------------------------------


def roles_of_piece(sample, tok, piece):
    pieces = pieces_of(tok)
    places = [
        i for i, token_id in enumerate(sample.token_ids_T.tolist()) if pieces[token_id] == piece.encode()
    ]
    weights = ce_weights(sample, WEIGHTS, Forward.ROLLOUT).tolist()
    return [(Role(sample.roles_T[i]), weights[i]) for i in places]


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
        (Role.MATCHED_PREFIX, 0.75),  # a | b
        (Role.FP_PREFIX, 0.0),  # b | c
        (Role.FP_PREFIX, 0.0),  # c | d
    ]
    # The last `"}]}` is cut after the record; nothing was missed, so the closing makes the same token of it again.
    assert described(sample, tok, Forward.ROLLOUT)[-2:] == [
        ('"}]}', Role.CLOSURE, 1.0),
        ("<|im_end|>", Role.EOS, 1.0),
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
    assert roles_of_piece(sample, tok, "]}, {") == [(Role.FN_TAIL, 1.0)]


def test_the_opening_of_an_empty_container_is_context(make_tokenizer):
    tok = make_tokenizer('[{"')
    sample = rollout_sample(tok, "no idea<|im_end|>", [box("red", 1, 2, 30, 40)], pairing([], 0, 1))
    assert sample.prefix_length == 0
    assert roles_of_piece(sample, tok, '[{"') == [(Role.FN_TAIL, 1.0)]
    roles = sample.roles_T[sample.prompt_length :].tolist()
    opening = roles.index(Role.FN_TAIL)
    assert opening > 0
    assert set(roles[:opening]) == {Role.PREFIX}


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
    expected = (Role.MATCHED_PREFIX, 0.75) if is_supervised else (Role.PREFIX, 0.0)
    assert roles_of_piece(sample, tok, merge) == [expected]


def test_a_token_that_opens_the_container_and_a_matched_record_is_supervised(make_tokenizer):
    tok = make_tokenizer(' [{"')
    sample = rollout_sample(tok, '{"objects": [' + RED + "]}<|im_end|>", [box("red", 1, 2, 30, 40)])
    assert roles_of_piece(sample, tok, ' [{"') == [(Role.MATCHED_PREFIX, 0.75)]


def test_ids_without_text_are_not_taught(bytewise):
    """A padded vocabulary has ids that the tokenizer does not know; a model can still write them."""
    unknown = len(bytewise) + 7
    ids = encode(bytewise, '{"objects": [' + RED + "]}")
    at = ids.index(bytewise.convert_tokens_to_ids("<|coord_2|>"))
    sample = rollout_sample(bytewise, [*ids[:at], unknown, *ids[at:]], [box("red", 1, 2, 30, 40)])
    place = sample.token_ids_T.tolist().index(unknown)
    assert sample.roles_T[place] == Role.PREFIX
    assert ce_weights(sample, WEIGHTS, Forward.ROLLOUT)[place] == 0
    assert sample.token_ids_T[sample.box_positions_B4].tolist() == [
        bytewise.convert_tokens_to_ids([f"<|coord_{k}|>" for k in (1, 2, 30, 40)])
    ]


def test_closing_tokens_that_hold_the_end_of_a_record_are_closure(make_tokenizer):
    tok = make_tokenizer("}]}")
    sample = TargetBuilder(tok).from_ground_truth(encode(tok, PROMPT), GTS, sample_id="a")
    assert described(sample, tok, Forward.TEACHER_FORCED)[-3:] == [
        ("]", Role.GROUND_TRUTH, 1.0),
        ("}]}", Role.CLOSURE, 1.0),
        ("<|im_end|>", Role.EOS, 1.0),
    ]


def test_a_closing_token_that_reaches_into_a_description_keeps_its_weight(make_tokenizer):
    tok = make_tokenizer('t"}]}')
    builder = TargetBuilder(tok, field_order="geometry_first")
    sample = builder.from_ground_truth(encode(tok, PROMPT), GTS, sample_id="a")
    assert described(sample, tok, Forward.SELF_CONTEXT)[-3:] == [
        ("ca", Role.GROUND_TRUTH, 0.0),
        ('t"}]}', Role.CLOSURE, 1.0),
        ("<|im_end|>", Role.EOS, 1.0),
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


# --- what is refused, and what is dropped ----------------------------------------------------------------


def test_a_prompt_other_than_the_one_generated_from_is_an_error_that_shows_both(bytewise):
    parsed = parse_rollout(encode(bytewise, '{"objects": []}'), bytewise)
    match = pairing([], 0, 0)
    ours = encode(bytewise, "<|image_pad|><|image_pad|>ask")
    theirs = encode(bytewise, "<|image_pad|><|image_pad|><|image_pad|>ask")
    with pytest.raises(RolloutError, match=r"val\.jsonl:3") as error:
        TargetBuilder(bytewise).from_rollout(
            ours, parsed, match, [], generation_prompt_ids=theirs, sample_id="val.jsonl:3"
        )
    message = str(error.value)
    assert "Ours: 5 tokens, from token 2 on" in message
    assert "'ask'; the engine's: 6 tokens, from token 2 on" in message
    assert "'<|image_pad|>ask'" in message


def test_a_prompt_that_is_a_prefix_of_the_other_is_an_error(bytewise):
    parsed = parse_rollout(encode(bytewise, '{"objects": []}'), bytewise)
    with pytest.raises(RolloutError, match="from token 3 on"):
        TargetBuilder(bytewise).from_rollout(
            [1, 2, 3], parsed, pairing([], 0, 0), [], generation_prompt_ids=[1, 2, 3, 4], sample_id="a"
        )


@pytest.mark.parametrize("match", [pairing([(0, 0)], 2, 2), pairing([(0, 0)], 1, 1), pairing([(0, 5)], 1, 6)])
def test_a_match_of_other_objects_is_an_error(bytewise, match):
    with pytest.raises(ContractError, match=r"val\.jsonl:3: the match is of"):
        rollout_sample(bytewise, '{"objects": [' + RED + "]}", GTS, match)


def test_a_sample_longer_than_a_pack_fails_when_it_is_made(bytewise):
    with pytest.raises(
        ContractError, match=r"train\.jsonl:9 has \d+ tokens .*holds 50: raise global_max_length"
    ):
        TargetBuilder(bytewise, max_tokens=50).from_ground_truth([1], GTS, sample_id="train.jsonl:9")
    whole = TargetBuilder(bytewise).from_ground_truth([1], GTS, sample_id="a")
    assert TargetBuilder(bytewise, max_tokens=whole.num_tokens).from_ground_truth([1], GTS, sample_id="a")


def test_a_prefix_that_is_not_open_drops_the_sample(bytewise):
    ids = encode(bytewise, '{"objects": []}')
    closed = replace(parse_rollout(ids, bytewise), prefix_text='{"objects": []}', prefix_token_ids=ids)
    dropped = TargetBuilder(bytewise).from_rollout(
        [1], closed, pairing([], 0, 1), [GTS[0]], generation_prompt_ids=[1], sample_id="a"
    )
    assert isinstance(dropped, DroppedSample)
    assert (dropped.sample_id, dropped.reason) == ("a", DropReason.PREFIX_NOT_OPEN)
    assert "append-ready" in dropped.detail


def test_a_tokenizer_that_changes_the_text_drops_a_rollout_and_refuses_ground_truth(make_tokenizer):
    tok = make_tokenizer(normalizer=normalizers.Lowercase())
    gts = [box("Big Ben", 1, 2, 3, 4)]
    dropped = rollout_sample(tok, '{"objects": []}', gts)
    assert isinstance(dropped, DroppedSample)
    assert dropped.reason is DropReason.TAIL_CHANGED
    assert "Big Ben" in dropped.detail
    with pytest.raises(RecordError, match=r"sample a: the tokenizer changes the text"):
        TargetBuilder(tok).from_ground_truth([1], gts, sample_id="a")


def test_a_tokenizer_that_composes_accents_is_taught_the_composed_text(make_tokenizer):
    """Qwen's tokenizers bring text to NFC."""
    tok = make_tokenizer(normalizer=normalizers.NFC())
    sample = rollout_sample(tok, '{"objects": []}', [box("cafe\u0301", 1, 2, 3, 4)])
    assert isinstance(sample, EncodedSample)
    assert sample.target_text.startswith('{"objects": [{"desc": "caf\u00e9"')
    assert tok.decode(sample.target_ids) == sample.target_text


def ground_truth(tok):
    return TargetBuilder(tok).from_ground_truth(encode(tok, PROMPT), GTS, sample_id="train.jsonl:1")


def with_value(array, index, value):
    changed = array.copy()
    changed[index] = value
    return changed


BROKEN = {
    "a slot in the prompt": (
        lambda s: {"box_positions_B4": with_value(s.box_positions_B4, (0, 0), 2)},
        r"supervised coordinate at token 2 is outside the assistant's tokens 5\.\.",
    ),
    "a slot behind the end": (
        lambda s: {"box_positions_B4": with_value(s.box_positions_B4, (1, 3), s.num_tokens)},
        "is outside the assistant's tokens",
    ),
    "a slot on text": (
        lambda s: {"box_positions_B4": s.box_positions_B4 + 1},
        "which has role GROUND_TRUTH and type STRUCT",
    ),
    "a slot twice": (
        lambda s: {"box_positions_B4": s.box_positions_B4[[0, 0]]},
        "supervised twice",
    ),
    "a bin out of range": (
        lambda s: {"box_bins_B4": with_value(s.box_bins_B4, (0, 0), 1000)},
        r"true bins reach from 20 to 1000, expected 0\.\.999",
    ),
    "bins for fewer boxes": (lambda s: {"box_bins_B4": s.box_bins_B4[:1]}, "bins have shapes"),
    "a slot in a false positive": (
        lambda s: {"roles_T": with_value(s.roles_T, s.box_positions_B4[0], Role.FP_PREFIX)},
        "which has role FP_PREFIX",
    ),
    "roles of another length": (lambda s: {"roles_T": s.roles_T[:-1]}, "roles_T has shape"),
    "no prompt": (lambda s: {"prompt_length": 0}, "prompt_length is 0"),
    "prompt tokens marked as target": (lambda s: {"prompt_length": 6}, "first 6 tokens as prompt"),
    "no end token": (
        lambda s: {"types_T": with_value(s.types_T, -1, 1)},
        r"tokens of type EOS are at \[\], expected only the last one",
    ),
    "no closing token": (
        lambda s: {"roles_T": np.where(s.roles_T == Role.CLOSURE, Role.GROUND_TRUTH, s.roles_T)},
        r"CLOSURE tokens are at \[\]",
    ),
    "a text that does not end": (lambda s: {"target_text": '{"objects": ['}, "the target ends in"),
    "a prefix beyond the target": (lambda s: {"prefix_length": 10_000}, "prefix_length is 10000"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_sample_that_does_not_fit_together_cannot_exist(bytewise, case):
    sample = ground_truth(bytewise)
    change, message = BROKEN[case]
    with pytest.raises(ContractError, match=message) as error:
        replace(sample, **change(sample))
    assert "sample train.jsonl:1: " in str(error.value)


def test_a_sample_cannot_be_changed(bytewise):
    sample = ground_truth(bytewise)
    with pytest.raises(ValueError, match="read-only"):
        sample.token_ids_T[0] = 3
