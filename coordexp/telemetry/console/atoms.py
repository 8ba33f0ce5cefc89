"""The terms that the loss of a record is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from coordexp.metrics import keys_control, keys_stage1, keys_stage2
from coordexp.metrics.keys_run import gradient_norm
from coordexp.telemetry.console.words import Numbers

COORD_TERMS = {
    "soft_ce": keys_stage1.COORD_DIAG_SOFT_CE,
    "w1": keys_stage1.COORD_DIAG_W1,
    "ce": keys_stage1.COORD_DIAG_CE,
    "gate": keys_stage1.COORD_DIAG_GATE,
}


@dataclass(frozen=True)
class Atom:
    """A term of the loss.

    name: what it is called on the console.  key: of the metric behind it.  value: after its weight.  share: of the
    loss.  gradient_share: its gradient's norm among those of all terms, where a probe measured it.
    """

    name: str
    key: str
    value: float
    share: float
    gradient_share: float | None = None


def atoms_of(numbers: Numbers, coord_weights: Mapping[str, float] | None) -> dict[str, list[Atom]]:
    """The terms of the loss of a record, the largest first: by channel (`A`, `B`), in stage 1 under ``.

    coord_weights: name of a coordinate term of stage 1 -> its configured weight, in whose place the record may say
    another one; None: cross-entropy on every token.
    """
    found = {key: value for key in keys_stage2.LOSS.specs if (value := numbers.get(key)) is not None}
    if found:
        by_channel: dict[str, dict[str, tuple[str, float]]] = {}
        for key, value in found.items():
            provenance, name = key.split("/")[1:]
            by_channel.setdefault(provenance[0], {})[key] = (name, value)
        return {channel: _with_shares(terms, numbers) for channel, terms in sorted(by_channel.items())}
    terms = _latent(numbers) or _stage1(numbers, coord_weights)
    return {"": _with_shares(terms, numbers)} if terms else {}


def _latent(numbers: Numbers) -> dict[str, tuple[str, float]]:
    """Of a run with a latent prefix: a term for each module of its objective."""
    return {
        key: (module.removeprefix("latent_"), numbers[key])
        for module, key in keys_stage1.LATENT_SHARE.items()
        if key in numbers
    }


def _stage1(numbers: Numbers, coord_weights: Mapping[str, float] | None) -> dict[str, tuple[str, float]]:
    text = numbers.get(keys_stage1.BASE_CE_LOSS)
    if text is None:
        return {}
    weights, text_weight = coord_weights, 1.0
    if weights is None:  # one mean over all tokens; of a coordinate token it is that on bins plus the gate
        num_text = numbers.get(keys_stage1.BASE_CE_NONCOORD_TOKENS, 0.0)
        num_coord = numbers.get(keys_stage1.COORD_DIAG_COORD_TOKENS, 0.0)
        text_weight = num_text / (num_text + num_coord) if num_text + num_coord else 1.0
        weights = dict.fromkeys(("ce", "gate"), 1 - text_weight)
    terms = {keys_stage1.BASE_CE_LOSS: ("text", text_weight * text)}
    for name, configured in weights.items():
        weight = numbers.get(keys_control.schedule_key("coord_soft_ce_w1", f"{name}_weight"), configured)
        value = numbers.get(COORD_TERMS[name])
        if value is not None and weight:
            terms[COORD_TERMS[name]] = (name, weight * value)
    return terms


def _with_shares(terms: Mapping[str, tuple[str, float]], numbers: Numbers) -> list[Atom]:
    total = sum(value for _, value in terms.values())
    norms = {key: numbers[norm] for key in terms if (norm := gradient_norm(key)) in numbers}
    all_norms = sum(norms.values())
    atoms = [
        Atom(
            name,
            key,
            value,
            value / total if total else 0.0,
            norms[key] / all_norms if key in norms and all_norms else None,
        )
        for key, (name, value) in terms.items()
    ]
    return sorted(atoms, key=lambda atom: -atom.value)
