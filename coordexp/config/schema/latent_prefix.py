"""The `custom.latent_prefix` section: a prompt's text as a few learned vectors, and what teaches them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PlainValidator, model_validator

from coordexp.config.schedules.points import Bounds, ShareOrPoints
from coordexp.config.schema.section import Section

FIRST_TOKEN_CAP = 10.0
"""Runs of this method with a first-token weight of 12 collapsed onto one token; 9 was stable."""

_WEIGHT = Bounds("a number from 0", lambda number: number >= 0)
_ABOVE_0 = Bounds("a number above 0, at most 1", lambda number: 0 < number <= 1)
WeightOrPoints = Annotated[float | list[tuple[int, float]], PlainValidator(_WEIGHT.number_or_points)]
KeepOrPoints = Annotated[float | list[tuple[int, float]], PlainValidator(_ABOVE_0.number_or_points)]

Text: Literal["T"] = "T"
Latent: Literal["L"] = "L"
"""Kinds of steps: the prompt is its text, or its latent vectors."""


def largest(number: float | list[tuple[int, float]]) -> float:
    """The largest value of a number or points."""
    return float(number) if isinstance(number, (int, float)) else max(value for _, value in number)


class LatentEncoder(Section):
    """Sizes of the encoder that reads the prompt's text, and of the adapter behind it."""

    width: int = Field(default=256, gt=0, description="Width of the cross-attention.")
    heads: int = Field(default=4, gt=0, description="Its heads; the width is a multiple of twice as many.")
    layers: int = Field(default=2, gt=0, description="Its layers.")
    mlp_width: int = Field(default=512, gt=0, description="Inner width of the adapter's perceptron.")

    @model_validator(mode="after")
    def _heads_fit(self) -> LatentEncoder:
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} is no multiple of {2 * self.heads} (twice the heads)")
        return self


class LatentDeep(Section):
    """Key/value vectors of every layer of the language model, beside the latent vectors; they add nothing at first."""

    num: int = Field(ge=1, le=256, description="D; vectors that each layer reads, the same for every prompt.")
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Of these; null: the prefix's. Values have some way to go from 0 to the size of the model's own.",
    )


class LatentKeep(Section):
    """Latent dropout: each vector is kept with this probability, otherwise it is zero."""

    prob: KeepOrPoints = Field(
        default=1.0,
        description="Probability that a vector is kept, or points [[step, probability], ...]; the last one may be "
        "below 1.",
    )
    evaluate: Literal["same", "full"] = Field(
        default="same",
        description="`same`: evaluation, checkpoints and exported vectors drop with the probability in force, each "
        "prompt always the same vectors. `full`: evaluation keeps all, and says loudly that training does not.",
    )

    @model_validator(mode="after")
    def _full_differs(self) -> LatentKeep:
        values = [self.prob] if isinstance(self.prob, float) else [value for _, value in self.prob]
        if self.evaluate == "full" and min(values) == 1:
            raise ValueError("evaluate: full cannot take effect where prob is 1 throughout; leave it out")
        return self


class _LatentModule(Section):
    enabled: bool = Field(default=True, description="Whether the module runs.")
    weight: WeightOrPoints = Field(
        description="Factor on the mean of the term; a number, or points [[step, weight], ...] (evaluation takes the "
        "last)."
    )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of steps in which it acts."""
        return (Latent,)

    @property
    def is_on(self) -> bool:
        """Whether it ever adds something."""
        return self.enabled and largest(self.weight) > 0


class Stage1Config(Section):
    """`stage1` has its settings in custom.coord_soft_ce_w1."""


class LatentStage1(_LatentModule):
    """The objective of stage 1 on the whole answer: cross-entropy on text, the coordinate terms on coordinates."""

    name: Literal["stage1"]
    steps: list[Literal["T", "L"]] = Field(default=[Latent], min_length=1, description="Kinds of steps.")
    config: Stage1Config = Stage1Config()

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.steps)


class FirstTokenConfig(Section):
    """`latent_first_token_ce` takes no settings beside its weight."""


class LatentFirstTokenCe(_LatentModule):
    """Cross-entropy of the first token of the answer that the answer's form leaves open."""

    name: Literal["latent_first_token_ce"]
    config: FirstTokenConfig = FirstTokenConfig()

    @model_validator(mode="after")
    def _is_capped(self) -> LatentFirstTokenCe:
        peak = largest(self.weight)
        if peak > FIRST_TOKEN_CAP:
            raise ValueError(
                f"latent_first_token_ce: its weight reaches {peak:g}; at most {FIRST_TOKEN_CAP:g}, above which runs of "
                "this method collapsed onto one token"
            )
        return self


NumTokens = Annotated[int, Field(gt=0)]


class KCeConfig(Section):
    """Settings of `latent_k_ce`."""

    num_tokens: NumTokens = Field(
        description="K: tokens from the first open one on; an answer of fewer gives all it has."
    )


class LatentKCe(_LatentModule):
    """Cross-entropy of the first K tokens of the answer."""

    name: Literal["latent_k_ce"]
    config: KCeConfig


class KdConfig(Section):
    """Settings of `latent_kd`."""

    temperature: float = Field(default=1.0, gt=0, description="Of both distributions; the term is times T^2.")
    num_tokens: NumTokens | None = Field(
        default=None, description="The first K tokens of the answer, as in latent_k_ce; null: all of it."
    )
    top_k: NumTokens | None = Field(
        default=64,
        description="Tokens of the teacher's distribution that are kept one by one; the mass of all others is one "
        "more outcome of both. null: the whole vocabulary.",
    )
    chunk_rows: NumTokens = Field(
        default=128, description="Rows of the teacher's logits that exist at a time."
    )


