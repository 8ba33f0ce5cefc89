"""Distributions of coordinates in the files of an inference run.

A token trace line holds under `coord_distributions` what its backend showed. For a run of another backend `coordexp
score` finds them by one forward over each answer, and keeps them in `coord_distributions.jsonl`:

    {"image_id": 0, "answer_crc32": 91, "coord_distributions": {"positions": [9, 11], "mass": [1.0, 0.98],
     "bins": [[12], [40, 41]], "weights": [[1.0], [0.7, 0.3]]}}

positions: of coordinate tokens in the answer.  mass: probability of all coordinate tokens there.  bins, weights: atoms
of the distribution over the bins.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coordexp.errors import RecordError
from coordexp.eval.predictions.artifacts import DISTRIBUTIONS, read_jsonl_lines
from coordexp.rollout.types import BinDistribution, Rollout

COORD_DISTRIBUTIONS = "coord_distributions"
ANSWER_CRC = "answer_crc32"
_KEYS = ("positions", "mass", "bins", "weights")


def distributions_entry(rollout: Rollout) -> dict[str, list[Any]]:
    """Of an answer whose backend shows them; empty when it has none."""
    found = [(p, one) for p, one in enumerate(rollout.coord_distributions) if one is not None]
    return entry_of([p for p, _ in found], [one for _, one in found]) if rollout.coord_distributions else {}


def entry_of(positions: Sequence[int], distributions: Sequence[BinDistribution]) -> dict[str, list[Any]]:
    """Distributions at these positions of an answer, as files hold them."""
    return {
        "positions": list(positions),
        "mass": [round(one.mass, 5) for one in distributions],
        "bins": [list(one.bins) for one in distributions],
        "weights": [[round(weight, 5) for weight in one.weights] for one in distributions],
    }


def atoms_by_position(trace: Mapping[str, Any]) -> dict[int, tuple[list[int], list[float]]]:
    """(bins, weights) of the distribution at each position of a traced answer; empty when it holds none."""
    entry = trace.get(COORD_DISTRIBUTIONS)
    if entry is None:
        return {}
    if not isinstance(entry, Mapping) or any(
        len(entry.get(key, ())) != len(entry["positions"]) for key in _KEYS
    ):
        raise RecordError(
            f"image {trace['image_id']}: {COORD_DISTRIBUTIONS} must hold {', '.join(_KEYS)} of one length; run "
            "`coordexp infer` again."
        )
    return dict(zip(entry["positions"], zip(entry["bins"], entry["weights"], strict=True), strict=True))


def lacks_distributions(trace: Mapping[str, Any]) -> bool:
    """Whether a trace line holds an answer and nothing of what its coordinates were read from."""
    return COORD_DISTRIBUTIONS not in trace and bool(trace["generated_token_text"])


def answer_crc(trace: Mapping[str, Any]) -> int:
    """Tells the answer of a trace line from another one."""
    return zlib.crc32("".join(trace["generated_token_text"]).encode())


def with_distributions(directory: Path, traces: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`traces` with what stands beside them in `coord_distributions.jsonl`, when they hold none themselves.

    Raises RecordError when that file is of other answers.
    """
    path = directory / DISTRIBUTIONS
    if not any(map(lacks_distributions, traces)) or not path.is_file():
        return list(traces)
    beside = read_jsonl_lines(path, ("image_id", ANSWER_CRC, COORD_DISTRIBUTIONS))
    mine = [(trace["image_id"], answer_crc(trace)) for trace in traces]
    if mine != [(row["image_id"], row[ANSWER_CRC]) for row in beside]:
        raise RecordError(f"{path} is of other answers than the trace beside it; remove it and score again.")
    return [
        {**trace, COORD_DISTRIBUTIONS: row[COORD_DISTRIBUTIONS]}
        for trace, row in zip(traces, beside, strict=True)
    ]
