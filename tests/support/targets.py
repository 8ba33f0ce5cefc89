"""Objects, matches and samples of the target tests, and a sample as runs of equal role and weight."""

from __future__ import annotations

from itertools import groupby

from codec_tokenizers import encode

from coordexp.codec.forms.choose import form_of
from coordexp.codec.pieces import pieces_of
from coordexp.codec.schema import BoxObject
from coordexp.losses.modules import TokenCE
from coordexp.matching import MatchResult, match_objects
from coordexp.targets import TargetBuilder, TokenRole
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
    form = options.get("form") or form_of(field_order=options.get("field_order", "desc_first"))
    parsed = form.parse(ids, tok)
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
        (pieces.join(i for i, _, _ in run).decode(), TokenRole(role), weight)
        for (role, weight), run in ((key, list(group)) for key, group in groupby(tokens, lambda t: t[1:]))
    ]


def geometry(role, weight, *tokens):
    """Runs of `[<|coord_a|>, ...]` after its key: separators have the weight, coordinates 0."""
    runs = []
    for i, token in enumerate(tokens):
        runs += [(", ", role, weight)] * (i > 0) + [(f"<|coord_{token}|>", role, 0.0)]
    return runs


GTS = [box("red box", 10, 20, 300, 400), box("cat", 500, 501, 900, 901)]
RED = '{"desc": "red", "bbox_2d": [<|coord_1|>, <|coord_2|>, <|coord_30|>, <|coord_40|>]}'
