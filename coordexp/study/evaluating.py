"""The evaluation of one cell, in a process of its own: every readout of the coordinates, scored by every method.

python -m coordexp.study.evaluating JOB.json

eval/<coord>/                 answers and their trace
eval/<coord>/<score>/         scored predictions, metrics.json, per_image.json, ...
eval/<coord>/readout.json     written last: what it was made from, and the numbers
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from coordexp.config.schema.rollout import Readout
from coordexp.files import read_json, write_json
from coordexp.study.schema import METRICS, ScoreMethod

READOUT = "readout.json"
GATES = (0.5, 0.75)
"""Mask IoU above which an object of an answer counts as found, of `rollout_f1@0.5` and `rollout_f1@0.75`."""


@dataclass(frozen=True)
class EvaluationJob:
    """What is evaluated. identity: of the weights.  output: the folder `eval`."""

    checkpoint: str
    data: str
    output: str
    identity: str
    coord: tuple[Readout, ...]
    score: tuple[ScoreMethod, ...]
    max_new_tokens: int | None
    batch_size: int
    limit: int | None
    cut_prompt: int | None = None

    def made_from(self, coord: str) -> dict[str, Any]:
        """What decides the numbers of one readout."""
        keys = ("identity", "checkpoint", "max_new_tokens", "limit")
        made = {key: value for key, value in asdict(self).items() if key in keys} | {"coord": coord}
        return made if self.cut_prompt is None else {**made, "cut_prompt": self.cut_prompt}

    def found(self, coord: str) -> dict[str, Any] | None:
        """The numbers of a readout that is there, None where some are missing or are of something else."""
        path = Path(self.output) / coord / READOUT
        if not path.is_file():
            return None
        record: dict[str, Any] = read_json(path)
        is_same = record["made_from"] == self.made_from(coord)
        return record if is_same and set(self.score) <= record["scores"].keys() else None


def readouts(job: EvaluationJob) -> dict[str, dict[str, Any]] | None:
    """`<coord>/<score>` -> numbers; None while some are missing."""
    found = {coord: job.found(coord) for coord in job.coord}
    numbers: dict[str, dict[str, Any]] = {}
    for coord, record in found.items():
        if record is None:
            return None
        numbers |= {f"{coord}/{score}": record["scores"][score] for score in job.score}
    return numbers


def evaluate_cell(job: EvaluationJob) -> None:
    """Make the readouts that are not there."""
    for coord in job.coord:
        if job.found(coord) is None:
            _evaluate_readout(job, coord)


def _evaluate_readout(job: EvaluationJob, coord: str) -> None:
    from coordexp.eval.evaluate import evaluate, from_run, write_evaluation
    from coordexp.eval.on_policy import on_policy_numbers
    from coordexp.eval.predictions.artifacts import SCORED
    from coordexp.eval.predictions.confidence import Scoring, score_directory
    from coordexp.eval.predictions.scored import load_scored_run
    from coordexp.inference.infer import infer_file

    folder = Path(job.output) / coord
    _start_anew_unless(folder, job.made_from(coord))
    images = infer_file(
        Path(job.checkpoint), Path(job.data), folder, overwrite=False, coord=coord, batch_size=job.batch_size,
        max_new_tokens=job.max_new_tokens, limit=job.limit, cut_prompt=job.cut_prompt,
    )  # fmt: skip
    answers: dict[str, Any] = on_policy_numbers(images, gate=GATES[0])
    answers |= {f"rollout_f1@{gate}": on_policy_numbers(images, gate=gate)["rollout_f1"] for gate in GATES}
    scores: dict[str, Any] = {}
    for method in job.score:
        score_directory(folder, Scoring(method))
        evaluation = evaluate(from_run(folder))
        traces = load_scored_run(folder).traces
        tokens = sum(trace.num_tokens or 0 for trace in traces.values())
        asked = sum(trace.num_prompt_tokens or 0 for trace in traces.values())
        write_evaluation(evaluation, folder / method)
        (folder / SCORED).replace(folder / method / SCORED)
        scores[method] = _numbers({**evaluation.metrics, **answers}, tokens, asked)
    write_json(folder / READOUT, {"made_from": job.made_from(coord), "scores": scores})


def _start_anew_unless(folder: Path, made_from: Mapping[str, Any]) -> None:
    """Keep answers of a stopped evaluation of the same, and nothing else."""
    begun = folder / "made_from.json"
    if not begun.is_file() or read_json(begun) != made_from:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_json(begun, made_from)


def _numbers(metrics: Mapping[str, Any], tokens: int, asked: int) -> dict[str, Any]:
    """What `cell.json` keeps: the columns, and counts.  tokens: of the answers.  asked: of the prompts."""
    num_pred = metrics["num_pred"]
    kept = {name: metrics.get(name) for name in METRICS}
    kept["tokens_per_object"] = tokens / num_pred if num_pred else None
    num_images = metrics["num_images"]
    kept["prompt_tokens"] = asked / num_images if num_images else None
    kept["seconds_per_image"] = metrics["rollout_seconds"] / num_images if num_images else None
    counts = {name: metrics[name] for name in ("num_images", "num_gt", "num_pred", "rollout_seconds")}
    return {**kept, **counts, "tokens_generated": tokens}


def main() -> None:
    """Run the job in the file that the first argument names."""
    values = read_json(sys.argv[1]).items()
    job: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values}
    evaluate_cell(EvaluationJob(**job))


if __name__ == "__main__":
    main()
