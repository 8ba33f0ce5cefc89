"""What a study file may say (`coordexp study FILE.yaml`). No torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from coordexp.config.schema.fusion import NAME_PATTERN
from coordexp.config.schema.rollout import Readout
from coordexp.config.schema.section import Section

ScoreMethod = Literal["logprob", "expected_iou"]
Checkpoint = Annotated[int, Field(gt=0)] | Literal["last", "best"]
"""Step of a checkpoint, or which one."""
Name = Annotated[str, Field(pattern=f"^{NAME_PATTERN}$")]
LAST: Literal["last"] = "last"
BEST: Literal["best"] = "best"
METRICS = {
    "f1_at_50": "F1 at .5",
    "f1_50_95": "F1 .5:.95",
    "AP": "mAP",
    "AP75": "AP75",
    "AP_const": "AP, all scores 1",
    "precision_at_50": "precision at .5",
    "recall_at_50": "recall at .5",
    "rollout_f1@0.5": "rollout F1 at .5",
    "rollout_f1@0.75": "rollout F1 at .75",
    "desc_acc": "names right",
    "bin_error": "bin error",
    "parse_rate": "parse rate",
    "answer_rate": "whole answers",
    "duplicate_rate_mean": "duplicates",
    "boxes_per_second": "boxes/s",
    "tokens_per_object": "tokens/object",
    "prompt_tokens": "prompt tokens",
    "seconds_per_image": "s/image",
}
"""Numbers of a cell's evaluation -> head of their column."""
LOWER_IS_BETTER = frozenset(
    {"bin_error", "duplicate_rate_mean", "tokens_per_object", "prompt_tokens", "seconds_per_image"}
)


def _listed(value: object) -> object:
    return value if value is None or isinstance(value, list) else [value]


