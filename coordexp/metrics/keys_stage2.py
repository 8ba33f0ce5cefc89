"""Metric keys of stage 2: loss atoms and diagnostics by provenance, schedule, channel-B health."""

from __future__ import annotations

from coordexp.metrics.spec import Better, KeySection, Kind

TOKEN_ATOMS = {
    "struct_ce": "cross-entropy on JSON structure (and `<|im_end|>`) tokens",
    "desc_ce": "cross-entropy on description tokens",
}
ROLLOUT_TOKEN_ATOMS = TOKEN_ATOMS | {
    "matched_desc_ce": "cross-entropy on description tokens of matched objects in the model's own prefix",
}
COORD_ATOMS = {
    "bbox_smoothl1": "smooth-L1 (beta 1) between decoded and true box coordinates in [0, 1]",
    "bbox_ciou": "1 - CIoU of decoded and true boxes",
    "coord_token_ce": "cross-entropy over the coordinate vocabulary (temperature 1)",
    "coord_soft_ce": "cross-entropy against a Gaussian soft target",
    "coord_w1": "Wasserstein-1 distance to the soft target, divided by 999",
    "coord_el1": "expected absolute error E_p|k - g| / 999",
    "coord_ehuber": "expected Huber error of |k - g| / 999",
    "coord_entropy": "entropy of the coordinate distribution",
    "coord_gate": "mass leak out of the coordinate vocabulary at coordinate slots",
    "text_gate": "mass leak into the coordinate vocabulary at structure and description slots",
}
TEXT_OVER = "weighted text tokens"
PROVENANCES: dict[str, tuple[str, dict[str, str]]] = {
    "A1_text": ("channel A, ground-truth anchor forward", TOKEN_ATOMS),
    "A2_text": ("channel A, last self-context forward", {"struct_ce": TOKEN_ATOMS["struct_ce"]}),
    "A2_coord": ("channel A, last self-context forward", COORD_ATOMS),
    "B_rollout_text": ("channel B, rollout-context forward", ROLLOUT_TOKEN_ATOMS),
    "B_coord": ("channel B, rollout-context forward", COORD_ATOMS),
}
"""Provenance -> (which forward, the atoms it can carry with their meaning)."""

ATOM_UNITS = {"bbox_smoothl1": "1", "bbox_ciou": "1", "coord_w1": "1", "coord_el1": "1", "coord_ehuber": "1"}
ATOM_OVER = {"bbox_smoothl1": "box coordinates", "bbox_ciou": "boxes", "text_gate": "weighted text tokens"}

LOSS = KeySection(
    "Stage-2 objective atoms (`loss/*`)",
    "Each is a term after all weights, so the atoms of a step sum to its loss. Emitted only where the "
    "effective weight is not 0.",
)
for _provenance, (_forward, _atoms) in PROVENANCES.items():
    for _atom, _what in _atoms.items():
        LOSS.define(
            f"loss/{_provenance}/{_atom}",
            Kind.LOSS,
            f"Weighted {_what} ({_forward}).",
            unit=ATOM_UNITS.get(_atom, "nats"),
            when=f"stage-2 channel-{_provenance[0]} steps where the atom's effective weight is not 0",
            in_loss=True,
            over=TEXT_OVER if _atom in ROLLOUT_TOKEN_ATOMS else ATOM_OVER.get(_atom, "coordinate tokens"),
            pattern=f"loss/{_provenance}/<atom>",
        )


def loss_atom(provenance: str, atom: str) -> str:
    """`loss/<provenance>/<atom>`; KeyError for a pair that the objective cannot emit."""
    return LOSS.specs[f"loss/{provenance}/{atom}"].key


