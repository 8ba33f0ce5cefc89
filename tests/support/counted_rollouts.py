"""Four rollouts and one without a target, small enough to count by hand."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from coordexp.codec.parse import parse_rollout
from coordexp.codec.schema import BoxObject
from coordexp.config.schema.rollout import RolloutMatching
from coordexp.data.raw_samples import RawSample
from coordexp.matching import match_objects
from coordexp.metrics.accumulate import MetricStore
from coordexp.rollout.types import Rollout
from coordexp.targets import TargetBuilder
from coordexp.trainers.rollouts.answers import JudgedAnswer
from coordexp.trainers.rollouts.eval_metrics import image_result
from coordexp.trainers.rollouts.metrics import (
    RolloutOutcome,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures" / "codec"))

from codec_tokenizers import encode, with_added_tokens


def bytewise(normalizer=None):
    """A token per byte and per coordinate: the number of tokens of a text can be counted."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    if normalizer is not None:
        bpe.normalizer = normalizer
    return with_added_tokens(bpe)


TOK = bytewise()
LOWERCASING = bytewise(normalizers.Lowercase())


def box(desc, *bins):
    return BoxObject(desc, "bbox_2d", bins)


def written(desc, *bins):
    return f'{{"desc": "{desc}", "bbox_2d": [{", ".join(f"<|coord_{b}|>" for b in bins)}]}}'


def num_tokens(text):
    """Tokens of a text in the bytewise tokenizer, by counting characters."""
    return len(re.sub(r"<\|\w+\|>", "#", text))


def outcome(prompt, response, gts, tok=TOK, logprob=-0.5, **rollout):
    ids, prompt_ids = encode(tok, response), encode(tok, prompt)
    parsed = parse_rollout(ids, tok, allow_poly=False)
    match = match_objects(parsed.objects, gts)
    sample = TargetBuilder(tok).from_rollout(
        prompt_ids, parsed, match, gts, generation_prompt_ids=prompt_ids, sample_id="train.jsonl:3"
    )
    answer = Rollout(tuple(prompt_ids), tuple(ids), (logprob,) * len(ids), "stop", 0.1, **rollout)
    return RolloutOutcome(answer, parsed, match, len(gts), sample)


RED, CAT, DOG = box("red box", 10, 20, 300, 400), box("cat", 500, 501, 900, 901), box("dog", 0, 600, 90, 800)
NEAR_RED = written("red box", 12, 22, 310, 402)
FAR_DOG = written("dog", 700, 0, 800, 90)
EXACT_CAT = written("cat", 500, 501, 900, 901)
NO_GEOMETRY = '{"desc": "x"}'
POLYGON = (
    '{"desc": "p", "poly": ['
    + ", ".join(f"<|coord_{b}|>" for b in (500, 501, 900, 501, 900, 901, 500, 901))
    + "]}"
)
TAIL = "]}<|im_end|>"
MIXED = f'{{"objects": [{NEAR_RED}, {FAR_DOG}, {NO_GEOMETRY}, {POLYGON}'
CUT = f'{{"objects": [{EXACT_CAT}'

OUTCOMES = [
    # a match, a false positive, two dropped records, a miss
    outcome("ask: ", MIXED + TAIL, [RED, CAT]),
    # cut inside the second record; the match is exact and nothing is missed
    outcome("ask again: ", CUT + ', {"desc": "do', [CAT], repeat_terminated=True),
    # text before the container: the match counts, but the target starts from the empty container
    outcome("ask: ", f'Sure: {{"objects": [{EXACT_CAT}{TAIL}', [CAT]),
    # no container at all
    outcome("ask: ", "I see nothing<|im_end|>", [DOG, RED]),
    # the tokenizer changes what is appended, so there is no target
    outcome("ask: ", '{"objects": []}<|im_end|>', [box("Cat", 1, 2, 3, 4)], tok=LOWERCASING),
]
TAILS = [
    num_tokens(f", {EXACT_CAT}{TAIL}"),
    num_tokens(TAIL),
    num_tokens(EXACT_CAT + TAIL),
    num_tokens(f"{written('dog', *DOG.bins)}, {written('red box', *RED.bins)}{TAIL}"),
]
"""Lengths of what is appended to the first four."""
SECONDS = {"generate_s": 2.0, "parse_match_s": 0.5, "encode_s": 0.25}
NO_AP = RolloutMatching.model_validate({"backend": "hf", "eval_detection": {"enabled": False}})
GREEDY = RolloutMatching(backend="hf", decode_batch_size=2)


def flushed(*entry_groups):
    store = MetricStore(strict=True)
    for entries in entry_groups:
        store.add_all(entries)
    return store.flush()


def mask_iou_of_red():
    """maskIoU of NEAR_RED with RED on the default canvas, from the areas of the two boxes in bins."""
    inter = (300 - 12) * (400 - 22)
    return inter / (290 * 380 + 298 * 380 - inter)


def image_of(found: RolloutOutcome, gts, image_id=0):
    """What evaluation makes of an answer about an image of 1000 x 500 pixels."""
    sample = RawSample("train.jsonl:3", "", (), None, tuple(gts), (), (), 1000, 500)
    return image_result(image_id, JudgedAnswer(sample, found.rollout, found.parsed, found.match))
