"""Rollouts that are rewritten before they are taught: what stays, what is written where, and how it is spelled."""

from __future__ import annotations

import random
from dataclasses import asdict

import pytest
from codec_tokenizers import encode
from support.targets import box, described, geometry, pairing, rollout_sample

from coordexp.audit.rewrite_equations import rewrite_equations
from coordexp.codec.forms.choose import form_of
from coordexp.codec.parse import parse_rollout
from coordexp.codec.pieces import pieces_of
from coordexp.codec.serialize import serialize
from coordexp.losses.modules import ForwardKind
from coordexp.matching import match_objects
from coordexp.targets import TargetBuilder, TokenRole
from coordexp.targets.rewrite import PrefixRules
from coordexp.targets.sample import EncodedSample, PrefixEdits

RED, CAT, DOG = box("red", 1, 2, 30, 40), box("cat", 500, 501, 900, 901), box("dog", 700, 0, 800, 90)
DUPLICATE = box("red", 2, 3, 30, 40)  # IoU with RED .94


def answer(*objects, order="desc_first"):
    return serialize(objects, order) + "<|im_end|>"


def objects_of(sample, tok):
    parsed = parse_rollout(sample.target_ids.tolist(), tok)
    return [obj.as_box() for obj in parsed.objects]


def rewritten(tok, written, gts, pairs, **rules):
    return rollout_sample(
        tok, answer(*written), gts, pairing(pairs, len(written), len(gts)), rules=PrefixRules(**rules)
    )


def test_a_second_copy_leaves_and_the_first_is_taught(bytewise):
    sample = rewritten(bytewise, [RED, DUPLICATE, CAT], [RED, CAT], [(0, 0), (2, 1)], duplicate_iou=0.8)
    assert objects_of(sample, bytewise) == [RED, CAT]
    assert sample.edits == PrefixEdits(num_duplicates=1)
    assert (sample.num_matched, sample.num_boxes) == (2, 2)
    matched = TokenRole.MATCHED_PREFIX
    assert (
        described(sample, bytewise, ForwardKind.ROLLOUT)[-12:]
        == [
            ("]}", matched, 0.75),
            (", ", TokenRole.PREFIX, 0.0),
            ('{"desc": "', matched, 0.75),
            ("cat", matched, 0.0),
            ('", "bbox_2d": [', matched, 0.75),
            *geometry(matched, 0.75, 500, 501, 900, 901),
            ("]}", matched, 0.75),
            ("]}", TokenRole.CLOSURE, 1.0),
            ("<|im_end|>", TokenRole.EOS, 1.0),
        ][-12:]
    )


@pytest.mark.parametrize("pairs", [[(1, 0)], [(0, 0)]])
def test_the_copy_without_the_partner_leaves_whichever_comes_first(bytewise, pairs):
    sample = rewritten(bytewise, [RED, DUPLICATE], [RED], pairs, duplicate_iou=0.8)
    assert objects_of(sample, bytewise) == [[RED, DUPLICATE][pairs[0][0]]]


def test_of_copies_without_a_partner_the_first_stays(bytewise):
    sample = rewritten(bytewise, [RED, DUPLICATE, RED], [CAT], [], duplicate_iou=0.8)
    assert objects_of(sample, bytewise) == [RED, CAT]
    assert sample.edits.num_duplicates == 2


def test_a_box_near_a_missed_object_makes_room_for_it_where_it_stood(bytewise):
    near = box("cat", 520, 501, 999, 901)  # IoU with CAT 380 / 499 = .76
    sample = rewritten(bytewise, [near, DOG], [CAT, DOG], [(1, 1)], replace_above_iou=0.7)
    assert objects_of(sample, bytewise) == [CAT, DOG]
    assert sample.edits == PrefixEdits(num_replaced=1, num_written=1)
    tail = TokenRole.FN_TAIL
    assert described(sample, bytewise, ForwardKind.ROLLOUT)[1:6] == [
        ('{"objects": [', TokenRole.PREFIX, 0.0),
        ('{"desc": "', tail, 1.0),
        ("cat", tail, 0.25),
        ('", "bbox_2d": [', tail, 1.0),
        ("<|coord_500|>", tail, 0.0),
    ]
    assert sample.box_bins_B4.tolist() == [list(DOG.bins), list(CAT.bins)]
    places = sample.token_ids_T[sample.box_positions_B4].tolist()
    assert [bytewise.convert_ids_to_tokens(row)[0] for row in places] == ["<|coord_700|>", "<|coord_500|>"]
    far = rewritten(bytewise, [near, DOG], [CAT, DOG], [(1, 1)], replace_above_iou=0.8)
    assert objects_of(far, bytewise) == [near, DOG, CAT]
    assert far.edits == PrefixEdits()


