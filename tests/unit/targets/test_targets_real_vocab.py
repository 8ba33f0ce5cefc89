"""Targets on Qwen's own vocabulary, whose tokens join the end of a record with what follows it."""

from __future__ import annotations

import random
import unicodedata

import pytest
from codec_tokenizers import encode
from support.targets import RED, WEIGHTS, box, described, pairing, rollout_sample

from coordexp.codec.parse import parse_rollout
from coordexp.codec.pieces import DecodedTokens, pieces_of
from coordexp.codec.schema import CONTAINER_CLOSE, BoxObject
from coordexp.codec.serialize import serialize
from coordexp.errors import RecordError
from coordexp.losses.modules import ForwardKind
from coordexp.targets import EncodedSample, TargetBuilder, TokenRole
from coordexp.targets.rows import ce_weights

WORDS = (
    "red box", "cat", "traffic light", "naïve café", "e\u0301te\u0301", "猫と犬", "红色的公共汽车",
    "한국어", "שלום", "مرحبا بالعالم", "हिन्दी", "ไทย", "🐱", "🧑\u200d🚀", "🇩🇪", "❤\ufe0f",
    'say "hi"', "''quoted''", "it's", "a\\b", "tab\t", "line\nbreak", "\n\u0301",
    "\x00\x1f", "\x7f\x85", "\u200f\u202e", "\ufeff", "{x}", "[y]", "]},", '"}]}', ", ",
    "!!!", "100%", "1234", "<|im_end|>", "<|coord_5|>", "<think>", "</tool_call>",
    " leading", "trailing ", "a\u2028b", "\ue000", "𝔘𝔫𝔦",
)  # fmt: skip


def random_set(rng, max_objects=4):
    """Objects with descriptions of one or two words of all kinds."""
    objects = []
    for _ in range(rng.randint(0, max_objects)):
        desc = " ".join(rng.choices(WORDS, k=rng.randint(1, 2)))
        if rng.random() < 0.1:
            desc += chr(rng.choice((rng.randrange(0x20, 0xD800), rng.randrange(0x10000, 0x30000))))
        (x1, x2), (y1, y2) = (sorted(rng.sample(range(1000), 2)) for _ in range(2))
        points = (x1, y1, x2, y2) if rng.random() < 0.9 else (x1, y1, x2, y1, x2, y2)
        objects.append(BoxObject(desc, "bbox_2d" if len(points) == 4 else "poly", points))
    return objects


def texts(tok, ids):
    pieces = pieces_of(tok)
    return [pieces[i].decode(errors="replace") for i in ids]


def unmatched(num_preds, num_gts):
    return pairing([], num_preds, num_gts)


SETS_PER_TEST = 250


@pytest.mark.parametrize("block", range(8))
@pytest.mark.parametrize("order", ["desc_first", "geometry_first"])
def test_serialize_tokenize_parse_is_the_identity_and_a_cut_keeps_whole_records(real_tok, block, order):
    """2,000 sets of objects in each order, cut at every token."""
    rng = random.Random(f"{block} {order}")
    for _ in range(SETS_PER_TEST):
        objects = random_set(rng)
        text = serialize(objects, order)
        ids = encode(real_tok, text + "<|im_end|>")
        assert pieces_of(real_tok).join(ids[:-1]).decode() == text
        parsed = parse_rollout(ids, real_tok, field_order=order)
        assert [obj.as_box() for obj in parsed.objects] == objects
        assert (parsed.dropped_by_reason, parsed.truncated) == ({}, False)
        ends = DecodedTokens.from_ids(ids[:-1], pieces_of(real_tok)).ends
        whole = [
            len(serialize(objects[:n], order).encode()) - len(CONTAINER_CLOSE)
            for n in range(len(objects) + 1)
        ]
        for num_tokens in range(len(ids)):
            cut = parse_rollout(ids[:num_tokens], real_tok, field_order=order)
            num_bytes = ends[num_tokens - 1] if num_tokens else 0
            num_whole = sum(stop <= num_bytes for stop in whole[1:])
            assert [obj.as_box() for obj in cut.objects] == objects[:num_whole]
            assert cut.prefix_text == serialize(objects[:num_whole], order)[: -len(CONTAINER_CLOSE)]
            assert cut.truncated is (num_tokens > 0 and num_bytes < len(text.encode()))


