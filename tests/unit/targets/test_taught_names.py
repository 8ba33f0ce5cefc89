"""Names of matched predictions on the model's own prefix: what is taught where, written down."""

from __future__ import annotations

from dataclasses import replace

import pytest
from codec_tokenizers import encode
from support.targets import PROMPT, WEIGHTS, box, pairing, rollout_sample

from coordexp.codec.coord_vocab import CoordVocab
from coordexp.codec.forms.choose import form_of
from coordexp.codec.pieces import pieces_of
from coordexp.codec.serialize import serialize
from coordexp.losses.columns import CoordColumns
from coordexp.losses.inputs import TextRole
from coordexp.losses.modules import ForwardKind
from coordexp.targets import TokenRole
from coordexp.targets.rows import ce_weights, stage2_rows


def taught(sample, tok):
    """(written token, taught token) of each taught place of a name, as texts."""
    pieces = pieces_of(tok)
    at = sample.name_positions_M
    return [
        (pieces[written].decode(), pieces[true].decode())
        for written, true in zip(sample.token_ids_T[at].tolist(), sample.name_ids_M.tolist(), strict=True)
    ]


def named(tok, written, true, *, order="desc_first", **options):
    """The sample of an answer with one object called `written`, matched to one called `true`."""
    answer = serialize([box(written, 10, 20, 300, 400)], order) + "<|im_end|>"
    gts = [box(true, 11, 21, 301, 401)]
    return rollout_sample(
        tok, answer, gts, pairing([(0, 0)], 1, 1), teaches_names=True, field_order=order, **options
    )


@pytest.mark.parametrize(
    ("written", "true", "expected"),
    [
        ("cat", "cat", [("c", "c"), ("a", "a"), ("t", "t")]),
        ("cow", "cat", [("c", "c"), ("o", "a")]),  # behind the o no letter of cat is right
        ("dog", "cat", [("d", "c")]),
        ("ca", "cat", [("c", "c"), ("a", "a"), ('"', "t")]),  # the name ended too soon
        ("cats", "cat", [("c", "c"), ("a", "a"), ("t", "t"), ("s", '"')]),  # and too late
    ],
)
@pytest.mark.parametrize("order", ["desc_first", "geometry_first"])
def test_a_name_is_taught_up_to_its_first_wrong_token_and_there_the_true_one(
    bytewise, written, true, expected, order
):
    assert taught(named(bytewise, written, true, order=order), bytewise) == expected


@pytest.mark.parametrize(
    ("written", "true", "expected"),
    [
        ("red box", "red box", [("red", "red"), (" box", " box")]),
        ("red box", "red car", [("red", "red"), (" box", " car")]),
        ("blue box", "red box", [("blue", "red")]),
        ("red", "red box", [("red", "red"), ('",', " box")]),
        ("red box", "red", [("red", "red"), (" box", '",')]),
    ],
)
def test_on_the_real_vocabulary_tokens_are_compared_not_letters(real_tok, written, true, expected):
    assert taught(named(real_tok, written, true), real_tok) == expected


def test_rows_predict_the_taught_tokens_and_nothing_else_changes(bytewise):
    with_names, without = named(bytewise, "cow", "cat"), rollout_sample(
        bytewise,
        serialize([box("cow", 10, 20, 300, 400)]) + "<|im_end|>",
        [box("cat", 11, 21, 301, 401)],
        pairing([(0, 0)], 1, 1),
    )  # fmt: skip
    assert without.name_positions_M.size == 0
    assert with_names.token_ids_T.tolist() == without.token_ids_T.tolist()
    assert with_names.roles_T.tolist() == without.roles_T.tolist()
    columns = CoordColumns(CoordVocab.from_tokenizer(bytewise).ids)
    rows, plain = stage2_rows([with_names], [0], columns), stage2_rows([without], [0], columns)
    is_name_R = (rows.roles_R == TextRole.MATCHED_DESC).tolist() + [False] * rows.num_coord
    pairs = list(zip((rows.positions_R + 1).tolist(), rows.targets_R.tolist(), strict=True))
    start = len(PROMPT) + len('{"objects": [{"desc": "')
    named_pairs = [pair for pair, is_name in zip(pairs, is_name_R, strict=True) if is_name]
    assert named_pairs == list(enumerate(encode(bytewise, "ca"), start))
    others = [pair for pair, is_name in zip(pairs, is_name_R, strict=True) if not is_name]
    assert others == list(zip((plain.positions_R + 1).tolist(), plain.targets_R.tolist(), strict=True))


def test_only_matched_predictions_of_the_prefix_are_taught(bytewise):
    answer = serialize([box("dog", 700, 0, 800, 90), box("cat", 10, 20, 300, 400)]) + "<|im_end|>"
    gts = [box("cat", 10, 20, 300, 400), box("dog", 0, 0, 50, 60)]
    sample = rollout_sample(bytewise, answer, gts, pairing([(1, 0)], 2, 2), teaches_names=True)
    assert taught(sample, bytewise) == [("c", "c"), ("a", "a"), ("t", "t")]
    assert set(sample.roles_T[sample.name_positions_M].tolist()) == {int(TokenRole.MATCHED_PREFIX)}


@pytest.mark.parametrize("forward", list(ForwardKind))
def test_the_weight_acts_in_channel_b_alone(bytewise, forward):
    sample = named(bytewise, "cow", "cat")
    weights = ce_weights(sample, replace(WEIGHTS, rollout_matched_desc_weight=0.125), forward)
    wanted = 0.125 if forward is ForwardKind.ROLLOUT else 0.0
    assert weights[sample.name_positions_M.tolist()].tolist() == [wanted, wanted]


@pytest.mark.parametrize(
    ("written", "true", "expected"),
    [
        ("cat", "cat", [("c", "c"), ("a", "a"), ("t", "t")]),
        ("cow", "cat", [("c", "c"), ("o", "a")]),
        (
            "ca",
            "cat",
            [("c", "c"), ("a", "a")],
        ),  # the end of a name is a coordinate, which is taught by its slot
        ("cats", "cat", [("c", "c"), ("a", "a"), ("t", "t")]),
        ("]x", "]x", [(c, c) for c in "\\u005dx"]),
    ],
)
def test_names_of_the_compact_form_are_taught_up_to_the_coordinates(bytewise, written, true, expected):
    """The second box stands under the first one's name and has none of its own."""
    form = form_of("compact")
    preds = [box(written, 10, 20, 300, 400), box(written, 500, 500, 600, 600)]
    gts = [box(true, 11, 21, 301, 401), box("dog", 500, 500, 600, 600)]
    pairs = pairing([(0, 0), (1, 1)], 2, 2)
    sample = rollout_sample(
        bytewise, form.serialize(preds) + "<|im_end|>", gts, pairs, teaches_names=True, form=form
    )
    assert taught(sample, bytewise) == expected
    assert sample.num_boxes == 2