class LatentKd(_LatentModule):
    """KL divergence to the same model reading the text, without its LoRA weights where it has some."""

    name: Literal["latent_kd"]
    config: KdConfig = KdConfig()


class StateKdConfig(Section):
    """Settings of `latent_state_kd`."""

    layers: list[Annotated[int, Field(ge=0)]] = Field(
        min_length=1, description="Layers of the language model whose outputs are matched, from 0."
    )
    num_tokens: NumTokens | None = Field(default=None, description="As in latent_kd.")

    @model_validator(mode="after")
    def _once(self) -> StateKdConfig:
        if len(set(self.layers)) < len(self.layers):
            raise ValueError("layers names a layer twice")
        return self


class LatentStateKd(_LatentModule):
    """Squared distance of hidden states to those of the teacher, relative to their squared length."""

    name: Literal["latent_state_kd"]
    config: StateKdConfig


class AlignConfig(Section):
    """`latent_align` takes no settings beside its weight."""


class LatentAlign(_LatentModule):
    """Squared distance of the vectors to the means of the text's embeddings over M parts, relative to their scale."""

    name: Literal["latent_align"]
    steps: list[Literal["T", "L"]] = Field(
        default=[Text, Latent], min_length=1, description="Kinds of steps."
    )
    config: AlignConfig = AlignConfig()

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.steps)


LatentObjectiveModule = Annotated[
    LatentStage1 | LatentFirstTokenCe | LatentKCe | LatentKd | LatentStateKd | LatentAlign,
    Field(discriminator="name"),
]
LATENT_MODULES: dict[str, type[_LatentModule]] = {
    "stage1": LatentStage1,
    "latent_first_token_ce": LatentFirstTokenCe,
    "latent_k_ce": LatentKCe,
    "latent_kd": LatentKd,
    "latent_state_kd": LatentStateKd,
    "latent_align": LatentAlign,
}


class LatentPrefixSettings(Section):
    """Trainer variant `latent_prefix`: the prompt's text becomes M vectors, read in the place of `<|latent_k|>`."""

    num_latents: int = Field(
        ge=1, le=256, description="M; the model's tokenizer holds as many latent tokens."
    )
    source: Literal["encoder", "static"] = Field(
        default="encoder",
        description="`encoder`: made from the text's embeddings, for any prompt. `static`: free vectors for the run's "
        "one prompt, started from its text.",
    )
    encoder: LatentEncoder = LatentEncoder()
    deep: LatentDeep | None = Field(
        default=None,
        description="Key/value vectors for every layer beside the M vectors (`deep: {num: 8}`), under attn_impl: sdpa "
        "and for --backend hf alone; a stage may add them to the prefix of an earlier one. null: none.",
    )
    start_from: str | None = Field(
        default=None,
        min_length=1,
        description="Folder with a trained prefix to go on from, the checkpoint of an earlier stage. null: the model's "
        "own folder where it holds one, else a new prefix.",
    )
    language_model: Literal["frozen", "tuned"] = Field(
        default="frozen",
        description="`frozen`: only the prefix is trained. `tuned`: the prefix and what the tuner section says (LoRA, "
        "or the weights that are not frozen).",
    )
    learning_rate: float | None = Field(
        default=None, gt=0, le=1, description="Of the prefix; null: the run's."
    )
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="Of the prefix.")
    text_share: ShareOrPoints = Field(
        default=0.0,
        description="Share of text-prompted steps (tag T; the others are L): a number, or points [[step, share], ...], "
        "[[0, 1.0], [200, 0.0]] for a warm-up. The number of the step alone decides.",
    )
    keep: LatentKeep = LatentKeep()
    objective: list[LatentObjectiveModule] = Field(
        min_length=1, description="Modules whose weighted means add up to the loss."
    )

    @model_validator(mode="after")
    def _everything_acts(self) -> LatentPrefixSettings:
        names = [entry.name for entry in self.objective]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"objective lists module {repeated[0]} twice; one entry a module")
        if self.source == "static" and self.encoder.model_fields_set:
            raise ValueError("encoder has no effect with source: static; remove it")
        shares = [self.text_share] if isinstance(self.text_share, float) else [s for _, s in self.text_share]
        if min(shares) == 1:
            raise ValueError("text_share is 1 throughout, so that no step is prompted by latents")
        on = [entry for entry in self.objective if entry.is_on]
        if not any(Latent in entry.kinds for entry in on):
            raise ValueError("no module of the objective acts in steps of kind L")
        teaches_text = [entry.name for entry in on if Text in entry.kinds]
        if max(shares) == 0:
            only_text = [entry.name for entry in on if entry.kinds == (Text,)]
            if only_text:
                raise ValueError(f"{only_text[0]} acts in steps of kind T, which text_share 0 never runs")
        elif not teaches_text:
            raise ValueError("no module of the objective acts in steps of kind T, which text_share asks for")
        if self.language_model == "frozen" and "stage1" in teaches_text:
            raise ValueError(
                "stage1 cannot act in steps of kind T with language_model: frozen: such a step reads the text, and "
                "nothing that is trained takes part in it; write steps: [L]"
            )
        return self