@pytest.mark.parametrize(("order", "share"), [("desc_first", 1.0), ("geometry_first", 0.95)])
def test_what_is_appended_is_spelled_as_in_a_fresh_encoding_of_the_whole_text(real_tok, order, share):
    """Wherever that encoding has a token boundary at the end of what is kept of the model's own tokens.

    Behind a box it always has; behind a description that ends in punctuation not always.
    """
    rng = random.Random(order)
    builder = TargetBuilder(real_tok, field_order=order)
    num_with_boundary = num_equal = num_cases = 0
    for _ in range(600):
        written, missed = random_set(rng), random_set(rng, 2)
        ids = encode(real_tok, serialize(written, order) + "<|im_end|>")
        response = ids[: rng.randint(0, len(ids))] if rng.random() < 0.7 else ids
        parsed = parse_rollout(response, real_tok, field_order=order)
        sample = builder.from_rollout(
            [1],
            parsed,
            unmatched(len(parsed.objects), len(missed)),
            missed,
            generation_prompt_ids=[1],
            sample_id="s",
        )
        assert isinstance(sample, EncodedSample)
        target = sample.target_ids[:-1].tolist()
        kept, tail = target[: sample.prefix_length], target[sample.prefix_length :]
        assert kept == response[: sample.prefix_length]
        assert len(kept) >= parsed.num_verbatim_prefix_tokens - 1
        objects = [obj.as_box() for obj in parsed.objects] + missed
        fresh = DecodedTokens.from_ids(encode(real_tok, serialize(objects, order)), pieces_of(real_tok))
        assert pieces_of(real_tok).join(target) == fresh.data
        num_bytes = len(pieces_of(real_tok).join(kept))
        num_cases += 1
        if num_bytes in [0, *fresh.ends]:
            num_with_boundary += 1
            assert tail == fresh.ids[len(fresh.ids) - len(tail) :]
        num_equal += target == fresh.ids
    assert num_with_boundary >= share * num_cases
    assert num_equal >= share * num_cases


def response_of(objects, order="desc_first"):
    return serialize(objects, order) + "<|im_end|>"


CAT = box("cat", 500, 501, 900, 901)
DOG = box("red", 1, 2, 30, 40)


def test_qwen_joins_the_end_of_a_record_with_what_follows_it(real_tok):
    assert texts(real_tok, encode(real_tok, RED + ", " + RED))[-3:] != ["]}", ",", " "]
    assert "]}," in texts(real_tok, encode(real_tok, response_of([DOG, CAT])))
    assert texts(real_tok, encode(real_tok, response_of([DOG])))[-3:] == ["]}", "]}", "<|im_end|>"]


@pytest.mark.parametrize("matched", [True, False], ids=["matched", "false positive"])
@pytest.mark.parametrize("cut", [0, 2, 1], ids=["finished", "container not closed", "no end token"])
def test_a_finished_answer_with_a_missed_object_is_taught_to_go_on_where_stage_1_decides(
    real_tok, matched, cut
):
    """`]},` is one token: it belongs to the tail, and the model's `]}`, the decision to stop, is not in the target."""
    ids = encode(real_tok, response_of([DOG]))
    match = pairing([(0, 0)] if matched else [], 1, 2)
    sample = rollout_sample(real_tok, ids[: len(ids) - cut], [DOG, CAT], match, prompt="ask: ")
    num_missed = 1 if matched else 2
    target = encode(real_tok, response_of([DOG, *[DOG, CAT][-num_missed:]]))
    assert sample.target_ids.tolist() == target
    assert sample.prefix_length == len(ids) - 3
    joined = sample.prompt_length + sample.prefix_length
    assert texts(real_tok, [sample.token_ids_T[joined]]) == ["]},"]
    assert TokenRole(sample.roles_T[joined]) is TokenRole.FN_TAIL
    assert ce_weights(sample, WEIGHTS, ForwardKind.ROLLOUT)[joined] == 1.0


def test_geometry_first_ends_a_record_in_its_description(real_tok):
    ids = encode(real_tok, response_of([DOG], "geometry_first"))
    assert texts(real_tok, ids)[-3:] == ['"}', "]}", "<|im_end|>"]
    sample = rollout_sample(
        real_tok, ids, [DOG, CAT], pairing([(0, 0)], 1, 2), prompt="ask: ", field_order="geometry_first"
    )
    assert sample.target_ids.tolist() == encode(real_tok, response_of([DOG, CAT], "geometry_first"))
    joined = sample.prompt_length + sample.prefix_length
    assert texts(real_tok, [sample.token_ids_T[joined]]) == ['"},']
    assert (TokenRole(sample.roles_T[joined]), ce_weights(sample, WEIGHTS, ForwardKind.ROLLOUT)[joined]) == (
        TokenRole.FN_TAIL,
        1.0,
    )


EMPTY = {
    "closed": '{"objects": []}<|im_end|>',
    "open": '{"objects": [',
    "cut inside its first record": '{"objects": [{"desc": "ca',
}


