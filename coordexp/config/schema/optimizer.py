"""`custom.optimizer`: what optimizer: coord_adamw and coord_muon train how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from coordexp.config.schema.section import Section

COORD_ADAMW, COORD_MUON = "coord_adamw", "coord_muon"
Pattern = Annotated[str, Field(min_length=1)]

HIDDEN_MATRICES = (
    "*language_model.layers.*.self_attn.?_proj.weight",
    "*language_model.layers.*.mlp.*_proj.weight",
)


class MuonOptions(Section):
    """With optimizer: coord_muon: the matrices that Muon (torch.optim.Muon) trains; AdamW trains the rest."""

    matrices: list[Pattern] = Field(
        default=list(HIDDEN_MATRICES),
        min_length=1,
        description="Shell patterns of the names of two-dimensional matrices (`*` crosses dots); each must match "
        "something that is trained. The default is attention and MLP of the language model. The vision tower has "
        "`*visual.blocks.*.attn.proj.weight` and `*visual.blocks.*.mlp.linear_fc?.weight`; under LoRA the trained "
        "matrices are `*.lora_A.*` and `*.lora_B.*`. Embeddings, head and shared matrices are refused.",
    )
    split: dict[Pattern, Annotated[int, Field(gt=1)]] = Field(
        default={},
        description="Pattern -> how many matrices of equal size lie one above the other in it, each made orthogonal "
        "by itself: `{'*visual.blocks.*.attn.qkv.weight': 3}`. A fused projection is refused without it.",
    )
    lr_scale: float = Field(
        default=1.0,
        gt=0,
        description="Muon's learning rate is this times learning_rate (or vit_lr, aligner_lr).",
    )
    weight_decay_mult: float = Field(
        default=1.0, ge=0, description="Muon's weight decay is this times weight_decay."
    )
    momentum: float = Field(default=0.95, ge=0, lt=1, description="Of Muon.")
    nesterov: bool = Field(default=True, description="Nesterov momentum.")
    ns_steps: int = Field(
        default=5, gt=0, lt=100, description="Newton-Schulz iterations of the orthogonalization."
    )
    adjust_lr_fn: Literal["match_rms_adamw", "original"] = Field(
        default="match_rms_adamw",
        description="How the step depends on the shape. `match_rms_adamw`: 0.2 sqrt(max(rows, columns)), the size of a "
        "step of AdamW, so that its learning rates can be used. `original`: sqrt(max(1, rows / columns)).",
    )


class AdamWGroup(Section):
    """Parameters that AdamW trains with a rate or decay of their own, also where Muon would take them."""

    patterns: list[Pattern] = Field(
        min_length=1,
        description="Shell patterns of parameter names; each must match something that is trained.",
    )
    lr_scale: float = Field(default=1.0, gt=0, description="Times the learning rate.")
    weight_decay_mult: float = Field(default=1.0, ge=0, description="Times weight_decay.")


class OptimizerOptions(Section):
    """Parameter groups of optimizer: coord_adamw and coord_muon; the first pattern that matches takes a parameter.

    AdamW's betas and eps are ms-swift's adam_beta1, adam_beta2 and adam_epsilon. Only parameters of two and more
    dimensions decay. vit_lr and aligner_lr hold for both optimizers.
    """

    groups: list[AdamWGroup] = Field(
        default=[],
        description="Looked at in this order, before muon.matrices; everything else has the run's rate.",
    )
    muon: MuonOptions = MuonOptions()
