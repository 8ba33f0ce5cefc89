"""Metric keys of the stage-1 objective: base cross-entropy, coordinate terms, packed-run helpers."""

from __future__ import annotations

from coordexp.config.schema.latent_prefix import LATENT_MODULES
from coordexp.metrics.spec import Better, KeySection, Kind, Reduce

COORD_STEPS = "steps with at least one supervised coordinate token"
TEXT_STEPS = "steps with at least one supervised non-coordinate token"
PACKED = "packed runs only"
IF_ENABLED = "In the loss only with `custom.coord_soft_ce_w1.enabled: true`, a diagnostic otherwise."

BASE_CE = KeySection(
    "Base cross-entropy (`base_ce/*`)",
    "The language-model term of stage 1: full-vocabulary cross-entropy on supervised targets that are not "
    "coordinate tokens.",
)

BASE_CE_LOSS = BASE_CE.define(
    "base_ce/loss",
    Kind.LOSS,
    "Cross-entropy over the full vocabulary on non-coordinate targets.",
    unit="nats",
    when=TEXT_STEPS,
    in_loss=True,
    over="supervised non-coordinate tokens",
)
BASE_CE_NONCOORD_TOKENS = BASE_CE.define(
    "base_ce/noncoord_tokens",
    Kind.GAUGE,
    "Supervised non-coordinate tokens of a micro-batch: the denominator of `base_ce/loss`.",
    unit="tokens",
)
BASE_CE_NONCOORD_TOKENS_PER_SAMPLE = BASE_CE.define(
    "base_ce/noncoord_tokens_per_sample",
    Kind.GAUGE,
    "`base_ce/noncoord_tokens / pack/num_samples`.",
    unit="tokens/sample",
    when=PACKED,
    over="original samples",
)
BASE_CE_LOSS_PER_SAMPLE = BASE_CE.define(
    "base_ce/loss_per_sample",
    Kind.GAUGE,
    "Approximate base cross-entropy of one original sample: `base_ce/loss * base_ce/noncoord_tokens / "
    "pack/num_samples`.",
    unit="nats/sample",
    when=PACKED,
    over="original samples",
    better="lower",
)

COORD_DIAG = KeySection(
    "Coordinate loss and monitors (`coord_diag/*`)",
    "At rows whose target is a coordinate token: z are the logits, C the 1000 coordinate ids in bin order, "
    "T the "
    "temperature, g the true bin, p = softmax(z[C]/T). `coord_diag/loss = soft_ce_weight*soft_ce + "
    "w1_weight*w1 + "
    "ce_weight*ce + gate_weight*gate`; the four terms are logged unweighted.",
)


def _coord(
    key: str,
    kind: Kind,
    meaning: str,
    unit: str = "1",
    *,
    when: str = COORD_STEPS,
    in_loss: bool = False,
    better: Better | None = None,
) -> str:
    return COORD_DIAG.define(
        f"coord_diag/{key}",
        kind,
        meaning,
        unit=unit,
        when=when,
        in_loss=in_loss,
        over="coordinate tokens",
        better=better,
    )


