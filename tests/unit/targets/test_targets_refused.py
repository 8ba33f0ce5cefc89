"""What a target cannot be made of: refused with an error, or a sample that is dropped under a reason."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from codec_tokenizers import encode
from support.targets import GTS, PROMPT, RED, box, pairing, rollout_sample
from tokenizers import normalizers

from coordexp.codec.parse import parse_rollout
from coordexp.errors import ContractError, RecordError, RolloutError
from coordexp.targets import DroppedSample, EncodedSample, SampleDropReason, TargetBuilder, TokenRole


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
    assert (dropped.sample_id, dropped.reason) == ("a", SampleDropReason.PREFIX_NOT_OPEN)
    assert "append-ready" in dropped.detail


def test_a_tokenizer_that_changes_the_text_drops_a_rollout_and_refuses_ground_truth(make_tokenizer):
    tok = make_tokenizer(normalizer=normalizers.Lowercase())
    gts = [box("Big Ben", 1, 2, 3, 4)]
    dropped = rollout_sample(tok, '{"objects": []}', gts)
    assert isinstance(dropped, DroppedSample)
    assert dropped.reason is SampleDropReason.TAIL_CHANGED
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
        lambda s: {"roles_T": with_value(s.roles_T, s.box_positions_B4[0], TokenRole.FP_PREFIX)},
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
        lambda s: {"roles_T": np.where(s.roles_T == TokenRole.CLOSURE, TokenRole.GROUND_TRUTH, s.roles_T)},
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
