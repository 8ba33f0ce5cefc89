"""What holds for every rollout, match and tokenizer: text, order, false-positive neutrality, rows, counts."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from codec_fuzz import mutate_ids, random_objects, random_rollout
from codec_tokenizers import ENCODERS, encode
from hypothesis import given, settings
from hypothesis import strategies as st

from coordexp.codec.coord_vocab import CoordVocab
from coordexp.codec.forms.choose import form_of
from coordexp.codec.parse import ParsedObject, parse_rollout
from coordexp.codec.pieces import pieces_of
from coordexp.codec.schema import BoxObject
from coordexp.codec.serialize import append_fragment, serialize
from coordexp.codec.token_types import TokenType
from coordexp.losses.columns import CoordColumns
from coordexp.losses.inputs import IGNORE_INDEX, SupervisedRows, TextRole
from coordexp.losses.modules import ForwardKind, ModuleSpec, ObjectiveSpec, TokenCE
from coordexp.losses.objective import Stage2Objective
from coordexp.matching import MatchResult, match_objects
from coordexp.targets import EncodedSample, TargetBuilder, TokenRole
from coordexp.targets.counts import count_supervision, step_counts
from coordexp.targets.rows import ce_weights, stage2_rows

seeds = st.integers(0, 2**32 - 1)
MANY = settings(max_examples=80, deadline=None)
FEW = settings(max_examples=25, deadline=None)
PROMPT = "<|im_start|>user\nask<|im_end|>\n<|im_start|>assistant\n"


def random_match(rng, num_preds, num_gts):
    """Any one-to-one pairing, geometry ignored."""
    preds, gts = rng.sample(range(num_preds), num_preds), rng.sample(range(num_gts), num_gts)
    pairs = sorted(zip(preds, gts, strict=False))[: rng.randint(0, min(num_preds, num_gts))]
    matched_preds, matched_gts = {p for p, _ in pairs}, {g for _, g in pairs}
    return MatchResult(
        matched=pairs,
        maskious=[0.5] * len(pairs),
        unmatched_pred=[p for p in range(num_preds) if p not in matched_preds],
        unmatched_gt=[g for g in range(num_gts) if g not in matched_gts],
        num_candidates=0,
        gating_rejections=0,
    )


def moved(rng, obj):
    """The object with every coordinate off by up to 10 bins."""
    bins = [min(max(k + rng.randint(-10, 10), 0), 999) for k in obj.bins]
    if obj.kind == "bbox_2d":
        bins = [min(bins[0], bins[2]), min(bins[1], bins[3]), max(bins[0], bins[2]), max(bins[1], bins[3])]
    return BoxObject(obj.desc, obj.kind, tuple(bins))


def random_target(seed, tok):
    """A rollout with any number of faults, ground truth near it and elsewhere, a real or an arbitrary match."""
    rng = random.Random(seed)
    response = random_rollout(rng, tok)
    if rng.random() < 0.4:
        response = mutate_ids(rng, response, rng.randint(1, 3), max_id=len(tok) + 20)
    parsed = parse_rollout(response, tok)
    gts = [moved(rng, obj) for obj in parsed.objects if rng.random() < 0.7]
    gts += random_objects(rng, rng.randint(0, 3))
    rng.shuffle(gts)
    if rng.random() < 0.5:
        match = match_objects(parsed.objects, gts)
    else:
        match = random_match(rng, len(parsed.objects), len(gts))
    prompt_ids = encode(tok, PROMPT)
    sample = TargetBuilder(tok).from_rollout(
        prompt_ids, parsed, match, gts, generation_prompt_ids=tuple(prompt_ids), sample_id=f"seed {seed}"
    )
    assert isinstance(sample, EncodedSample)
    return sample, parsed, match, gts


@MANY
@given(seed=seeds)
def test_the_target_is_the_prefix_and_the_missed_objects(tok, seed):
    sample, parsed, match, gts = random_target(seed, tok)
    missed = gts if parsed.prefix_is_fallback else [gts[g] for g in match.unmatched_gt]
    prompt_ids = encode(tok, PROMPT)
    assert sample.token_ids_T[: sample.prompt_length].tolist() == prompt_ids
    num_verbatim = parsed.num_verbatim_prefix_tokens
    assert (
        sample.target_ids[: sample.prefix_length].tolist()
        == parsed.response_token_ids[: sample.prefix_length]
    )
    assert num_verbatim - 1 <= sample.prefix_length <= num_verbatim or parsed.prefix_is_fallback
    expected = parsed.prefix_text + append_fragment(missed, parsed.prefix_text) + "<|im_end|>"
    assert sample.target_text == expected
    assert pieces_of(tok).join(sample.target_ids.tolist()).decode(errors="replace") == expected
    again = parse_rollout(sample.target_ids.tolist(), tok)
    assert [obj.as_box() for obj in again.objects] == [*(o.as_box() for o in parsed.prefix_objects), *missed]
    assert not again.truncated


@MANY
@given(seed=seeds)
def test_slots_are_the_matched_and_the_missed_boxes(tok, seed):
    sample, parsed, match, gts = random_target(seed, tok)
    bin_of = pieces_of(tok).coord_vocab.bin_of
    pairs = [] if parsed.prefix_is_fallback else match.matched
    missed = gts if parsed.prefix_is_fallback else [gts[g] for g in match.unmatched_gt]
    written = [parsed.objects[p] for p, _ in pairs] + list(missed)
    taught = [gts[g] for _, g in pairs] + list(missed)
    is_box = [obj.kind == "bbox_2d" for obj in written]
    tokens_B4 = [[bin_of(int(sample.token_ids_T[at])) for at in row] for row in sample.box_positions_B4]
    assert tokens_B4 == [list(obj.bins) for obj, box in zip(written, is_box, strict=True) if box]
    for bins, obj in zip(
        sample.box_bins_B4.tolist(), [o for o, box in zip(taught, is_box, strict=True) if box], strict=True
    ):
        xs, ys = obj.bins[::2], obj.bins[1::2]
        assert bins == [min(xs), min(ys), max(xs), max(ys)]
    assert len(sample.poly_positions_N) == sum(len(obj.bins) for obj in written if obj.kind == "poly")
    assert sample.num_matched == len(pairs)


@MANY
@given(seed=seeds)
def test_supervised_tokens_of_the_prefix_hold_matched_records_and_separators_only(tok, seed):
    """Checked on characters, by painting each one with what it belongs to."""
    sample, parsed, match, _ = random_target(seed, tok)
    data = pieces_of(tok).join(parsed.response_token_ids)
    if parsed.prefix_is_fallback or "\ufffd" in data.decode(errors="replace"):
        return  # characters and bytes do not correspond
    taught = {p for p, _ in match.matched}
    paint = ["gap"] * len(data)
    body = len(parsed.text[: parsed.text.index("[") + 1].encode())
    paint[:body] = ["opening"] * body
    objects = iter(range(len(parsed.objects)))
    for record in parsed.records:
        start, stop = (len(parsed.text[:at].encode()) for at in record.span)
        is_taught = isinstance(record, ParsedObject) and next(objects) in taught
        paint[start:stop] = ["matched" if is_taught else "context"] * (stop - start)
    byte = 0
    roles, types = sample.roles_T[sample.prompt_length :], sample.types_T[sample.prompt_length :]
    for index, token_id in enumerate(parsed.prefix_token_ids[: sample.prefix_length]):
        piece = pieces_of(tok)[token_id]
        held = set(paint[byte : byte + len(piece)])
        in_gaps = [c for c, what in zip(piece, paint[byte:], strict=False) if what == "gap"]
        byte += len(piece)
        is_supervised = roles[index] == TokenRole.MATCHED_PREFIX
        if is_supervised:
            assert "matched" in held
            assert "context" not in held
            assert bytes(in_gaps).strip(b" \t\r\n") in (b"", b",")
        else:
            assert held != {"matched"}
        if held == {"context"}:
            assert roles[index] in (TokenRole.FP_PREFIX, TokenRole.DROPPED_PREFIX)
        if types[index] == TokenType.COORD and not is_supervised:
            assert index + sample.prompt_length not in sample.box_positions_B4


def other_desc(rng, tok):
    """Tokens of another description, no quote or backslash in it."""
    return encode(tok, "".join(rng.choices("abcxyz0猫", k=rng.randint(1, 6))))


def with_other_false_positives(rng, tok, ids, parsed, false_positives, *, same_length):
    """The response with every coordinate, and every inner description token, of these records changed."""
    vocab, changed, pos = CoordVocab.from_tokenizer(tok), [], 0
    edits = {}
    for index in false_positives:
        obj = parsed.objects[index]
        (x1, x2), (y1, y2) = (sorted(rng.sample(range(1000), 2)) for _ in range(2))
        bins = (x1, y1, x2, y2) if obj.kind == "bbox_2d" else rng.choices(range(1000), k=len(obj.bins))
        for at, k in zip(obj.token_positions, bins, strict=True):
            edits[at, at + 1] = [vocab.ids[k]]
        inner = [at for at in range(*obj.token_span) if at in desc_inside(tok, parsed, obj)]
        if inner:
            desc = other_desc(rng, tok)
            edits[inner[0], inner[-1] + 1] = (
                desc * len(inner) if not same_length else [rng.choice(desc) for _ in inner]
            )
    for (start, stop), new in sorted(edits.items()):
        changed += ids[pos:start] + new
        pos = stop
    return changed + ids[pos:]


def desc_inside(tok, parsed, obj):
    """Positions of the tokens that lie wholly inside an ASCII response's desc string."""
    positions, byte = set(), 0
    for index, token_id in enumerate(parsed.response_token_ids):
        size = len(pieces_of(tok)[token_id])
        if obj.desc_span[0] <= byte and byte + size <= obj.desc_span[1]:
            positions.add(index)
        byte += size
    return positions


