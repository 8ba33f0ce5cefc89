"""One dumped sample as a JSON record, a Markdown page and a page of coloured tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from coordexp.telemetry.token_page import PageToken, render_token_page


class Picture(Protocol):
    """What `DumpSample.draw` returns: a PIL image."""

    def save(self, fp: Path, format: str | None = None) -> None:
        """Write the picture."""
        ...


@dataclass(frozen=True)
class DumpSample:
    """One sample, in plain values.

    prompt, rollout, target: texts.  target_tokens: (text, role name) of every token of prompt and target.
    gts, preds: (desc, bins) with bins 0..999, a box xyxy or a flat polygon.  matched: (pred, gt) index pairs.
    draw: makes the picture, on the writing thread; None for no picture.  facts: further numbers and words, JSON values.
    """

    sample_id: str
    prompt: str
    rollout: str
    target: str
    target_tokens: Sequence[tuple[str, str]] = ()
    gts: Sequence[tuple[str, Sequence[int]]] = ()
    preds: Sequence[tuple[str, Sequence[int]]] = ()
    matched: Sequence[tuple[int, int]] = ()
    draw: Callable[[], Picture] | None = field(default=None, repr=False)
    facts: Mapping[str, Any] = field(default_factory=dict)


def dump_record(sample: DumpSample, step: int, max_text_chars: int) -> dict[str, Any]:
    """The content of the `.json`; every text and the token runs are cut after `max_text_chars` characters.

    Each object names its partner by index, null for a false positive or a missed object.
    """
    pred_of = {gt: pred for pred, gt in sample.matched}
    gt_of = dict(sample.matched)
    runs = [
        {"role": role, "text": "".join(text for text, _ in group)}
        for role, group in groupby(
            _cut_tokens(sample.target_tokens, max_text_chars), key=lambda token: token[1]
        )
    ]
    return {
        "step": step,
        "sample_id": sample.sample_id,
        "facts": dict(sample.facts),
        "prompt": cut(sample.prompt, max_text_chars),
        "rollout": cut(sample.rollout, max_text_chars),
        "target": cut(sample.target, max_text_chars),
        "target_runs": runs,
        "gt": [_object(obj, "pred", pred_of.get(index)) for index, obj in enumerate(sample.gts)],
        "pred": [_object(obj, "gt", gt_of.get(index)) for index, obj in enumerate(sample.preds)],
    }


def as_markdown(record: Mapping[str, Any], name: str, *, has_picture: bool) -> str:
    """The record for reading; pages and picture beside it are linked by `name`."""
    facts = [f"- {key}: {_inline(value)}" for key, value in record["facts"].items()]
    picture = [f"![ground truth and prediction]({name}.png)", ""] if has_picture else []
    pred_rows = [
        (f"pred {index}", pred, "false positive" if pred["gt"] is None else f"matches gt {pred['gt']}")
        for index, pred in enumerate(record["pred"])
    ]
    gt_rows = [
        (f"gt {index}", gt, "missed" if gt["pred"] is None else f"found by pred {gt['pred']}")
        for index, gt in enumerate(record["gt"])
    ]
    objects = [
        f"| {who} | {_cell(obj['desc'])} | {' '.join(map(str, obj['bins']))} | {fate} |"
        for who, obj, fate in pred_rows + gt_rows
    ]
    runs = [f"| {run['role']} | {_cell(run['text'])} |" for run in record["target_runs"]]
    lines = [
        f"# Step {record['step']}, {record['sample_id']}",
        "",
        *facts,
        f"- every token with its colour: [{name}.html]({name}.html)",
        "",
        *picture,
        "## Objects",
        "",
        "| | description | bins | |",
        "|---|---|---|---|",
        *objects,
        "",
        *_block("Prompt", record["prompt"]),
        *_block("Rollout", record["rollout"]),
        *_block("Target", record["target"]),
        "## Target by role",
        "",
        "| role | text |",
        "|---|---|",
        *runs,
    ]
    return "\n".join(lines) + "\n"


def as_html(record: Mapping[str, Any], tokens: Sequence[tuple[str, str]], max_text_chars: int) -> str:
    """The tokens of prompt and target, coloured by role."""
    facts = [f"{key}: {value}" for key, value in record["facts"].items()]
    shown = [PageToken(text, role, tooltip=role) for text, role in _cut_tokens(tokens, max_text_chars)]
    return render_token_page(f"Step {record['step']}, {record['sample_id']}", facts, shown)


def cut(text: str, max_chars: int) -> str:
    """`text`, or its beginning and how much was left out. max_chars: 0 leaves nothing out."""
    if not max_chars or len(text) <= max_chars:
        return text
    return f"{text[:max_chars]} ... ({len(text) - max_chars} more characters)"


def _cut_tokens(tokens: Sequence[tuple[str, str]], max_chars: int) -> list[tuple[str, str]]:
    """The tokens that end within `max_chars` (0: all), and a last one that says how many were left out."""
    if not max_chars:
        return list(tokens)
    kept: list[tuple[str, str]] = []
    used = 0
    for text, role in tokens:
        used += len(text)
        if used > max_chars:
            return [*kept, (f" ... ({len(tokens) - len(kept)} more tokens)", "cut")]
        kept.append((text, role))
    return kept


def _object(obj: tuple[str, Sequence[int]], partner: str, index: int | None) -> dict[str, Any]:
    return {"desc": obj[0], "bins": list(map(int, obj[1])), partner: index}


def _block(title: str, text: str) -> list[str]:
    """A section with `text` as it is: the fence is longer than any run of backticks in it."""
    fence = "`" * max(3, 1 + max((len(list(run)) for tick, run in groupby(text) if tick == "`"), default=0))
    return [f"## {title}", "", fence, text, fence, ""]


def _cell(text: str) -> str:
    """`text` for a table cell: code, on one line, bars escaped."""
    return f"`` {_inline(text).replace('|', chr(92) + '|')} ``"


def _inline(value: object) -> str:
    return str(value).replace("\n", "\\n")