COORD_DIAG_ENABLED = COORD_DIAG.define(
    "coord_diag/enabled",
    Kind.FLAG,
    "1 when the coordinate loss is trained on, 0 in the pure cross-entropy ablation.",
    when=COORD_STEPS,
)
COORD_DIAG_LOSS = _coord(
    "loss",
    Kind.LOSS,
    "The coordinate loss after its weights. " + IF_ENABLED,
    "nats",
    in_loss=True,
)
COORD_DIAG_SOFT_CE = _coord(
    "soft_ce",
    Kind.LOSS,
    "Unweighted -sum q log p against a Gaussian soft target q centred at the true bin. " + IF_ENABLED,
    "nats",
    in_loss=True,
)
COORD_DIAG_W1 = _coord(
    "w1",
    Kind.LOSS,
    "Unweighted 1-D Wasserstein-1 distance: sum_k |CDF_p(k) - CDF_q(k)| / 999. " + IF_ENABLED,
    "fraction of the axis",
    in_loss=True,
)
COORD_DIAG_CE = _coord(
    "ce",
    Kind.LOSS,
    "Unweighted cross-entropy over the coordinate vocabulary at temperature 1. "
    + IF_ENABLED
    + " Needs `ce_weight != 0`.",
    "nats",
    in_loss=True,
)
COORD_DIAG_GATE = _coord(
    "gate",
    Kind.LOSS,
    "Unweighted mass leak: -log of the probability inside the coordinate vocabulary, logsumexp(z/T) - "
    "logsumexp(z[C]/T). " + IF_ENABLED + " Needs `gate_weight != 0`.",
    "nats",
    when=COORD_STEPS + ", with gate_weight > 0 or monitor_mass on",
    in_loss=True,
)
COORD_DIAG_COORD_VOCAB_MASS = _coord(
    "coord_vocab_mass",
    Kind.GAUGE,
    "Mean probability inside the coordinate vocabulary, exp(-gate).",
    "probability",
    when=COORD_STEPS + ", with gate_weight > 0 or monitor_mass on",
    better="higher",
)
COORD_DIAG_COORD_TOKENS = COORD_DIAG.define(
    "coord_diag/coord_tokens",
    Kind.GAUGE,
    "Supervised coordinate tokens of a micro-batch: the denominator of `coord_diag/loss`.",
    unit="tokens",
    when=COORD_STEPS,
)
COORD_DIAG_ACC_TOP5 = _coord(
    "acc_top5",
    Kind.GAUGE,
    "Share of rows whose true bin is among the 5 largest logits of the coordinate vocabulary.",
    "fraction",
    better="higher",
)
COORD_DIAG_P_GT_MEAN = _coord(
    "p_gt_mean", Kind.GAUGE, "Mean probability p[g] of the true bin.", "probability", better="higher"
)
COORD_DIAG_MARGIN_MEAN = _coord(
    "margin_mean",
    Kind.GAUGE,
    "Mean of max(z[C])/T - z[g]/T; lower is better, 0 when the true bin wins.",
    "logits",
    better="lower",
)
COORD_DIAG_EXPECTED_BIN_MAE = _coord(
    "expected_bin_mae",
    Kind.GAUGE,
    "Mean |E_p[k] - g|. More telling than top-k early in training.",
    "bins",
    better="lower",
)
COORD_DIAG_EXPECTED_BIN_ABS_ERR_P90 = COORD_DIAG.define(
    "coord_diag/expected_bin_abs_err_p90",
    Kind.PERCENTILE,
    "90th percentile (linear interpolation) of |E_p[k] - g| in a micro-batch: shows heavy tails that the "
    "mean hides.",
    unit="bins",
    when=COORD_STEPS,
    better="lower",
)
COORD_DIAG_W1_TO_DELTA = _coord(
    "w1_to_delta",
    Kind.GAUGE,
    "Wasserstein-1 distance from p to the true bin, E_p|k - g|: tells a flat distribution from one near "
    "the truth.",
    "bins",
    better="lower",
)
COORD_DIAG_COORD_TOKENS_PER_SAMPLE = COORD_DIAG.define(
    "coord_diag/coord_tokens_per_sample",
    Kind.GAUGE,
    "`coord_diag/coord_tokens / pack/num_samples`.",
    unit="tokens/sample",
    when=PACKED,
    over="original samples",
)
COORD_DIAG_LOSS_PER_SAMPLE = COORD_DIAG.define(
    "coord_diag/loss_per_sample",
    Kind.GAUGE,
    "Approximate coordinate loss of one original sample: `coord_diag/loss * coord_diag/coord_tokens / "
    "pack/num_samples`.",
    unit="nats/sample",
    when=PACKED,
    over="original samples",
    better="lower",
)

COORD_ALIAS = KeySection(
    "Earlier names (`coord_softce_w1/*`)",
    "The same five numbers as under `coord_diag/`, for readers of older logs.",
)
COORD_SOFTCE_W1_ALIASES: dict[str, str] = {
    source: COORD_ALIAS.define(
        source.replace("coord_diag/", "coord_softce_w1/"),
        Kind.LOSS,
        f"Alias of `{source}`.",
        unit=COORD_DIAG.specs[source].unit,
        when=COORD_DIAG.specs[source].when,
        in_loss=True,
        over="coordinate tokens",
    )
    for source in (COORD_DIAG_LOSS, COORD_DIAG_SOFT_CE, COORD_DIAG_W1, COORD_DIAG_CE, COORD_DIAG_GATE)
}
"""`coord_diag/x` -> `coord_softce_w1/x`."""