def supervision(sample, columns):
    """Everything the losses see of a sample except where its rows are."""
    rows = stage2_rows([sample], [0], columns)
    return {
        "targets": rows.targets_R.tolist(),
        "roles": rows.roles_R.tolist(),
        "bins": rows.bins_N.tolist(),
        "dropped": rows.dropped_invalid_R.tolist(),
    }, rows.positions_R.tolist()


@FEW
@given(seed=seeds, encoder=st.sampled_from(list(ENCODERS)), same_length=st.booleans())
def test_false_positives_change_no_row_target_bin_or_weight(tok, seed, encoder, same_length):
    rng = random.Random(seed)
    columns = CoordColumns(CoordVocab.from_tokenizer(tok).ids)
    objects = random_objects(rng, rng.randint(1, 5), words=("red", "box", "cat", "stop sign", "n0"))
    order = rng.choice(("desc_first", "geometry_first"))
    ids = ENCODERS[encoder](tok, serialize(objects, order) + "<|im_end|>")
    parsed = parse_rollout(ids, tok)
    gts = random_objects(rng, rng.randint(1, 4))
    match = random_match(rng, len(objects), len(gts))
    other_ids = with_other_false_positives(
        rng, tok, ids, parsed, match.unmatched_pred, same_length=same_length
    )
    other = parse_rollout(other_ids, tok)
    assert len(other.objects) == len(objects)
    builder = TargetBuilder(tok, field_order=order)
    samples = [
        builder.from_rollout([1, 2], p, match, gts, generation_prompt_ids=[1, 2], sample_id="a")
        for p in (parsed, other)
    ]
    (seen, positions), (other_seen, other_positions) = (supervision(s, columns) for s in samples)
    assert seen == other_seen
    if same_length:
        assert positions == other_positions
    if match.unmatched_pred:
        assert samples[0].token_ids_T.tolist() != samples[1].token_ids_T.tolist()


