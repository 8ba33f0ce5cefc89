"""Guided answers: whole, as the parser wants them, and those of an unguided model where that writes well."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coordexp.codec.coord_vocab import CoordVocab
from coordexp.codec.forms.choose import form_of
from coordexp.codec.schema import BoxObject
from coordexp.config.schema.rollout import RolloutMatching
from coordexp.errors import RolloutError
from coordexp.models.tiny_tokenizer import train_tiny_tokenizer
from coordexp.rollout.backends.hf import HfBackend
from coordexp.rollout.decoding.guided import Guide, GuidedRow, GuideRules, guide_scores, reserve_of

FORMS = [("coordjson", "desc_first"), ("coordjson", "geometry_first"), ("compact", "desc_first")]
REPEATS = {
    "enabled": True, "min_new_tokens": 4, "max_consecutive_token_repeats": 3, "ngram_size": 4, "ngram_repeats": 3,
    "max_object_keys": None,
}  # fmt: skip
LIMIT = 128


@pytest.fixture(scope="module")
def tok():
    return train_tiny_tokenizer()


def walk(tok, rules, scores):
    """An answer of `generate` without a model. scores: called with the number of the token, gives [1, V]."""
    row = GuidedRow(Guide.of(tok, rules), rules)
    end, answer = tok.convert_tokens_to_ids("<|im_end|>"), []
    while len(answer) < rules.limit and end not in answer:
        answer.append(int(guide_scores(scores(len(answer)), [row]).argmax()))
        row.extend(answer[-1:])
    return answer


def is_well_formed(parsed):
    return not (parsed.invalid_rollout or parsed.truncated or parsed.leading_text or parsed.dropped_by_reason)


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    form=st.sampled_from(FORMS),
    how=st.sampled_from(["argmax", "median", "expectation"]),
    max_objects=st.sampled_from([None, 1, 3]),
    repeats=st.sampled_from([None, REPEATS]),
    allow_poly=st.booleans(),
    scale=st.sampled_from([0.3, 3.0]),
)
def test_whatever_the_scores_are_the_answer_is_whole(
    tok, seed, form, how, max_objects, repeats, allow_poly, scale
):
    """And it ends within its limit, be it in the middle of a name, of an escape, of a character of several tokens."""
    generator = torch.Generator().manual_seed(seed)
    rules = GuideRules(*form, LIMIT, allow_poly, max_objects, how, repeats)
    answer = walk(tok, rules, lambda _: torch.randn(1, len(tok) + 3, generator=generator) / scale)
    parsed = form_of(*form).parse(answer, tok, allow_poly=allow_poly)
    assert is_well_formed(parsed), parsed.text
    assert answer[-1] == tok.convert_tokens_to_ids("<|im_end|>")
    assert len(parsed.objects) <= (max_objects or LIMIT)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("start", ["name", "character", "escape", "box"])
def test_an_answer_that_meets_its_limit_anywhere_is_brought_to_its_end(tok, form, start):
    """The scores want to go on for ever with names, halves of characters, escapes, or coordinates."""
    wanted = {
        "name": tok.encode("a", add_special_tokens=False),
        "character": tok.convert_tokens_to_ids(["ð", "Ł"]),
        "escape": [*tok.encode("\\u", add_special_tokens=False), *tok.encode("d", add_special_tokens=False)],
        "box": CoordVocab.from_tokenizer(tok).ids,
    }[start]
    scores = torch.zeros(1, len(tok))
    scores[0, list(wanted)] = 5.0
    rules = GuideRules(*form, LIMIT)
    for limit in range(LIMIT, LIMIT + 12):
        answer = walk(tok, replace(rules, limit=limit), lambda _: scores.clone())
        parsed = form_of(*form).parse(answer, tok)
        assert is_well_formed(parsed), parsed.text
        assert len(answer) <= limit


@settings(max_examples=40, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    how=st.sampled_from(["argmax", "median", "expectation"]),
    descs=st.lists(st.sampled_from(["cat", "black cat", 'a "b"', "é ü", "dog"]), max_size=3),
    seed=st.integers(0, 2**31),
)
def test_what_is_written_well_without_is_written_with(tok, form, how, descs, seed):
    """A sure writer, of whose doubt about coordinates some lies before the corner that bounds them."""
    objects = [BoxObject(desc, "bbox_2d", (500, 500, 500 + 7 * i, 503)) for i, desc in enumerate(descs)]
    ids = tok.encode(form_of(*form).serialize(objects) + "<|im_end|>", add_special_tokens=False)
    vocab, generator = CoordVocab.from_tokenizer(tok), torch.Generator().manual_seed(seed)

    def scores(place):
        found = torch.randn(1, len(tok), generator=generator)
        found[0, ids[place]] += 30.0
        k = vocab.bin_of(ids[place])
        if k is not None:  # symmetric round the bin, so that mode, median and mean are all that bin
            for offset in range(1, 40):
                found[0, vocab.ids[k - offset]] = found[0, vocab.ids[k + offset]] = found[0, ids[place]] - 2.0
        return found

    assert walk(tok, GuideRules(*form, 400, how=how), scores) == ids


def at_third_coordinate(tok, how, first):
    rules = GuideRules("coordjson", "desc_first", 400, how=how)
    row = GuidedRow(Guide.of(tok, rules), rules)
    text = f'{{"objects": [{{"desc": "cat", "bbox_2d": [<|coord_{first}|>, <|coord_5|>, '
    row.extend(tok.encode(text, add_special_tokens=False))
    return row


def read(tok, how, first, masses):
    ids = CoordVocab.from_tokenizer(tok).ids
    scores = torch.full((1, len(tok)), -50.0)
    for k, mass in masses.items():
        scores[0, ids[k]] = torch.tensor(mass).log()
    out = guide_scores(scores, [at_third_coordinate(tok, how, first)])
    assert torch.isinf(out[0, list(ids[:first])]).all()
    return ids.index(int(out.argmax()))


def test_a_coordinate_is_read_as_it_is_meant_and_anew_only_where_that_is_not_allowed(tok):
    """Half of the mass is reached at bin 20; of what is left from bin 25 on (0.15 of 30, 0.3 of 40) at bin 40."""
    masses = {10: 0.3, 20: 0.25, 30: 0.15, 40: 0.3}
    assert [read(tok, "median", first, masses) for first in (0, 20, 21, 31)] == [20, 20, 40, 40]
    # the mean is 24.5, rounded to the even 24; from bin 25 on 36.7
    assert [read(tok, "expectation", first, masses) for first in (24, 25)] == [24, 37]
    assert [read(tok, "argmax", first, {10: 0.4, 20: 0.25, 30: 0.35}) for first in (10, 11)] == [10, 30]


def test_a_step_of_several_rows_is_that_of_each(tok):
    """Rows at text, at a coordinate, at its end: read in different ways, some not at all."""
    rules = GuideRules("coordjson", "desc_first", 400)
    ended = GuidedRow(Guide.of(tok, rules), rules)
    ended.extend(tok.encode('{"objects": []}<|im_end|>xx', add_special_tokens=False))

    def rows():
        ways = ("argmax", "median", "expectation")
        yield from (at_third_coordinate(tok, how, first) for how in ways for first in (0, 300))
        yield GuidedRow(Guide.of(tok, rules), rules)
        yield ended

    raw = torch.randn(8, len(tok) + 5, generator=torch.Generator().manual_seed(1)) * 4
    together = guide_scores(raw.clone(), list(rows()))
    alone = torch.cat([guide_scores(raw[i : i + 1].clone(), [row]) for i, row in enumerate(rows())])
    assert torch.equal(together, alone)
    assert torch.equal(together[-1], raw[-1])  # what follows an answer is padding
    assert torch.isinf(together[:-1, len(tok) :]).all()


def test_a_token_that_the_grammar_forbids_is_told(tok):
    row = at_third_coordinate(tok, "argmax", 3)
    with pytest.raises(
        RolloutError, match=r"token \d+ \(b'c'\) was written where the grammar does not allow it"
    ):
        row.extend(tok.encode("cat", add_special_tokens=False))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decoding", [{}, {"temperature": 1.0, "coord": "median", "guided_max_objects": 2}])
def test_a_model_of_random_weights_writes_whole_answers(policy, requests, form, decoding):
    form = form_of(*form)
    rules = RolloutMatching(
        backend="hf",
        decode_batch_size=4,
        max_new_tokens=reserve_of(form) + 24,
        decoding={"guided": True, **decoding},
    )
    rollouts = HfBackend(rules, policy.model, policy.template, form=form, token_logprobs=True).generate(
        requests
    )
    parsed = [form.parse(rollout.response_token_ids, policy.template.tokenizer) for rollout in rollouts]
    assert all(map(is_well_formed, parsed)), [one.text for one in parsed]
    assert all(len(one.objects) <= decoding.get("guided_max_objects", 100) for one in parsed)
    assert all(
        min(rollout.token_logprobs) < -3 for rollout in rollouts
    )  # the model's own, which wanted other tokens
    reasons = {rollout.finish_reason for rollout in rollouts if len(rollout.response_token_ids) > 25}
    assert reasons <= {"length"}


def test_an_answer_that_repeats_itself_is_brought_to_its_end(policy, requests):
    """Greedy answers of random weights hold one word again and again."""
    common = {"backend": "hf", "decode_batch_size": 4, "max_new_tokens": 160, "decoding": {"guided": True}}
    for rules, flags in ((REPEATS, (True, "stop")), ({}, (False, "length"))):
        settings = RolloutMatching(**common, repeat_terminate=rules)
        for rollout in HfBackend(settings, policy.model, policy.template).generate(requests[:2]):
            parsed = form_of().parse(rollout.response_token_ids, policy.template.tokenizer)
            assert is_well_formed(parsed)
            assert (rollout.repeat_terminated, rollout.finish_reason) == flags, parsed.text