STEP_HELPERS = KeySection("Packing, samples and accumulation")
STAGE1_TOTAL_LOSS_PER_SAMPLE_EST = STEP_HELPERS.define(
    "stage1/total_loss_per_sample_est",
    Kind.GAUGE,
    "`base_ce/loss_per_sample + coord_diag/loss_per_sample`: approximate objective of one original sample.",
    unit="nats/sample",
    when=PACKED,
    over="original samples",
    better="lower",
)
PACK_NUM_SAMPLES = STEP_HELPERS.define(
    "pack/num_samples",
    Kind.GAUGE,
    "Original samples in a micro-batch; without packing, the batch size.",
    unit="samples",
)
TRAIN_SAMPLES_TOTAL = STEP_HELPERS.define(
    "train/samples_total",
    Kind.COUNTER,
    "Original (unpacked) samples that were trained on. Channel A: dataset samples; channel B: rollout "
    "samples.",
    unit="samples",
)
TRAIN_SAMPLES_SEEN = STEP_HELPERS.define(
    "train/samples_seen",
    Kind.GAUGE,
    "Running total of `train/samples_total` over all ranks, kept across a resume: a progress axis that packing does "
    "not bend.",
    unit="samples",
    reduce=Reduce.MAX,
)
TRAIN_MICRO_STEPS = STEP_HELPERS.define(
    "train/micro_steps",
    Kind.GAUGE,
    "Micro-steps of an optimizer step, about `gradient_accumulation_steps`.",
    unit="micro-steps",
    over="optimizer steps",
)
ACCUM_GRAD_STEPS = STEP_HELPERS.define(
    "accum/grad_steps", Kind.GAUGE, "Configured `gradient_accumulation_steps`.", unit="micro-steps"
)
ACCUM_CURRENT_GRAD_STEPS = STEP_HELPERS.define(
    "accum/current_grad_steps",
    Kind.GAUGE,
    "Micro-steps of this update; smaller on the last, partial update of an epoch.",
    unit="micro-steps",
)

