"""One checkpoint, one set of images, many ways to decode: a folder for each, and one table (`coordexp sweep`).

    OUT/t0_r1_argmax_free/          what `coordexp infer`, `score` and `eval` write
    OUT/t0.7_r1_argmax_free/answer-0 .. answer-7     with k = 8, where answers are sampled
    OUT/sweep.json, OUT/sweep.md    the table; with k also what sampled answers found together (coordexp.eval.oracle)

The model is loaded once. What a folder holds already is not done again, so a sweep that was stopped goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from coordexp.config.schema.rollout import Readout
from coordexp.errors import ConfigError
from coordexp.eval.evaluate import METRICS, EvalSettings, evaluate_directory
from coordexp.eval.oracle import oracle_of
from coordexp.eval.predictions.artifacts import SCORED
from coordexp.eval.predictions.confidence import Scoring, score_directory
from coordexp.eval.predictions.scored import load_scored_run
from coordexp.eval.sweep import NUMBERS, SWEEP, write_table
from coordexp.files import read_json, write_json
from coordexp.inference.infer import Inference
from coordexp.inference.settings import InferSettings
from coordexp.rollout.backend import RolloutBackend
from coordexp.rollout.backends.hf import HfBackend
from coordexp.rollout.backends.vllm_offline import VllmOfflineBackend

OnImages = Callable[[int, int], object]


@dataclass(frozen=True)
class Way:
    """One way to decode."""

    temperature: float
    repetition_penalty: float
    coord: Readout
    guided: bool

    @property
    def name(self) -> str:
        """Of its folder."""
        kind = "guided" if self.guided else "free"
        return f"t{self.temperature:g}_r{self.repetition_penalty:g}_{self.coord}_{kind}"

    @property
    def greedy(self) -> Way:
        """The same, but greedily."""
        return replace(self, temperature=0.0)


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """Which ways are compared: every combination.

    k: answers to each question where they are sampled; more than one needs temperature 0 and another beside it.
    """

    temperatures: Sequence[float] = (0.0,)
    repetition_penalties: Sequence[float] = (1.0,)
    readouts: Sequence[Readout] = ("argmax",)
    guided: Sequence[bool] = (False,)
    k: int = 1

    def __post_init__(self) -> None:
        if self.k > 1 and not (0.0 in self.temperatures and any(self.temperatures)):
            raise ConfigError(
                f"--k {self.k} compares sampled answers with the greedy one: give --temperature 0 and one above it, "
                "such as --temperature 0 0.7."
            )

    @cached_property
    def ways(self) -> list[Way]:
        """In the order of the table; what is named twice is done once."""
        every = product(self.temperatures, self.repetition_penalties, self.readouts, self.guided)
        return list(dict.fromkeys(Way(*one) for one in every))

    def num_answers(self, way: Way) -> int:
        """To each question."""
        return self.k if way.temperature else 1


@dataclass(frozen=True)
class _Task:
    """One inference: a way with a seed of its own."""

    way: Way
    seed: int
    folder: Path


class Sweep:
    """A checked sweep; nothing is loaded or written yet.

    scoring: of the predictions, the same for all ways, so that their AP can be compared.

    Raises ConfigError or RecordError for what `Inference.prepare` refuses, or for the backend `openai`, which decodes
    in one way.
    """

    def __init__(
        self,
        model: Path,
        data: Path,
        output: Path,
        plan: SweepPlan,
        settings: InferSettings,
        scoring: Scoring,
    ) -> None:
        if settings.backend == "openai":
            raise ConfigError(
                "a sweep changes how answers are decoded, and --backend openai has one way; use hf or vllm."
            )
        self.plan, self.output = plan, output
        self._scoring = scoring
        self._tasks = [
            _Task(
                way,
                seed,
                output / way.name / f"answer-{seed}" if plan.num_answers(way) > 1 else output / way.name,
            )
            for way in plan.ways
            for seed in range(plan.num_answers(way))
        ]
        first = Inference.prepare(model, data, self._tasks[0].folder, settings)
        settings = replace(settings, max_new_tokens=first.max_new_tokens)
        self._jobs = {
            task: first.decoded(replace(settings, seed=task.seed, **asdict(task.way)), task.folder)
            for task in self._tasks
        }
        self._first = first

    @property
    def num_images(self) -> int:
        """Of one way."""
        return len(self._first.records)

    @property
    def num_questions(self) -> int:
        """To be answered by all ways together, those already answered included."""
        return self.num_images * len(self._tasks)

    def run(
        self, *, overwrite: bool = False, on_images: OnImages = lambda done, total: None
    ) -> dict[str, Any]:
        """Do what is missing, and write sweep.json and sweep.md; returns the content of the former.

        on_images: called with (questions just answered, in all).
        """
        with closing(_Loaded(self._first)) as loaded:
            for task, job in self._jobs.items():
                self._do(task, job, loaded, overwrite, on_images)
        found = {
            "model": str(self._first.model.resolve()),
            "data": str(self._first.data.resolve()),
            "backend": self._first.settings.backend,
            "num_images": self.num_images,
            "k": self.plan.k,
            "ways": [self._row(way) for way in self.plan.ways],
            "oracle": [self._oracle(way) for way in self.plan.ways if self.plan.num_answers(way) > 1],
        }
        write_json(self.output / SWEEP, found)
        write_table(self.output, found)
        return found

    def _do(self, task: _Task, job: Inference, loaded: _Loaded, overwrite: bool, on_images: OnImages) -> None:
        folder = task.folder
        with job.opened(overwrite=overwrite) as log:
            if log.num_done < self.num_images:
                backend, tokenizer = loaded.for_job(job)
                for name in (SCORED, METRICS):
                    (folder / name).unlink(missing_ok=True)
                job.answer(
                    log, backend, tokenizer, on_images=lambda done, _: on_images(done, self.num_questions)
                )
            else:
                log.finish()
                on_images(self.num_images, self.num_questions)
        if not (folder / METRICS).is_file():
            score_directory(folder, self._scoring)
            evaluate_directory(folder, EvalSettings())

    def _folders(self, way: Way) -> list[Path]:
        return [task.folder for task in self._tasks if task.way == way]

    def _row(self, way: Way) -> dict[str, Any]:
        """The numbers of one way, means over its answers."""
        folders = self._folders(way)
        found = [_numbers(folder) for folder in folders]
        return {
            "name": way.name,
            **asdict(way),
            "folders": [str(folder.relative_to(self.output)) for folder in folders],
            **{name: _mean([numbers[name] for numbers in found]) for name in NUMBERS},
        }

    def _oracle(self, way: Way) -> dict[str, Any]:
        greedy = load_scored_run(self._folders(way.greedy)[0]).images
        answers = [load_scored_run(folder).images for folder in self._folders(way)]
        return {"name": way.name, "greedy": way.greedy.name, **oracle_of(greedy, answers).as_json()}


class _Loaded:
    """The model, loaded when the first answer is missing."""

    def __init__(self, first: Inference) -> None:
        self._first = first
        self._backend: RolloutBackend | None = None
        self._tokenizer: Any = None

    def for_job(self, job: Inference) -> tuple[RolloutBackend, Any]:
        """The backend, decoding as the job says, and its tokenizer."""
        if self._backend is None:
            self._backend, self._tokenizer = self._first.load_backend()
        assert isinstance(self._backend, HfBackend | VllmOfflineBackend)
        self._backend.settings = job.settings.decoding
        return self._backend, self._tokenizer

    def close(self) -> None:
        """Give the model back."""
        if self._backend is not None:
            self._backend.close()


def _numbers(folder: Path) -> dict[str, float | None]:
    """What the table shows of one inference."""
    metrics: Mapping[str, Any] = read_json(folder / METRICS)
    run = load_scored_run(folder)
    tokens = [trace.num_tokens for trace in run.traces.values()]
    num_tokens, seconds = sum(number or 0 for number in tokens), run.seconds
    drops = dict(metrics["drop_reasons"])
    num_truncated = drops.pop("truncated", 0)
    return {
        **{name: metrics[name] for name in NUMBERS if name in metrics},
        "drops": sum(drops.values()),
        "truncated": num_truncated,
        "tokens_per_second": num_tokens / seconds if seconds else None,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
