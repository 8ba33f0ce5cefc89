"""TargetBuilder: from ground truth, or from a rollout and its match, to an EncodedSample.

    ground truth   Y = serialize(objects) + <|im_end|>
    rollout        Y = prefix + append(missed objects) + <|im_end|>

The rollout's prefix keeps the ids the model wrote, but for the last one: what the prefix holds of it (`]}` of a token
`]}]}`, say) is encoded together with what is appended, as it would be in a ground-truth target. A model that learned
`]},` and `]}` as one token each chooses between going on and stopping there; the token belongs to the tail. Where the
last token comes out as the model wrote it, it stays part of the prefix.

Matched predictions supervise their coordinate slots with the bins of their ground truth (`_true_bins` says which those
are for polygons); the missed ground truths follow in their own order. When the parser's prefix is the empty container
(no container found, or text before it), every ground truth is missed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coordexp.codec.coord_vocab import Tokenizer
from coordexp.codec.forms.base import AnswerForm
from coordexp.codec.forms.choose import form_of
from coordexp.codec.parse import ParsedRollout
from coordexp.codec.pieces import pieces_of
from coordexp.codec.schema import KIND_BBOX, BoxObject
from coordexp.errors import ContractError, RecordError, RolloutError
from coordexp.geometry import MAX_BIN, box_polygon, polygon_box
from coordexp.matching.hungarian import MatchResult
from coordexp.matching.sinkhorn import barycentric_targets
from coordexp.targets.draft import Bins, TargetDraft
from coordexp.targets.prefix import TaughtPrefix
from coordexp.targets.rewrite import PrefixRules, rewritten
from coordexp.targets.roles import TokenRole
from coordexp.targets.sample import DroppedSample, EncodedSample, Media, SampleDropReason
from coordexp.targets.spelling import spell, spell_tail


@dataclass(frozen=True)
class PolygonTransport:
    """How the vertices of a matched polygon get true bins: options of `matching.barycentric_targets`."""

    ot_cost: str = "l2"
    ot_epsilon: float = 10.0
    ot_iters: int = 30


class TargetBuilder:
    """Makes samples for one tokenizer.

    field_order: `custom.object_field_order`.
    form: of the answers, in place of CoordJSON in that order. Where it writes coordinates as numbers no slot is
        supervised: numbers of ground truth and of appended objects are text, those of the prefix are not taught.
    max_tokens: the longest sample that a sequence or pack can hold; a longer one is an error. None: no limit.
    rules: what leaves a rollout before it is taught, and where missed objects go. None: nothing, to its end.
    teaches_names: names of matched predictions are taught too (token_ce's `rollout_matched_desc_weight`).
    Raises ConfigError for an unknown field order, or a tokenizer without the coordinate tokens that the form needs.
    """

    def __init__(
        self,
        tok: Tokenizer,
        *,
        field_order: str = "desc_first",
        form: AnswerForm | None = None,
        max_tokens: int | None = None,
        polygons: PolygonTransport | None = None,
        teaches_names: bool = False,
        rules: PrefixRules | None = None,
    ) -> None:
        self._form = form or form_of(field_order=field_order)
        self._tok = tok
        self._pieces = pieces_of(tok)
        if self._form.has_coord_tokens:
            self._pieces.coord_vocab  # noqa: B018  # a tokenizer without them is refused here
        self._max_tokens = max_tokens
        self._polygons = polygons or PolygonTransport()
        self._teaches_names, self._rules = teaches_names, rules or PrefixRules()

    def from_ground_truth(
        self,
        prompt_ids: Sequence[int],
        objects: Sequence[BoxObject],
        *,
        sample_id: str,
        media: Media | None = None,
    ) -> EncodedSample:
        """The sample that teaches exactly `objects`, in their order.

        prompt_ids: tokens up to the first one of the answer, image placeholders expanded.
        Raises RecordError for objects that cannot be written, ContractError for a sample that is too long.
        """
        tokens = spell(self._form.serialize(objects), self._tok)
        if tokens is None:
            raise RecordError(
                f"sample {sample_id}: the tokenizer changes the text of its objects, so the target's tokens cannot "
                "be located. Check the descriptions, and the tokenizer's normalizer"
            )
        draft = TargetDraft(prompt_ids, self._tok, sample_id=sample_id, form=self._form)
        draft.append(tokens, objects, TokenRole.GROUND_TRUTH)
        return self._checked(draft.finish(media))

    def from_rollout(
        self,
        prompt_ids: Sequence[int],
        parsed: ParsedRollout,
        match: MatchResult,
        gts: Sequence[BoxObject],
        *,
        generation_prompt_ids: Sequence[int],
        sample_id: str,
        media: Media | None = None,
    ) -> EncodedSample | DroppedSample:
        """The sample that continues a rollout with what it missed.

        prompt_ids: prompt of the forward to come.  generation_prompt_ids: the one the rollout answered; the
        two must be equal.  match: of `parsed.objects` with `gts`.
        Raises RolloutError when the prompts differ, ContractError when match, objects and rollout are not of
        one sample or the sample is too long.
        """
        self._check_same_prompt(prompt_ids, generation_prompt_ids, sample_id)
        _check_match(match, parsed.objects, gts, sample_id)
        prefix = self._prefix(parsed, match, gts)
        if prefix is None:
            return DroppedSample(
                sample_id, SampleDropReason.TAIL_CHANGED, f"rewritten answer {parsed.text[:200]!r}"
            )
        present = {*prefix.partners.values(), *prefix.written.values()}
        missed = [obj for gt, obj in enumerate(gts) if gt not in present]
        try:
            fragment = self._form.append_fragment(missed, prefix.parsed.prefix_text)
        except RolloutError as error:
            return DroppedSample(sample_id, SampleDropReason.PREFIX_NOT_OPEN, str(error))
        tail = spell_tail(prefix.parsed, fragment, self._tok)
        if tail is None:
            return DroppedSample(
                sample_id, SampleDropReason.TAIL_CHANGED, f"appended text {fragment[:200]!r}"
            )
        draft = TargetDraft(prompt_ids, self._tok, sample_id=sample_id, form=self._form)
        names = {pred: gts[gt].desc for pred, gt in prefix.partners.items()} if self._teaches_names else None
        draft.continue_rollout(prefix, self._bins_of(prefix, gts), tail.num_kept, names)
        untaught = self._form.opening if parsed.prefix_is_fallback else ""
        draft.append(tail.tokens, missed, TokenRole.FN_TAIL, untaught=untaught)
        return self._checked(draft.finish(media))

    def _prefix(
        self, parsed: ParsedRollout, match: MatchResult, gts: Sequence[BoxObject]
    ) -> TaughtPrefix | None:
        """What the target begins with; None when the tokenizer cannot spell it."""
        if self._rules.change_nothing or parsed.prefix_is_fallback:
            return TaughtPrefix.as_written(parsed, match)
        return rewritten(parsed, match, gts, self._rules, self._tok, self._form)

    def _bins_of(self, prefix: TaughtPrefix, gts: Sequence[BoxObject]) -> dict[int, Bins]:
        """True bins of every matched and written object, by its index among those of the prefix."""
        objects = prefix.parsed.objects
        matched = {pred: self._true_bins(objects[pred], gts[gt]) for pred, gt in prefix.partners.items()}
        return matched | {index: gts[gt].bins for index, gt in prefix.written.items()}

    def _true_bins(self, pred: BoxObject, gt: BoxObject) -> Bins:
        """Target of each coordinate of a matched prediction, in the form the prediction has.

        A box learns the box of its ground truth (of a polygon: the tightest one). A polygon learns the
        barycentric projection of its vertices onto those of its ground truth, rounded to whole bins.

        Rounded, although a Gaussian target could stand around any real number: a slot then has one target for all its
        numbers (cross-entropy and monitors need a token, which is a whole bin), as the slots of boxes and of appended
        polygons have. It moves a target by half a bin at most: a quarter of the default sigma of the Gaussian, and
        less than what an answer can say.
        """
        if pred.kind == KIND_BBOX:
            return gt.bins if gt.kind == KIND_BBOX else polygon_box(gt.bins).astype(np.int64).tolist()
        transport = self._polygons
        targets_N2 = barycentric_targets(
            pred.bins,
            box_polygon(gt.bins).tolist() if gt.kind == KIND_BBOX else gt.bins,
            ot_cost=transport.ot_cost,
            ot_epsilon=transport.ot_epsilon,
            ot_iters=transport.ot_iters,
        )
        return np.clip(np.rint(targets_N2), 0, MAX_BIN).astype(np.int64).ravel().tolist()

    def _checked(self, sample: EncodedSample) -> EncodedSample:
        limit = self._max_tokens
        if limit is not None and sample.num_tokens > limit:
            raise ContractError(
                f"sample {sample.sample_id} has {sample.num_tokens} tokens ({sample.prompt_length} prompt, "
                f"{sample.prefix_length} rollout prefix, {sample.appended_length} appended), but a sequence "
                f"holds {limit}: raise global_max_length, or lower max_new_tokens or the image size"
            )
        return sample

    def _check_same_prompt(self, ours: Sequence[int], theirs: Sequence[int], sample_id: str) -> None:
        ours, theirs = list(map(int, ours)), list(map(int, theirs))
        if ours == theirs:
            return
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        at = min(len(ours), len(theirs)) if at is None else at

        def shown(ids: Sequence[int]) -> str:
            text = self._pieces.join(ids[at : at + 8]).decode("utf-8", errors="replace")
            return f"{len(ids)} tokens, from token {at} on {ids[at : at + 8]} = {text!r}"

        raise RolloutError(
            f"sample {sample_id}: the prompt to train on is not the prompt the rollout answered. Ours: "
            f"{shown(ours)}; the engine's: {shown(theirs)}. Use one chat template and one image size for both, "
            "and let only one side expand image placeholders"
        )


def _check_match(
    match: MatchResult, preds: Sequence[BoxObject], gts: Sequence[BoxObject], sample_id: str
) -> None:
    """ContractError unless the match names every prediction and every ground truth exactly once."""
    seen_preds = sorted([pred for pred, _ in match.matched] + match.unmatched_pred)
    seen_gts = sorted([gt for _, gt in match.matched] + match.unmatched_gt)
    if seen_preds != list(range(len(preds))) or seen_gts != list(range(len(gts))):
        raise ContractError(
            f"sample {sample_id}: the match is of {len(seen_preds)} predictions with {len(seen_gts)} ground "
            f"truths, the rollout has {len(preds)} objects and the record {len(gts)}; match parsed.objects with "
            "the same ground truths, in the same order"
        )