def _as_path(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


class StudyShapes(Section):
    """Synthetic scenes, drawn below the study; what is left out is as the preset has it."""

    preset: str = Field(default="demo", description="As in `coordexp data shapes --preset`.")
    train: int = Field(default=4000, gt=0, description="Training scenes.")
    val: int = Field(default=200, gt=0, description="Validation scenes.")
    seed: int = Field(default=0, ge=0, description="Of the scenes; all seeds of the study see the same ones.")
    width: int | None = None
    height: int | None = None
    min_objects: int | None = None
    max_objects: int | None = None
    min_side: int | None = None
    max_side: int | None = None
    kinds: list[str] | None = None
    colors: list[str] | None = None
    max_overlap: float | None = None
    empty_fraction: float | None = None
    varied_background: bool | None = None
    real_valued: bool | None = None
    unlabelled: float | None = None
    name_skew: float | None = None
    asked_colors: int | None = None
    num_lists: int | None = None


class StudyData(Section):
    """One data set: scenes to draw, or files."""

    shapes: StudyShapes | None = Field(default=None, description="Scenes to draw.")
    train_jsonl: str | None = Field(default=None, description="Training records.")
    val_jsonl: str | None = Field(default=None, description="Records that are answered and evaluated.")
    start_from: Name | None = Field(
        default=None,
        description="A data set listed before: what would start from the model goes on from its own last checkpoint "
        "there, for tasks too hard to learn from random weights.",
    )
    label: str | None = Field(default=None, description="What the page calls it; the name by default.")

    @model_validator(mode="after")
    def _one_of_both(self) -> StudyData:
        files = (self.train_jsonl, self.val_jsonl)
        if (self.shapes is None) == (files == (None, None)) or (self.shapes is None and None in files):
            raise ValueError("expected shapes, or both train_jsonl and val_jsonl")
        return self


class StudyModel(Section):
    """The model that a recipe starts from: a tiny one made anew for every seed, or a folder."""

    preset: Literal["demo", "nano", "real-vocab"] = Field(
        default="demo",
        description="As in `coordexp model tiny --preset`; the seed of the cell makes its weights.",
    )
    coord_tokens: bool = Field(default=True, description="Whether it has the coordinate tokens.")
    latent_tokens: int = Field(
        default=0, ge=0, description="Latent tokens that it is given, for recipes of variant latent_prefix."
    )
    path: str | None = Field(default=None, description="A model folder, the same for all seeds.")

    @model_validator(mode="after")
    def _path_alone(self) -> StudyModel:
        if self.path is not None and self.model_fields_set != {"path"}:
            raise ValueError("path names a model that is there; preset and tokens belong to one that is made")
        return self


ModelChoice = Annotated[StudyModel, BeforeValidator(_as_path)]


class StudyStart(Section):
    """A checkpoint of another recipe, of the same data and seed."""

    recipe: str = Field(description="Whose.")
    checkpoint: Checkpoint = Field(default=LAST, description="last, best, or the step of one.")


class StudyBudget(Section):
    """How long a recipe trains; left out, its file says so (`max_steps`)."""

    steps: int | None = Field(
        default=None, ge=0, description="Optimizer steps; 0 evaluates what it starts from."
    )
    seconds_of: str | None = Field(
        default=None,
        description="Another recipe: as many steps as fit in the seconds that its steps took, for a control of equal "
        "wall time.",
    )
    measured_on: str | None = Field(
        default=None,
        description="The recipe whose seconds per step are those of this one: the same run file, with steps of its "
        "own.",
    )

    clock: Literal["wall", "cpu"] = Field(
        default="wall",
        description="Of seconds_of. cpu: seconds during which the process was computing, on a machine that has other "
        "work too.",
    )

    @model_validator(mode="after")
    def _steps_or_seconds(self) -> StudyBudget:
        if (self.seconds_of is None) != (self.measured_on is None):
            raise ValueError(
                "seconds_of needs measured_on, a recipe that trains alike: its seconds per step decide how many fit"
            )
        if self.seconds_of is None and "clock" in self.model_fields_set:
            raise ValueError("clock has no effect without seconds_of, whose seconds it counts; remove it")
        if self.steps is not None and self.seconds_of is not None:
            raise ValueError("expected steps or seconds_of, not both")
        return self


class StudyRecipe(Section):
    """One way to train."""

    config: str | None = Field(
        default=None, description="A run file; needed unless nothing is trained (`budget: {steps: 0}`)."
    )
    label: str | None = Field(default=None, description="What tables call it; the name by default.")
    command: Literal["train", "sft", "rlhf"] = Field(
        default="train",
        description="train: `coordexp train`. sft, rlhf: ms-swift's own command on ms-swift's own file.",
    )
    overrides: dict[str, Any] = Field(
        default={}, description="Dotted path or ms-swift argument -> value, over the run file."
    )
    model: ModelChoice | None = Field(default=None, description="In place of the study's.")
    start_from: StudyStart | None = Field(
        default=None, description="Go on from another recipe's checkpoint in place of the model."
    )
    budget: StudyBudget = Field(default=StudyBudget(), description="How long.")
    only: Annotated[list[str] | None, BeforeValidator(_listed)] = Field(
        default=None, description="Data sets that it is run on; all by default."
    )
    checkpoint: Checkpoint = Field(default=LAST, description="Which one is evaluated.")
    is_evaluated: bool = Field(
        default=True,
        description="false: only trained, for others to start from or to be measured on; it has no row.",
    )
    coord: Annotated[list[Readout] | None, BeforeValidator(_listed)] = Field(
        default=None,
        description="Only these of the study's ways to read coordinates (numbers in digits have the arg-max alone).",
    )
    score: Annotated[list[ScoreMethod] | None, BeforeValidator(_listed)] = Field(
        default=None, description="Only these of the study's scores."
    )
    cut_prompt: int | None = Field(
        default=None, gt=0, description="Evaluated with the first so many tokens of its prompt alone."
    )
    max_new_tokens: int | None = Field(
        default=None, gt=0, description="Of an answer, where its form needs more than the study says."
    )
    save_steps: int | None = Field(
        default=None,
        gt=0,
        description="Steps between checkpoints to resume from; a quarter of all by default.",
    )


class StudyReadout(Section):
    """One way to take boxes and scores from a model."""

    coord: Readout = Field(default="argmax", description="As in `coordexp infer --coord`.")
    score: ScoreMethod = Field(default="logprob", description="As in `coordexp score --method`.")


class StudyEvaluation(Section):
    """How cells are evaluated: every way to read coordinates with every kind of score."""

    coord: Annotated[list[Readout], BeforeValidator(_listed), Field(min_length=1)] = Field(
        default=["argmax"], description="Ways to read a coordinate from its distribution."
    )
    score: Annotated[list[ScoreMethod], BeforeValidator(_listed), Field(min_length=1)] = Field(
        default=["logprob"], description="Kinds of scores."
    )
    headline: StudyReadout | None = Field(
        default=None, description="The one that recipes are compared by; the first of each by default."
    )
    max_new_tokens: int | None = Field(
        default=None, gt=0, description="Of an answer; by default from the longest ground truth."
    )
    batch_size: int = Field(default=50, gt=0, description="Answers at a time.")
    limit: int | None = Field(default=None, gt=0, description="Only the first images.")

    @property
    def of_headline(self) -> StudyReadout:
        """What recipes are compared by."""
        return self.headline or StudyReadout(coord=self.coord[0], score=self.score[0])


class StudyBootstrap(Section):
    """Resamples of the images behind every interval."""

    resamples: int = Field(default=2000, ge=100, description="Of F1.")
    resamples_ap: int = Field(default=400, ge=100, description="Of average precision, which takes longer.")
    seed: int = Field(default=0, ge=0)


class StudyFile(Section):
    """A study: recipes x data sets x seeds, and how they are compared."""

    name: Name = Field(description="Of the folder below runs/study.")
    title: str | None = Field(default=None, description="Of the page.")
    summary: str = Field(default="", description="A sentence or two below the title.")
    output: str | None = Field(default=None, description="Where everything is written; runs/study/NAME.")
    results: Name | None = Field(
        default=None,
        description="Folder for the page and its numbers below `output`, for several studies of the same cells; "
        "`output` itself by default.",
    )
    seeds: list[Annotated[int, Field(ge=0)]] = Field(
        default=[1, 2, 3],
        min_length=1,
        description="Each sets initial weights, order of the samples and rollouts.",
    )
    data: dict[Name, StudyData] = Field(min_length=1)
    model: ModelChoice = Field(default=StudyModel())
    overrides: dict[str, Any] = Field(
        default={}, description="As those of a recipe, for all of `command: train`."
    )
    recipes: dict[Name, StudyRecipe] = Field(min_length=1)
    evaluate: StudyEvaluation = Field(default=StudyEvaluation())
    baseline: Annotated[list[str], BeforeValidator(_listed), Field(min_length=1)] = Field(
        description="The recipe, or the recipes, that the others are compared with."
    )
    headline: list[str] = Field(
        default=["f1_at_50", "f1_50_95", "AP"], min_length=1, description="Numbers of the first table."
    )
    bootstrap: StudyBootstrap = Field(default=StudyBootstrap())
