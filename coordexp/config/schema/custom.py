"""The `custom` section: data, target text, stage-1 objective and its monitors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from coordexp.config.schedules.points import (
    SIGMA,
    SIGMA_PER_SIDE,
    WARMUP,
    PositiveOrPoints,
    PositiveOrPointsOrNull,
    Warmup,
    check_warmup,
)
from coordexp.config.schema.answer_form import AnswerFormat, form_name
from coordexp.config.schema.augmentation import Augmentation
from coordexp.config.schema.fusion import Fusion, JsonlFiles
from coordexp.config.schema.latent_prefix import LatentPrefixSettings
from coordexp.config.schema.optimizer import OptimizerOptions
from coordexp.config.schema.prompt import DEFAULT_PROMPT, AnswerFormName, FieldOrder, MediaOrder, Ordering
from coordexp.config.schema.rollout_eval import GenerationSamples, RolloutEval
from coordexp.config.schema.section import Section

LATENT_VARIANT = "latent_prefix"
VARIANTS = ("stage1_coord", "stage2_two_channel", "stage2_rollout_aligned", LATENT_VARIANT)
STAGE1_VARIANTS = ("stage1_coord", LATENT_VARIANT)
"""Those that train on annotations, with the objective of stage 1, and evaluate as it does."""
DEFAULT_VARIANT = "stage1_coord"
RLHF = "rlhf"
"""In place of a variant: a run of `swift rlhf`, whose trainer follows from `rlhf_type`."""
VARIANT_ALIASES = {"stage1": "stage1_coord"}


def _spell_out(value: object) -> object:
    return VARIANT_ALIASES.get(value, value) if isinstance(value, str) else value


Variant = Annotated[
    Literal["stage1_coord", "stage2_two_channel", "stage2_rollout_aligned", "latent_prefix"],
    BeforeValidator(_spell_out),
]


class CoordSoftCeW1(Section):
    """Stage-1 coordinate loss: soft_ce_weight*soft_ce + w1_weight*w1 + ce_weight*ce + gate_weight*gate."""

    enabled: bool = Field(
        default=True,
        description="false: plain cross-entropy on every supervised token, the terms become diagnostics.",
    )
    soft_ce_weight: float = Field(
        default=1.0, ge=0, description="Weight of the cross-entropy against a Gaussian target."
    )
    w1_weight: float = Field(
        default=1.0, ge=0, description="Weight of the Wasserstein-1 distance (divided by 999)."
    )
    ce_weight: float = Field(
        default=0.0, ge=0, description="Weight of the hard cross-entropy over the coordinate bins."
    )
    gate_weight: float = Field(
        default=0.0, ge=0, description="Weight of the mass leak out of the coordinate vocabulary."
    )
    temperature: float = Field(default=1.0, gt=0, description="Divides the logits in every term but `ce`.")
    target_sigma: PositiveOrPoints = Field(default=2.0, description=SIGMA)
    target_sigma_per_side: PositiveOrPointsOrNull = Field(default=None, description=SIGMA_PER_SIDE)
    target_truncate: float | None = Field(
        default=None, ge=0, description="Target is 0 beyond this distance in bins; null: no cut."
    )
    monitor_mass: bool = Field(
        default=True, description="Log coord_diag/gate and coord_vocab_mass even when gate_weight is 0."
    )
    warmup: Warmup = Field(default={}, description=WARMUP)

    @model_validator(mode="after")
    def _warms_up_what_acts(self) -> CoordSoftCeW1:
        check_warmup(self.warmup, self.weights())
        if self.warmup and not self.enabled:
            raise ValueError("warmup cannot take effect with enabled: false, which has no weights")
        return self

    def weights(self) -> dict[str, float]:
        """The weights by name."""
        return {name: getattr(self, name) for name in type(self).model_fields if name.endswith("_weight")}


class CoordTokens(Section):
    """How coordinates are written in the target text."""

    enabled: bool = Field(
        default=True, description="Write coordinates as <|coord_k|> tokens; false: as numbers."
    )
    skip_bbox_norm: bool = Field(
        default=True, description="Records already hold bins 0..999, so nothing is normalised again."
    )


class CoordOffset(Section):
    """Adapter that trains the coordinate-token rows as offsets, instead of the whole embedding and head."""

    enabled: bool = Field(default=False, description="Use the adapter.")
    tie_head: bool = Field(default=True, description="One offset table for the embedding and the head.")
    embed_lr: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Learning rate of the embedding offsets (with tie_head of the one table); null: "
        "the run's.",
    )
    head_lr: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Learning rate of the head offsets, with tie_head: false; null: the run's.",
    )
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="Weight decay of the offsets.")

    @model_validator(mode="after")
    def _one_table_has_one_rate(self) -> CoordOffset:
        if self.tie_head and self.head_lr not in (None, self.embed_lr):
            raise ValueError(
                "head_lr cannot take effect with tie_head: true (one table, trained with embed_lr); set tie_head: "
                "false, or leave head_lr out"
            )
        return self


class TokenTypeMetrics(Section):
    """Accuracy split by token type, and the coord_monitor/* numbers."""

    enabled: bool = Field(default=False, description="Log them.")
    include: list[str] = Field(
        default=["lvis"],
        description="Datasets whose samples count in the numbers split by type: names or shell patterns, in upper or "
        "lower case; `['*']` is every dataset. A sample's dataset is `metadata.dataset` of its record; without it, the "
        "name of the folder that holds the JSONL file (`lvis` for data/lvis/train.jsonl). Where no sample counts, the "
        "run says so at its start.",
    )
    exclude: list[str] = Field(
        default=[],
        description="Datasets whose samples do not count, named like those of `include`; wins over it.",
    )
    log_top5: bool = Field(default=True, description="Log the top-5 accuracies too.")
    coord_monitor_mass: bool = Field(
        default=True, description="Log the coordinate-vocabulary mass by token type."
    )
    coord_monitor_mass_max_tokens: int = Field(
        default=0,
        ge=0,
        description="Rows the mass is computed on at most, per micro-batch, spread evenly over it; 0: all.",
    )


class Custom(Section):
    """Data, target text and objective of a run."""

    trainer_variant: Variant | None = Field(
        default=None,
        description="Which trainer runs; `stage1` is an alias of stage1_coord. `coordexp train` takes "
        "stage1_coord when it is left out.",
    )
    train_jsonl: JsonlFiles | None = Field(
        default=None,
        description="Training records: a JSONL file, a pattern such as `shards/*.jsonl`, or a list of them, read as "
        "one data set. In ms-swift's flat form write `dataset: [FILE]` instead.",
    )
    val_jsonl: JsonlFiles | None = Field(
        default=None,
        description="Validation records, written in the same way. In ms-swift's flat form write `val_dataset: [FILE]` "
        "instead.",
    )
    fusion: Fusion | None = Field(default=None, description="Several data sets, each with its share.")
    prompt: str = Field(
        default=DEFAULT_PROMPT,
        min_length=1,
        description="User message that asks for the objects. `{classes}` in it stands for the names of a record's "
        "`classes`, with a comma and a blank between them; then every record needs them.",
    )
    teacher_prompt: str | None = Field(
        default=None,
        min_length=1,
        description="User message for the teacher of `swift rlhf` in place of `prompt`, in which `{answer}` stands for "
        "the true answer: with `rlhf_type: gkd` and no teacher_model the model learns from what it says itself when it "
        "is shown the objects.",
    )
    prompt_variants: dict[str, Annotated[str, Field(min_length=1)]] = Field(
        default={},
        description="Further user messages by name, for rollout_matching.eval_prompt_variant.",
    )
    media_order: MediaOrder = Field(
        default="media_first", description="Images stand before the text of the user message, or after it."
    )
    min_pixels: int | None = Field(
        default=None,
        gt=0,
        description="Pictures with fewer pixels are enlarged; null: what the model's processor says. (The other end is "
        "ms-swift's max_pixels.)",
    )
    object_field_order: FieldOrder = Field(
        default="desc_first", description="Order of the two keys of an object in the target text."
    )
    object_ordering: Ordering = Field(
        default="sorted",
        description="Order of the objects: by (min y, min x), or shuffled by the run's seed.",
    )
    answer_format: AnswerFormat = Field(
        default="coordjson",
        description='How answers are written. `coordjson`: {"objects": [{"desc", "bbox_2d"}, ...]}, with coordinate '
        'tokens or (coord_tokens.enabled: false) with the numbers of the bins. `qwen`: Qwen3-VL\'s own [{"bbox_2d", '
        '"label"}, ...] with numbers from 0 to 1000; needs coord_tokens.enabled: false. `compact`: a line for a '
        "description, with four coordinate tokens for each of its boxes.",
    )
    coord_tokens: CoordTokens = CoordTokens()
    coord_soft_ce_w1: CoordSoftCeW1 = CoordSoftCeW1()
    coord_offset: CoordOffset = CoordOffset()
    token_type_metrics: TokenTypeMetrics = TokenTypeMetrics()
    augmentation: Augmentation = Augmentation()
    optimizer: OptimizerOptions = OptimizerOptions()
    rollout_eval: RolloutEval = RolloutEval()
    generation_samples: GenerationSamples = GenerationSamples()
    latent_prefix: LatentPrefixSettings | None = Field(
        default=None, description="Needed by trainer variant latent_prefix."
    )
    head: Literal["auto", "plain", "fused"] = Field(
        default="auto",
        description="How the objective meets the output head; the numbers are the same. `plain`: logits of the "
        "supervised rows in one piece. `fused`: loss and gradients inside the head's call, chunk by chunk. `auto`: "
        "fused where the logits would take more than 256 MiB.",
    )
    deterministic: Literal["auto"] | bool = Field(
        default="auto",
        description="Two runs of one configuration, and one that is resumed, are equal to the bit. `auto`: on where "
        "every dropout is zero (and no NEFTune noise is asked for). `true`: an operation without a deterministic form "
        "is an error; under `auto` accelerators warn of it. Costs speed on accelerators. "
        "`derived.deterministic` of resolved_config.json says what was settled.",
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Run Python code that comes with the model (`auto_map` in its configuration). false: such a model "
        "is refused. true: a warning names the code.",
    )
    dry_run: Literal["step"] | None = Field(
        default=None,
        description="step: run one optimizer step of each kind that the run will ever run, on its longest samples, and "
        "an evaluation of 2 images; print what they took, keep nothing. `coordexp train --dry-run=step` writes it.",
    )
    evaluate_only: int | None = Field(
        default=None,
        ge=0,
        description="Train nothing: evaluate the model once as it would be after so many optimizer steps (which decide "
        "the seeds of sampled answers), write the record, end. `coordexp verify-best` writes it.",
    )
    on_nonfinite_loss: Literal["stop", "skip_step"] = Field(
        default="stop",
        description="A loss that is NaN or infinite stops the run on all ranks, or (not under DeepSpeed) the update of "
        "that step is left out on all ranks and counted in health/nonfinite_loss_total.",
    )

    @property
    def answer_form(self) -> AnswerFormName:
        """The form that `answer_format` and `coord_tokens` mean together."""
        return form_name(self.answer_format, self.coord_tokens.enabled)


class Debug(Section):
    """Checks and limits for a quick look; part of the run context, not of its identity."""

    enabled: bool = Field(default=False, description="Turn the runtime checks on.")
    train_sample_limit: int | None = Field(
        default=None, gt=0, description="Train on the first N records only."
    )
    val_sample_limit: int | None = Field(
        default=None, gt=0, description="Evaluate on the first N records only."
    )
    step_dumps: int = Field(
        default=0,
        ge=0,
        description="Write what the first N steps train on to step_dumps/ in the run folder, for `coordexp audit`.",
    )


class Experiment(Section):
    """Notes for people; written to resolved_config.json and no part of the run's identity."""

    title: str | None = Field(default=None, description="What this run is called.")
    purpose: str | None = Field(default=None, description="Why it is run.")
    hypothesis: str | None = Field(default=None, description="What is expected of it.")
    notes: str | None = Field(default=None, description="Anything else.")
    tags: list[str] = Field(default=[], description="Words to find it by.")