def test_each_missed_object_takes_one_place_that_of_the_box_nearest_to_it(bytewise):
    near, nearest = box("cat", 540, 501, 900, 901), box("cat", 510, 501, 900, 901)
    sample = rewritten(bytewise, [near, nearest], [CAT], [], replace_above_iou=0.5)
    assert objects_of(sample, bytewise) == [near, CAT]


def test_predictions_without_a_partner_and_broken_records_leave(bytewise):
    written = (
        answer(DOG, RED)[: -len("]}<|im_end|>")] + ', {"desc": ""}, {"desc": "x", "bbox_2d": [1]}]}<|im_end|>'
    )
    sample = rollout_sample(
        bytewise, written, [RED], pairing([(1, 0)], 2, 1), rules=PrefixRules(drop_unmatched=True)
    )
    assert sample.target_text == answer(RED)
    assert sample.edits == PrefixEdits(num_unmatched=1)
    assert sample.dropped_invalid  # it did happen
    assert rewritten(bytewise, [DOG], [], [], drop_unmatched=True).target_text == answer()


def test_missed_objects_stand_in_the_order_of_the_ground_truth(bytewise):
    gts = [box(name, 10 * n, n, 10 * n + 5, n + 5) for n, name in enumerate(["a", "b", "c", "d"])]
    sample = rewritten(bytewise, [gts[1], DOG, gts[2]], gts, [(0, 1), (2, 2)], missed_in_order=True)
    assert objects_of(sample, bytewise) == [gts[0], gts[1], DOG, gts[2], gts[3]]
    assert sample.edits == PrefixEdits(num_written=1)  # the last one is appended as ever
    assert (sample.num_matched, sample.num_boxes) == (2, 4)


def test_a_rule_with_nothing_to_do_changes_no_token(tok):
    ids = encode(tok, answer(RED, CAT))
    plain = rollout_sample(tok, ids, [RED, CAT, DOG])
    ruled = rollout_sample(
        tok, ids, [RED, CAT, DOG], rules=PrefixRules(duplicate_iou=0.5, replace_above_iou=0.5)
    )
    for name in ("token_ids_T", "roles_T", "box_positions_B4", "box_bins_B4"):
        assert getattr(ruled, name).tolist() == getattr(plain, name).tolist()


def test_without_a_container_nothing_is_rewritten(bytewise):
    sample = rollout_sample(
        bytewise, "no boxes", [RED], rules=PrefixRules(drop_unmatched=True, missed_in_order=True)
    )
    assert sample.target_text == answer(RED)


def random_objects(rng, number):
    found = []
    for _ in range(number):
        x, y = rng.randrange(900), rng.randrange(900)
        desc = rng.choice(["red box", "cat", 'a "quoted" dog', "naïve café", "猫", "x]}", "{y}, "])
        found.append(box(desc, x, y, x + rng.randint(1, 99), y + rng.randint(1, 99)))
    return found


@pytest.mark.parametrize("order", ["desc_first", "geometry_first"])
def test_a_rewritten_answer_is_spelled_as_a_fresh_encoding_and_keeps_the_models_tokens(tok, order):
    """Objects leave and are inserted at random; what is kept has its ids, seams are those of the whole text."""
    rng, builder_of = random.Random(order), lambda rules: TargetBuilder(tok, field_order=order, rules=rules)
    num_equal = num_cases = 0
    for _ in range(60):
        written, missed = random_objects(rng, rng.randint(1, 5)), random_objects(rng, rng.randint(0, 3))
        matched = sorted(rng.sample(range(len(written)), rng.randint(0, len(written))))
        gts = sorted([written[i] for i in matched] + missed, key=lambda obj: (obj.bins[1], obj.bins[0]))
        pairs = [(i, gts.index(written[i])) for i in matched]
        if len({gt for _, gt in pairs}) < len(pairs):
            continue
        ids = encode(tok, answer(*written, order=order))
        rules = PrefixRules(drop_unmatched=rng.random() < 0.7, missed_in_order=True)
        sample = builder_of(rules).from_rollout(
            [1], parse_rollout(ids, tok, field_order=order), pairing(pairs, len(written), len(gts)), gts,
            generation_prompt_ids=[1], sample_id="s",
        )  # fmt: skip
        assert isinstance(sample, EncodedSample)
        found = [
            obj.as_box() for obj in parse_rollout(sample.target_ids.tolist(), tok, field_order=order).objects
        ]
        kept = [written[i] for i in matched] if rules.drop_unmatched else written
        assert [obj for obj in found if obj in kept] == kept
        assert sorted(obj.bins for obj in found) == sorted(obj.bins for obj in kept + missed)
        assert pieces_of(tok).join(sample.target_ids[:-1].tolist()).decode() == serialize(found, order)
        num_cases += 1
        num_equal += sample.target_ids.tolist() == encode(tok, answer(*found, order=order))
        slots = {
            tuple(row): bins
            for row, bins in zip(sample.box_positions_B4.tolist(), sample.box_bins_B4.tolist(), strict=True)
        }
        assert sorted(slots.values()) == sorted(list(obj.bins) for obj in gts)
    assert num_cases > 30
    splits_words = "Sequence" in type(tok.backend_tokenizer.pre_tokenizer).__name__
    assert not splits_words or num_equal >= 0.95 * num_cases