LATENT = KeySection(
    "Latent prefix (`latent/*`)",
    "The model reads the vectors of the prefix in place of the prompt's text. Tokens are those of the answer. In "
    "evaluation the prefix is that of the step, with the latent dropout that `custom.latent_prefix.keep` says.",
)
_LATENT = "trainer variant latent_prefix"
_LATENT_STEPS = f"{_LATENT}: steps of kind L, and evaluation"
LATENT_FIRST_TOKEN_ACC = LATENT.define(
    "latent/first_token_acc",
    Kind.RATE,
    "First tokens of answers that the model puts first; first: of those that its form leaves open.",
    unit="fraction",
    when=_LATENT_STEPS,
    over="answers",
    better="higher",
)
LATENT_FIRST_TOKEN_ACC_TOP5 = LATENT.define(
    "latent/first_token_acc_top5",
    Kind.RATE,
    "First tokens of answers among the five that the model puts first.",
    unit="fraction",
    when=_LATENT_STEPS,
    over="answers",
    better="higher",
)
LATENT_MAJORITY_FIRST_TOKEN = LATENT.define(
    "latent/majority_first_token",
    Kind.GAUGE,
    "`latent/first_token_acc` of a model that always writes the most frequent first token of the evaluation set.",
    unit="fraction",
    when=f"{_LATENT}: evaluation",
    over="evaluations",
)
LATENT_NLL = LATENT.define(
    "latent/nll_per_token",
    Kind.LOSS,
    "Cross-entropy of the answer's tokens over the whole vocabulary, read after the latent vectors.",
    unit="nats",
    when=_LATENT_STEPS,
    over="tokens of answers",
)
LATENT_TEXT_NLL = LATENT.define(
    "latent/text_nll_per_token",
    Kind.LOSS,
    "The same, read after the text of the prompt.",
    unit="nats",
    when=f"{_LATENT}: steps of kind T that read the text, and evaluation",
    over="tokens of answers",
)
LATENT_TEXT_FIRST_TOKEN_ACC = LATENT.define(
    "latent/text_first_token_acc",
    Kind.RATE,
    "`latent/first_token_acc` of the model reading the text of the prompt.",
    unit="fraction",
    when=f"{_LATENT}: evaluation",
    over="answers",
    better="higher",
)
_ONCE = f"{_LATENT}: the first evaluation of a run; measured before its first step"
_OTHER_PROMPTS = {
    "none": "read without a list: with nothing in the place of `{classes}`, without any text where the prompt has none",
    "cut": "read after the first M tokens of the prompt's text, as `coordexp infer --cut-prompt M` asks",
}
LATENT_OTHER_NLL: dict[str, str] = {
    name: LATENT.define(
        f"latent/{name}_nll_per_token",
        Kind.LOSS,
        f"`latent/text_nll_per_token` {said}.",
        unit="nats",
        when=_ONCE,
        over="tokens of answers",
    )
    for name, said in _OTHER_PROMPTS.items()
}
LATENT_OTHER_FIRST_TOKEN_ACC: dict[str, str] = {
    name: LATENT.define(
        f"latent/{name}_first_token_acc",
        Kind.RATE,
        f"`latent/first_token_acc` {said}.",
        unit="fraction",
        when=_ONCE,
        over="answers",
        better="higher",
    )
    for name, said in _OTHER_PROMPTS.items()
}
"""By the name of the baseline: `none`, `cut`."""
LATENT_PREFIX_RMS = LATENT.define(
    "latent/prefix_rms",
    Kind.GAUGE,
    "Root mean square of the prefix's vectors, before latent dropout.",
    when=_LATENT,
    over="prompts",
)
LATENT_DEEP_RMS = LATENT.define(
    "latent/deep_rms",
    Kind.GAUGE,
    "Root mean square of the values of the deep prefix; 0 is none at all.",
    when=f"{_LATENT} with custom.latent_prefix.deep",
    over="micro-steps",
)
LATENT_TEXT_RMS = LATENT.define(
    "latent/text_rms",
    Kind.GAUGE,
    "Root mean square of the embeddings of the prompt's text, which the prefix is calibrated to.",
    when=_LATENT,
    over="prompts",
)
LATENT_KEEP_PROB = LATENT.define(
    "latent/keep_prob",
    Kind.GAUGE,
    "Probability that latent dropout keeps a vector.",
    unit="fraction",
    when=_LATENT,
    over="micro-steps",
)
LATENT_TEXT_STEPS = LATENT.define(
    "latent/text_steps",
    Kind.GAUGE,
    "Share of text-prompted steps; the record's tag under this key says T, L, or TL where the window had both.",
    unit="fraction",
    when=f"{_LATENT}: training records",
    over="optimizer steps",
)
_LATENT_TERMS = {
    "latent_first_token_ce": (
        "latent/first_token_ce",
        "nats",
        "answers",
        "Cross-entropy of the first open token",
    ),
    "latent_k_ce": ("latent/k_ce", "nats", "tokens", "Cross-entropy of the first K open tokens"),
    "latent_kd": (
        "latent/kd",
        "nats",
        "tokens",
        "T^2 times the KL divergence from the model reading the text",
    ),
    "latent_state_kd": (
        "latent/state_kd",
        "1",
        "tokens and layers",
        "Squared distance of hidden states to those of the model reading the text, relative to their squared length",
    ),
    "latent_align": (
        "latent/align",
        "1",
        "prompts",
        "Squared distance of the vectors to the means of the text's embeddings, relative to their squared length",
    ),
}
LATENT_RAW: dict[str, str] = {
    module: LATENT.define(
        key,
        Kind.LOSS,
        f"{what}, without weight.",
        unit=unit,
        when=f"{_LATENT}: where {module} acts",
        over=over,
    )
    for module, (key, unit, over, what) in _LATENT_TERMS.items()
}
"""Module of the objective -> key of its term without weight."""
LATENT_GRAD_NORM: dict[str, str] = {
    module: LATENT.define(
        f"latent/grad_norm/{module}",
        Kind.GAUGE,
        "Length of the gradient of a module's part of the loss at the vectors of the prefix.",
        when=f"{_LATENT}: every `telemetry.gradient_probe.every_steps` steps, where the module acts",
        over="micro-batches of probed steps",
        pattern="latent/grad_norm/<module>",
    )
    for module in LATENT_MODULES
}
LATENT_WEIGHT: dict[str, str] = {
    module: LATENT.define(
        f"latent/weight/{module}",
        Kind.GAUGE,
        "Weight of a module in the steps of the window in which it acts.",
        when=f"{_LATENT}: modules whose weight has points",
        over="optimizer steps",
        pattern="latent/weight/<module>",
    )
    for module in LATENT_MODULES
}
LATENT_LOSS = KeySection(
    "Objective of a latent prefix (`loss/latent/*`)",
    "What each module of `custom.latent_prefix.objective` adds to the loss of a step, after its weight; the parts of a "
    "step sum to its loss.",
)
LATENT_SHARE: dict[str, str] = {
    module: LATENT_LOSS.define(
        f"loss/latent/{module}",
        Kind.LOSS,
        f"Weighted mean of `{module}`.",
        when=f"{_LATENT}: where the module acts",
        in_loss=True,
        over="optimizer steps in which it acts",
        pattern="loss/latent/<module>",
    )
    for module in LATENT_MODULES
}
LATENT_EVALUATION: tuple[str, ...] = (
    LATENT_FIRST_TOKEN_ACC,
    LATENT_FIRST_TOKEN_ACC_TOP5,
    LATENT_NLL,
    LATENT_TEXT_NLL,
    LATENT_TEXT_FIRST_TOKEN_ACC,
    *LATENT_RAW.values(),
)
"""What evaluation reports (without `eval_`), where the module behind it acts."""
LATENT_BASELINES: tuple[str, ...] = (
    LATENT_MAJORITY_FIRST_TOKEN,
    *LATENT_OTHER_NLL.values(),
    *LATENT_OTHER_FIRST_TOKEN_ACC.values(),
)
"""What evaluation reports beside it: of no training, so that no checkpoint is the best by it."""

SECTIONS = (BASE_CE, COORD_DIAG, COORD_ALIAS, STEP_HELPERS, LATENT, LATENT_LOSS)