# --- rows and counts --------------------------------------------------------------------------------------


def random_ground_truth(seed, tok, poly_share=0.3):
    rng = random.Random(seed)
    objects = random_objects(rng, rng.randint(0, 4), poly_share=poly_share)
    prompt_ids = [rng.randrange(len(tok) - 1000) for _ in range(rng.randint(1, 6))]
    return TargetBuilder(tok).from_ground_truth(prompt_ids, objects, sample_id=str(seed))


@FEW
@given(sample_seeds=st.lists(seeds, min_size=1, max_size=4), packed=st.booleans())
def test_rows_of_ground_truth_are_those_of_the_labels(tok, sample_seeds, packed):
    """Reference: unshifted labels of the targets, shifted by `SupervisedRows.from_labels`. Boxes come first."""
    columns = CoordColumns(CoordVocab.from_tokenizer(tok).ids)
    samples = [random_ground_truth(seed, tok) for seed in sample_seeds]
    lengths = [sample.num_tokens for sample in samples]
    if packed:
        starts, shape = np.cumsum([0, *lengths[:-1]]).tolist(), (1, sum(lengths))
    else:
        starts, shape = [b * max(lengths) for b in range(len(samples))], (len(samples), max(lengths))
    labels = torch.full(shape, IGNORE_INDEX).flatten()
    for sample, start in zip(samples, starts, strict=True):
        target = torch.tensor(sample.target_ids)
        labels[start + sample.prompt_length :][: len(target)] = target
    expected = SupervisedRows.from_labels(labels.view(shape), columns)
    rows = stage2_rows(samples, starts, columns)
    assert rows.num_text == expected.num_text
    order = torch.cat(
        [torch.arange(rows.num_text), rows.num_text + rows.positions_R[rows.num_text :].argsort()]
    )
    for name in ("positions_R", "targets_R"):
        assert torch.equal(getattr(rows, name)[order], getattr(expected, name))
    assert torch.equal(rows.bins_N[order[rows.num_text :] - rows.num_text], expected.bins_N)
    assert rows.num_boxes == sum(sample.num_boxes for sample in samples)
    of_boxes = rows.positions_R[rows.num_text :][: 4 * rows.num_boxes] + 1
    assert of_boxes.tolist() == [
        int(at) + start
        for sample, start in zip(samples, starts, strict=True)
        for at in sample.box_positions_B4.ravel()
    ]


