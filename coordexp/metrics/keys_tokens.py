"""Metric keys of token accuracy, token types, and coordinate tokens appearing where they should not."""

from __future__ import annotations

from coordexp.metrics.spec import KeySection, Kind

TYPES_ON = "with `custom.token_type_metrics.enabled: true`, when that kind of token is supervised"
TOP5_ON = TYPES_ON + ", and log_top5 on"

TOKEN_TYPES = KeySection(
    "Token accuracy and token types",
    "Top-1 and top-5 accuracy on supervised rows, split by the type of the true token: `desc` (inside a "
    "description), `coord` (a coordinate token), `format` (all other structure). Switches: "
    "`custom.token_type_metrics.*`; what is split by type counts samples of its included datasets only.",
)

TOKEN_ACC = TOKEN_TYPES.define(
    "token_acc",
    Kind.GAUGE,
    "Top-1 accuracy over supervised tokens.",
    unit="fraction",
    when="every step",
    over="supervised tokens",
    better="higher",
)
TOKEN_ACC_TOP5 = TOKEN_TYPES.define(
    "token_acc_top5",
    Kind.GAUGE,
    "Top-5 accuracy over supervised tokens.",
    unit="fraction",
    when="with `custom.token_type_metrics` enabled and log_top5 on",
    over="supervised tokens",
    better="higher",
)
TEXT_TOKEN_ACC = TOKEN_TYPES.define(
    "text_token_acc",
    Kind.GAUGE,
    "Top-1 accuracy over supervised tokens that are not coordinate tokens.",
    unit="fraction",
    when="with `custom.token_type_metrics.enabled: true`",
    over="supervised non-coordinate tokens",
    better="higher",
)


def _frac(token_type: str) -> str:
    return TOKEN_TYPES.define(
        f"{token_type}_token_frac",
        Kind.RATE,
        f"Share of supervised tokens whose true type is {token_type}.",
        unit="fraction",
        when="with `custom.token_type_metrics.enabled: true`",
        over="supervised tokens",
        pattern="<type>_token_frac",
    )


def _acc(token_type: str, top5: bool) -> str:
    return TOKEN_TYPES.define(
        f"{token_type}_token_acc" + ("_top5" if top5 else ""),
        Kind.GAUGE,
        f"Top-{5 if top5 else 1} accuracy over supervised tokens of type {token_type}.",
        unit="fraction",
        when=TOP5_ON if top5 else TYPES_ON,
        over=f"supervised {token_type} tokens",
        pattern="<type>_token_acc" + ("_top5" if top5 else ""),
        better="higher",
    )


DESC_TOKEN_FRAC, FORMAT_TOKEN_FRAC, COORD_TOKEN_FRAC = _frac("desc"), _frac("format"), _frac("coord")
DESC_TOKEN_ACC, FORMAT_TOKEN_ACC, COORD_TOKEN_ACC = (
    _acc("desc", False),
    _acc("format", False),
    _acc("coord", False),
)
DESC_TOKEN_ACC_TOP5 = _acc("desc", True)
FORMAT_TOKEN_ACC_TOP5 = _acc("format", True)
COORD_TOKEN_ACC_TOP5 = _acc("coord", True)

COORD_MONITOR = KeySection(
    "Coordinate vocabulary, both ways (`coord_monitor/*`)",
    "Two opposite failures: a coordinate slot answered with text, and a text slot answered with a "
    "coordinate token. "
    "`text` is every non-coordinate type together. Counts samples of included datasets, as the split by type does.",
)


def _flip(name: str, where: str, into: str, over: str) -> str:
    return COORD_MONITOR.define(
        f"coord_monitor/{name}",
        Kind.GAUGE,
        f"Among {where}, the share whose most likely token {into} a coordinate token.",
        unit="fraction",
        when=TYPES_ON,
        over=over,
        better="lower",
    )


FLIP_COORD_TO_NONCOORD = _flip(
    "flip_coord_to_noncoord", "true coordinate slots", "is not", "coordinate tokens"
)
FLIP_TEXT_TO_COORD = _flip(
    "flip_text_to_coord", "true non-coordinate slots", "is", "supervised non-coordinate tokens"
)
FLIP_FORMAT_TO_COORD = _flip("flip_format_to_coord", "true format slots", "is", "supervised format tokens")
FLIP_DESC_TO_COORD = _flip("flip_desc_to_coord", "true desc slots", "is", "supervised desc tokens")


def _mass(token_type: str) -> str:
    healthy = (
        "low values mean probability leaks into text"
        if token_type == "coord"
        else "high values mean coordinates intrude"
    )
    return COORD_MONITOR.define(
        f"coord_monitor/coord_vocab_mass_at_gt_{token_type}",
        Kind.GAUGE,
        f"Mean probability inside the coordinate vocabulary at true {token_type} slots; {healthy}.",
        unit="probability",
        when=TYPES_ON + ", and coord_monitor_mass on (capped by coord_monitor_mass_max_tokens)",
        over=f"supervised {token_type} tokens",
        pattern="coord_monitor/coord_vocab_mass_at_gt_<type>",
        better="higher" if token_type == "coord" else "lower",
    )


COORD_VOCAB_MASS_AT_GT_COORD = _mass("coord")
COORD_VOCAB_MASS_AT_GT_TEXT = _mass("text")
COORD_VOCAB_MASS_AT_GT_FORMAT = _mass("format")
COORD_VOCAB_MASS_AT_GT_DESC = _mass("desc")

SECTIONS = (TOKEN_TYPES, COORD_MONITOR)