@pytest.mark.parametrize("case", EMPTY)
@pytest.mark.parametrize("missed", [[CAT], []], ids=["one missed", "nothing missed"])
def test_an_empty_container_goes_on_in_the_tokens_of_a_ground_truth_target(real_tok, case, missed):
    sample = rollout_sample(real_tok, EMPTY[case], missed, unmatched(0, len(missed)), prompt="ask: ")
    assert sample.target_ids.tolist() == encode(real_tok, response_of(missed))
    assert texts(real_tok, sample.target_ids[: sample.prefix_length]) == ['{"', "objects", '":']
    joined = sample.prompt_length + sample.prefix_length
    expected = (' [{"', TokenRole.FN_TAIL) if missed else (" []", TokenRole.CLOSURE)
    assert (texts(real_tok, [sample.token_ids_T[joined]])[0], TokenRole(sample.roles_T[joined])) == expected
    assert ce_weights(sample, WEIGHTS, ForwardKind.ROLLOUT)[joined] == 1.0


def test_without_a_container_the_opening_is_context_and_the_joined_token_is_taught(real_tok):
    sample = rollout_sample(real_tok, "I see a cat.<|im_end|>", [CAT], unmatched(0, 1), prompt="ask: ")
    assert sample.target_ids.tolist() == encode(real_tok, response_of([CAT]))
    opening, *_ = described(sample, real_tok, ForwardKind.ROLLOUT)[1:]
    assert opening == ('{"objects":', TokenRole.PREFIX, 0.0)


def test_an_answer_cut_inside_its_second_record_is_taught_to_stop_or_to_go_on(real_tok):
    ids = encode(real_tok, response_of([DOG, CAT]))
    cut = ids[: texts(real_tok, ids).index("cat")]
    stop = rollout_sample(real_tok, cut, [DOG], pairing([(0, 0)], 1, 1), prompt="ask: ")
    assert stop.target_ids.tolist() == encode(real_tok, response_of([DOG]))
    go_on = rollout_sample(real_tok, cut, [DOG, CAT], pairing([(0, 0)], 1, 2), prompt="ask: ")
    assert go_on.target_ids.tolist() == ids
    for sample in (stop, go_on):
        decision = sample.prompt_length + sample.prefix_length
        assert ce_weights(sample, WEIGHTS, ForwardKind.ROLLOUT)[decision] == 1.0


def test_when_nothing_is_missed_a_finished_answer_stays_as_it_was_written(real_tok):
    ids = encode(real_tok, response_of([DOG]))
    sample = rollout_sample(real_tok, ids, [DOG], pairing([(0, 0)], 1, 1), prompt="ask: ")
    assert sample.target_ids.tolist() == ids
    assert sample.prefix_length == len(ids) - 2
    assert described(sample, real_tok, ForwardKind.ROLLOUT)[-3:] == [
        ("]}", TokenRole.MATCHED_PREFIX, 0.75),
        ("]}", TokenRole.CLOSURE, 1.0),
        ("<|im_end|>", TokenRole.EOS, 1.0),
    ]


def test_tokens_of_the_model_that_an_encoding_would_not_choose_are_kept_but_the_last(real_tok):
    """`"`, `objects`, `"`, `:` where Qwen's encoding has `{"`, `objects`, `":`; `]`, `}` where it has `]}`."""
    ids = [encode(real_tok, part)[0] for part in ("{", '"', "objects", '"', ":", " [")]
    ids += encode(real_tok, RED)
    assert texts(real_tok, ids)[-1] == "]}"
    ids = [*ids[:-1], *(encode(real_tok, part)[0] for part in "]}")]
    missed = rollout_sample(real_tok, ids, [DOG, CAT], pairing([(0, 0)], 1, 2), prompt="ask: ")
    assert missed.target_ids[: len(ids) - 1].tolist() == ids[:-1]
    assert texts(real_tok, missed.target_ids[len(ids) - 1 :])[:2] == ["},", ' {"']


# --- Unicode ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "desc", ["\n\u0301", "a\n\u0301b", "\t\u0327\u0301x", "\x1a\u0301", "cafe\u0301", "\u212b"]
)
@pytest.mark.parametrize("order", ["desc_first", "geometry_first"])
def test_a_mark_behind_an_escape_is_taught_as_it_is(real_tok, desc, order):
    obj = BoxObject("x" + desc, "bbox_2d", (1, 2, 3, 4))
    sample = TargetBuilder(real_tok, field_order=order).from_ground_truth([1], [obj], sample_id="a")
    parsed = parse_rollout(sample.target_ids, real_tok, field_order=order)
    assert [o.as_box() for o in parsed.objects] == [obj]
    assert parsed.objects[0].desc == unicodedata.normalize("NFC", "x" + desc)


def test_objects_that_the_tokenizer_would_change_are_refused(real_tok):
    """A text that no longer is what was serialized is never taught."""
    obj = BoxObject("x", "bbox_2d", (1, 2, 3, 4))
    object.__setattr__(obj, "desc", "cafe\u0301")  # as if it had not been brought to NFC
    with pytest.raises(RecordError, match=r"sample a: the tokenizer changes the text of its objects"):
        TargetBuilder(real_tok).from_ground_truth([1], [obj], sample_id="a")