@FEW
@given(sample_seeds=st.lists(seeds, min_size=1, max_size=4))
def test_stage2_rows_point_at_the_token_before(tok, sample_seeds):
    columns = CoordColumns(CoordVocab.from_tokenizer(tok).ids)
    samples = [random_target(seed, tok)[0] for seed in sample_seeds]
    starts = np.cumsum([0, *(sample.num_tokens for sample in samples[:-1])]).tolist()
    rows = stage2_rows(samples, starts, columns)
    ids = torch.cat([torch.tensor(sample.token_ids_T) for sample in samples])
    types = torch.cat([torch.tensor(sample.types_T) for sample in samples])
    text, coord = rows.positions_R[: rows.num_text] + 1, rows.positions_R[rows.num_text :] + 1
    assert rows.positions_R.unique().numel() == rows.num_rows
    assert ids[text].tolist() == rows.targets_R[: rows.num_text].tolist()
    assert set(types[coord].tolist()) <= {TokenType.COORD}
    assert TokenType.COORD not in types[text].tolist()
    assert rows.targets_R[rows.num_text :].tolist() == [columns.ids[k] for k in rows.bins_N.tolist()]
    num_slots = sum(sample.box_positions_B4.size + len(sample.poly_positions_N) for sample in samples)
    assert rows.num_coord == num_slots
    # Rows of a batch are the rows of its samples, moved.
    parts = [stage2_rows([sample], [start], columns) for sample, start in zip(samples, starts, strict=True)]
    for name in ("positions_R", "targets_R"):
        whole = getattr(rows, name)
        assert whole[: rows.num_text].tolist() == [
            v for part in parts for v in getattr(part, name)[: part.num_text].tolist()
        ]
        of_slots = [getattr(part, name)[part.num_text :].tolist() for part in parts]
        boxes = [v for part, own in zip(parts, of_slots, strict=True) for v in own[: 4 * part.num_boxes]]
        polygons = [v for part, own in zip(parts, of_slots, strict=True) for v in own[4 * part.num_boxes :]]
        assert whole[rows.num_text :].tolist() == boxes + polygons
    assert rows.roles_R.tolist() == [role for part in parts for role in part.roles_R.tolist()]