@pytest.mark.parametrize("seed", range(12))
def test_the_audit_counts_the_same_from_boxes_and_pairs(bytewise, seed):
    rng = random.Random(seed)
    gts = random_objects(rng, 4)
    written = [near(rng, rng.choice(gts)) for _ in range(5)] + random_objects(rng, 2)
    rng.shuffle(written)
    match = match_objects(written, gts, gate=0.6)
    targets = {
        "drop_duplicates_above_iou": rng.choice([None, 0.4]),
        "replace_above_iou": rng.choice([None, 0.2]),
        "drop_unmatched": rng.random() < 0.5,
        "missed": rng.choice(["append", "in_order"]),
    }
    rules = PrefixRules(
        targets["drop_duplicates_above_iou"],
        targets["replace_above_iou"],
        targets["drop_unmatched"],
        targets["missed"] == "in_order",
    )
    sample = rollout_sample(bytewise, answer(*written), gts, match, rules=rules)
    dumped = {
        "descs": [obj.desc for obj in written], "bins": [obj.bins for obj in written], "matched": match.matched,
        "num_gt": len(gts), "gt_bins": [obj.bins for obj in gts], "target": {}, "prefix_is_fallback": False,
    }  # fmt: skip
    edits = asdict(sample.edits)
    counted = {
        key.removeprefix("rollout/prefix_"): number
        for key, number in rewrite_equations([dumped], targets).items()
    }
    names = {
        "duplicates_dropped": "num_duplicates",
        "replaced": "num_replaced",
        "unmatched_dropped": "num_unmatched",
        "missed_written": "num_written",
    }
    assert counted == {name: edits[names[name]] for name in counted}
    assert sum(edits.values()) == sum(counted.values())  # what has no counter did not happen


def near(rng, obj):
    """The object with its corners moved a little."""
    x1, y1, x2, y2 = obj.bins
    dx, dy = (rng.randint(-(side // 2), side // 2) for side in (x2 - x1, y2 - y1))
    return box(obj.desc, max(0, x1 + dx), max(0, y1 + dy), x2 + max(dx, 0), y2 + max(dy, 0))


@pytest.mark.parametrize("name", ["compact", "qwen", "coordjson_numbers"])
def test_other_forms_keep_what_stays_and_what_was_missed(tok, name):
    """Names are shared in the compact form, so that a box may lose the one that it stood under."""
    rng, form = random.Random(4), form_of(name)

    def corners():
        return *sorted(rng.sample(range(400), 2)), *sorted(rng.sample(range(400, 999), 2))

    def objects():
        return [box(rng.choice(("cat", "red box")), *corners()) for _ in range(rng.randint(1, 5))]

    for _ in range(25):
        preds, gts = objects(), objects()
        num_pairs = rng.randint(0, min(len(preds), len(gts)))
        partners = rng.sample(range(len(gts)), num_pairs)
        pairs = list(zip(sorted(rng.sample(range(len(preds)), num_pairs)), partners, strict=True))
        in_order = rng.random() < 0.5
        sample = rollout_sample(
            tok, form.serialize(preds) + "<|im_end|>", gts, pairing(pairs, len(preds), len(gts)), form=form,
            rules=PrefixRules(drop_unmatched=True, missed_in_order=in_order),
        )  # fmt: skip
        assert isinstance(sample, EncodedSample)
        found = [obj.as_box() for obj in form.parse(sample.target_ids.tolist(), tok).objects]
        kept = [preds[pred] for pred, _ in pairs]
        missed = [gt for index, gt in enumerate(gts) if index not in partners]
        if in_order:
            assert sorted(found, key=repr) == sorted(kept + missed, key=repr)
            assert [obj for obj in found if obj in kept] == kept
        else:
            assert found == kept + missed
            assert sample.target_text == form.serialize(kept + missed) + "<|im_end|>"