DIAGNOSTIC_PROVENANCES = {
    "A1": "the ground-truth anchor forward of channel A",
    "A2": "the last self-context forward of channel A",
    "B": "the rollout-context forward of channel B",
}
DIAGNOSTICS: dict[str, tuple[Kind, str, Better | None, str]] = {
    "coord_tokens_total": (Kind.COUNTER, "tokens", None, "True coordinate slots looked at"),
    "acc_top5": (
        Kind.GAUGE,
        "fraction",
        "higher",
        "Share of slots whose true bin is among the 5 largest coordinate logits",
    ),
    "p_gt_mean": (Kind.GAUGE, "probability", "higher", "Mean probability of the true bin"),
    "margin_mean": (Kind.GAUGE, "logits", "lower", "Mean of largest coordinate logit minus the true bin's"),
    "expected_bin_mae": (Kind.GAUGE, "bins", "lower", "Mean |E_p[k] - g|"),
    "expected_bin_abs_err_p90": (Kind.PERCENTILE, "bins", "lower", "90th percentile of |E_p[k] - g|"),
    "coord_vocab_mass_mean": (
        Kind.GAUGE,
        "probability",
        "higher",
        "Mean probability inside the coordinate vocabulary",
    ),
}
COORD_DIAG_STAGE2 = KeySection(
    "Stage-2 coordinate diagnostics (`coord_diag/<provenance>/*`)",
    "Monitors of the coordinate distribution at true coordinate slots; never in the loss. Present when the "
    "`coord_diag` "
    "diagnostics module has a weight that is not 0.",
)
for _provenance, _forward in DIAGNOSTIC_PROVENANCES.items():
    for _name, (_kind, _unit, _better, _what) in DIAGNOSTICS.items():
        COORD_DIAG_STAGE2.define(
            f"coord_diag/{_provenance}/{_name}",
            _kind,
            f"{_what}, from {_forward}.",
            unit=_unit,
            when=f"channel-{_provenance[0]} steps"
            + (" with n_softctx_iter > 1" if _provenance == "A2" else ""),
            over="micro-steps" if _kind is Kind.PERCENTILE else "coordinate tokens",
            pattern=f"coord_diag/{_provenance}/<monitor>",
            better=_better,
        )


def coord_diagnostic(provenance: str, name: str) -> str:
    """`coord_diag/<provenance>/<name>`; KeyError for a pair that is not defined."""
    return COORD_DIAG_STAGE2.specs[f"coord_diag/{provenance}/{name}"].key


SCHEDULE = KeySection("Channel schedule and channel-B health (`stage2/*`, `stage2_ab/*`)")
B_STEPS = "stage-2 channel-B steps"
STAGE2_CHANNEL_B = SCHEDULE.define(
    "stage2/channel_b",
    Kind.FLAG,
    "1 when a channel-B step lies in the logging window.",
    when="stage-2 two-channel steps",
)
STAGE2_RAW_ROLLOUTS = SCHEDULE.define(
    "stage2/raw_rollouts", Kind.COUNTER, "Rollouts generated.", unit="rollouts", when="steps with a rollout"
)
B_RATIO_REALIZED = SCHEDULE.define(
    "stage2_ab/b_ratio_realized",
    Kind.GAUGE,
    "Share of the last 200 optimizer steps that ran channel B; follows `stage2_ab.schedule.b_ratio`.",
    unit="fraction",
    when="stage-2 two-channel steps",
    over="optimizer steps",
)


def _drop_counter(
    name: str, meaning: str, unit: str = "objects", pattern: str = "", better: Better = "lower"
) -> str:
    return SCHEDULE.define(
        f"stage2_ab/channel_b/{name}",
        Kind.COUNTER,
        meaning,
        unit=unit,
        when=B_STEPS,
        pattern=pattern,
        better=better,
    )


STRICT_DROP_N_VALID_PRED = _drop_counter(
    "strict_drop/N_valid_pred", "Predicted objects kept by strict validation.", better="higher"
)
STRICT_DROP_N_DROP_INVALID = _drop_counter(
    "strict_drop/N_drop_invalid", "Predicted objects dropped by strict validation."
)
DROP_REASONS = {
    "missing_desc": "no description, or an empty one",
    "missing_geom": "no geometry",
    "wrong_arity": "a geometry with the wrong number of coordinates",
    "non_coord_token": "something other than bare coordinate tokens in the geometry",
    "poly_unsupported": "a polygon where only boxes are trained",
    "unknown_geom": "a geometry key that is neither bbox_2d nor poly",
    "bbox_invalid": "a box with x2 < x1 or y2 < y1",
    "key_invalid": "unexpected or repeated keys, or an element that is no object",
    "malformed": "JSON that does not parse inside the record",
    "ambiguous": "coordinate tokens that text and token ids place differently",
}
for _reason, _what in DROP_REASONS.items():
    _drop_counter(
        f"strict_drop/reason/{_reason}",
        f"Predicted objects dropped for {_what}.",
        pattern="stage2_ab/channel_b/strict_drop/reason/<bucket>",
    )


def strict_drop_reason(reason: str) -> str:
    """`stage2_ab/channel_b/strict_drop/reason/<bucket>`; KeyError for an unknown reason."""
    return SCHEDULE.specs[f"stage2_ab/channel_b/strict_drop/reason/{reason}"].key


CLOSURE_N_DROP = _drop_counter(
    "closure_supervision/N_drop",
    "Samples left out because the closing brace or `<|im_end|>` could not be located. Should stay near 0.",
    unit="samples",
)
CHANNEL_B_INVALID_ROLLOUT = _drop_counter(
    "invalid_rollout",
    "Samples without an append-ready container, which fell back to the empty prefix with every object "
    "missed.",
    unit="samples",
)

SECTIONS = (LOSS, COORD_DIAG_STAGE2, SCHEDULE)