TOKEN_CE = TokenCE(
    desc_ce_weight=0.5,
    self_context_struct_ce_weight=0.1,
    rollout_fn_desc_weight=0.25,
    rollout_matched_prefix_struct_weight=0.75,
    rollout_drop_invalid_struct_ce_multiplier=3.0,
)


@FEW
@given(seed=seeds)
def test_weights_per_token_follow_the_table(tok, seed):
    """w_t of channel B, written down once more from the rules."""
    sample, parsed, _, _ = random_target(seed, tok)
    weights = ce_weights(sample, TOKEN_CE, ForwardKind.ROLLOUT).tolist()
    tail_struct = 3.0 if parsed.dropped_invalid else 1.0
    for weight, role, token_type in zip(
        weights, sample.roles_T.tolist(), sample.types_T.tolist(), strict=True
    ):
        if role in (TokenRole.CLOSURE, TokenRole.EOS):
            assert weight == 1.0
        elif role == TokenRole.FN_TAIL and token_type == TokenType.STRUCT:
            assert weight == tail_struct
        elif role == TokenRole.FN_TAIL and token_type == TokenType.DESC:
            assert weight == 0.25
        elif role == TokenRole.MATCHED_PREFIX and token_type == TokenType.STRUCT:
            assert weight == 0.75
        else:
            assert weight == 0.0


@FEW
@given(sample_seeds=st.lists(seeds, max_size=4))
def test_counts_are_those_of_the_rows(tok, sample_seeds):
    columns = CoordColumns(CoordVocab.from_tokenizer(tok).ids)
    samples = [random_target(seed, tok)[0] for seed in sample_seeds]
    rows = [stage2_rows([sample], [0], columns) for sample in samples]
    counts = count_supervision(samples)
    objective = Stage2Objective(ObjectiveSpec((ModuleSpec("token_ce", True, 1.0, ("A", "B"), TOKEN_CE),)))
    totals = step_counts(rows, objective, ForwardKind.ROLLOUT)
    assert set(totals) == {"B_rollout_text", "B_coord/boxes", "B_coord/slots", "B_coord/text_gate"}
    assert totals["B_coord/boxes"].item() == sum(sample.num_boxes for sample in samples)
    assert totals["B_coord/slots"].item() == sum(part.num_coord for part in rows)
    in_prefix = [
        int(sample.roles_T[part.positions_R[part.num_text :] + 1].tolist().count(TokenRole.MATCHED_PREFIX))
        for sample, part in zip(samples, rows, strict=True)
    ]
    assert counts.num_prefix_coord == sum(in_prefix)
    assert counts.num_matched == sum(sample.num_matched for sample in samples)
    weights = [ce_weights(sample, TOKEN_CE, ForwardKind.ROLLOUT) for sample in samples]
    assert totals["B_rollout_text"].item() == pytest.approx(sum(float(w.sum()) for w in weights))
    eos = {TextRole.EOS}
    gated = sum(
        int((w > 0).sum()) - sum(role in eos for role in part.roles_R.tolist())
        for w, part in zip(weights, rows, strict=True)
    )
    assert totals["B_coord/text_gate"].item() == gated


def test_lengths_and_rows_of_a_small_sample(bytewise):
    """4 prompt tokens; prefix `{"objects": [` (13) + one record; a miss with the desc `ab`; `]}` and the end."""
    record = '{"desc": "c", "bbox_2d": [<|coord_10|>, <|coord_20|>, <|coord_300|>, <|coord_400|>]}'
    parsed = parse_rollout(encode(bytewise, '{"objects": [' + record + "]}"), bytewise)
    gts = [BoxObject("c", "bbox_2d", (10, 20, 310, 390)), BoxObject("ab", "bbox_2d", (500, 500, 600, 600))]
    sample = TargetBuilder(bytewise).from_rollout(
        [1, 2, 3, 4],
        parsed,
        match_objects(parsed.objects, gts),
        gts,
        generation_prompt_ids=[1, 2, 3, 4],
        sample_id="a",
    )
    record_tokens = len('{"desc": "c", "bbox_2d": [') + 4 + 3 * len(", ") + len("]}")
    assert sample.prefix_length == 13 + record_tokens
    assert sample.appended_length == len(", ") + record_tokens + 1 + len("]}") + 1
    rows = stage2_rows([sample], [0], CoordColumns(CoordVocab.from_tokenizer(bytewise).ids))
    assert rows.num_text == record_tokens - 4 - 1 + len(", ") + record_tokens - 4 + 1 + len("]}") + 1
    assert (rows.num_boxes, rows.num_coord) == (2, 8)
    counts = count_supervision([sample, sample])
    assert (counts.num_prefix_coord, counts.num_matched) == (8, 2)


