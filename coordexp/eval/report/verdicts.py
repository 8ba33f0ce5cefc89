"""What gates between stages decided (`coordexp run`), for the report: facts of one run, or a page of all stages.

A training run by itself has a page too, where there is something to tell of it: a latent prefix beside other prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coordexp.control.acceptance import VERDICT_FILE
from coordexp.errors import RecordError
from coordexp.eval.report.page import format_measure, write_page
from coordexp.eval.trained.latents import prompt_rows
from coordexp.files import read_json


def holds_verdicts(folder: Path) -> bool:
    """Whether a folder is that of stages, or of one of them."""
    return (folder / VERDICT_FILE).is_file()


def verdict_facts(checkpoint: Path) -> dict[str, str]:
    """What was decided of the run that a checkpoint comes from, one entry per criterion; empty without a verdict."""
    if not holds_verdicts(checkpoint.parent):
        return {}
    (stage,) = read_stages(checkpoint.parent)
    criteria = {one["text"]: _criterion(one) for one in stage["criteria"]}
    return {f"stage {stage['stage']}": _decision(stage), **criteria, **_verified(stage)}


def read_stages(folder: Path) -> list[dict[str, Any]]:
    """The verdicts of all stages, or of the one whose folder this is; RecordError for another file."""
    path = folder / VERDICT_FILE
    found = read_json(path)
    try:
        return [
            {"criteria": [], "verified": None, **one} for one in found.get("stages", [found]) if one["stage"]
        ]
    except (AttributeError, KeyError, TypeError):
        raise RecordError(f"{path}: is no verdict of `coordexp run`.") from None


def write_verdicts(folder: Path, output: Path) -> Path:
    """One HTML file with the verdict on every stage."""
    stages = [
        {
            "name": stage["stage"],
            "accepted": stage["accepted"],
            "decision": _decision(stage),
            "rows": [
                (one["text"], one["passed"], one["reason"], one["on_fail"]) for one in stage["criteria"]
            ],
            "verified": _verified(stage),
            "prompts": _prompt_cells(_folder_of(stage, folder)),
        }
        for stage in read_stages(folder)
    ]
    accepted = all(stage["accepted"] for stage in stages)
    return write_page(
        output, "verdicts.html.jinja", title=folder.resolve().name, accepted=accepted, stages=stages
    )


def holds_prompts(folder: Path) -> bool:
    """Whether a folder is that of a training run with a latent prefix, which no gate has judged."""
    return not holds_verdicts(folder) and bool(prompt_rows(folder))


def write_prompts(folder: Path, output: Path) -> Path:
    """One HTML file with the latent prefix of a training run beside other prompts."""
    title = folder.resolve().name
    return write_page(output, "prompts.html.jinja", title=title, prompts=_prompt_cells(folder))


def _folder_of(stage: Mapping[str, Any], folder: Path) -> Path:
    """Where a stage of `read_stages(folder)` ran."""
    inside = folder / str(stage["stage"])
    return inside if holds_verdicts(inside) else folder


def _prompt_cells(run: Path) -> list[tuple[str, str, str, int]]:
    """Rows of the table of prompts: words, nats a token, share of first tokens, step."""
    return [
        (row.prompt, format_measure(row.nll, 4), f"{row.first_token:.1%}", row.step)
        for row in prompt_rows(run)
    ]


def _decision(stage: Mapping[str, Any]) -> str:
    text = str(stage["outcome"]).replace("_", " ")
    if "last_step" not in stage:
        return text
    return f"{text} after step {stage['last_step']}; best checkpoint: {stage['best'] or 'none'}"


def _criterion(one: Mapping[str, Any]) -> str:
    return f"{'met' if one['passed'] else 'NOT met'}: {one['reason']}"


def _verified(stage: Mapping[str, Any]) -> dict[str, str]:
    """What loading the best checkpoint again found."""
    found = stage["verified"]
    if found is None:
        return {}
    if found["faults"]:
        return {"best checkpoint": "; ".join(found["faults"])}
    scores = ", ".join(f"{score:.6g} ({backend})" for backend, score in found["scored"].items())
    return {"best checkpoint": f"{found['metric']} logged {found['logged']:.6g}, loaded again {scores}"}