@FEW
@given(seed=seeds, name=st.sampled_from(["coordjson_numbers", "qwen"]))
def test_numbers_of_appended_objects_are_text_and_those_of_the_rollout_are_not_taught(tok, seed, name):
    rng, form = random.Random(seed), form_of(name)
    preds, gts = random_objects(rng, rng.randint(0, 3)), random_objects(rng, rng.randint(0, 3))
    parsed = form.parse(encode(tok, form.serialize(preds) + "<|im_end|>"), tok)
    match = random_match(rng, len(preds), len(gts))
    prompt_ids = encode(tok, PROMPT)
    sample = TargetBuilder(tok, form=form).from_rollout(
        prompt_ids, parsed, match, gts, generation_prompt_ids=prompt_ids, sample_id="numbers"
    )
    assert isinstance(sample, EncodedSample)
    missed = [gts[index] for index in match.unmatched_gt]
    assert sample.target_text == form.serialize(preds + missed) + "<|im_end|>"
    assert sample.box_positions_B4.size == sample.poly_positions_N.size == 0
    weights_T = ce_weights(sample, TokenCE(1.0, 0.1, 1.0, 0.0, 1.0), ForwardKind.ROLLOUT)
    is_number_T = sample.types_T == TokenType.COORD
    is_tail_T = np.arange(sample.num_tokens) >= sample.prompt_length + sample.prefix_length
    assert (weights_T.numpy()[is_number_T & is_tail_T] > 0).all()
    assert (weights_T.numpy()[is_number_T & ~is_tail_T] == 0).all()
    num_digits = int(sum(is_number_T & is_tail_T))
    assert (num_digits > 0) is bool(missed)


@FEW
@given(seed=seeds)
def test_compact_targets_share_names_and_have_a_slot_for_every_coordinate(tok, seed):
    rng, form = random.Random(seed), form_of("compact")
    names = ("cat", "dog", 'a "b"\n]')

    def objects():
        found = [obj for obj in random_objects(rng, rng.randint(0, 4)) if obj.kind == "bbox_2d"]
        return [BoxObject(rng.choice(names), obj.kind, obj.bins) for obj in found]

    preds, gts = objects(), objects()
    ids = encode(tok, form.serialize(preds) + "<|im_end|>")
    parsed = form.parse(ids if rng.random() < 0.5 else ids[: rng.randint(0, len(ids))], tok)
    match = random_match(rng, len(parsed.objects), len(gts))
    prompt_ids = encode(tok, PROMPT)
    sample = TargetBuilder(tok, form=form).from_rollout(
        prompt_ids, parsed, match, gts, generation_prompt_ids=prompt_ids, sample_id="compact"
    )
    assert isinstance(sample, EncodedSample)
    pairs = [] if parsed.prefix_is_fallback else match.matched
    missed = gts if parsed.prefix_is_fallback else [gts[index] for index in match.unmatched_gt]
    kept = [obj.as_box() for obj in parsed.prefix_objects]
    assert sample.target_text == form.serialize(kept + missed) + "<|im_end|>"
    assert sample.box_bins_B4.tolist() == [list(gts[gt].bins) for _, gt in pairs] + [
        list(gt.bins) for gt in missed
    ]
    assert (sample.types_T[sample.box_positions_B4] == TokenType.COORD).all()
    whole = TargetBuilder(tok, form=form).from_ground_truth(prompt_ids, kept + missed, sample_id="whole")
    assert whole.target_text == sample.target_text
    assert whole.token_ids_T.tolist() == sample.token_ids_T.tolist()
