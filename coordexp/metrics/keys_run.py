"""Metric keys of the run itself: health, pace, probes, and what ms-swift and the HF Trainer log on their own."""

from __future__ import annotations

from coordexp.metrics import keys_stage1, keys_stage2
from coordexp.metrics.spec import Better, KeySection, Kind, Reduce

HEALTH = KeySection("Health (`health/*`)", "Events that should not happen; absent while they do not.")
NONFINITE_METRICS_TOTAL = HEALTH.define(
    "health/nonfinite_metrics_total",
    Kind.COUNTER,
    "Values left out of the payload because they were NaN or infinite; the console names the keys.",
    unit="values",
    when="steps where it happens",
    better="lower",
)
NONFINITE_LOSS_TOTAL = HEALTH.define(
    "health/nonfinite_loss_total",
    Kind.COUNTER,
    "Optimizer steps skipped because the loss was not finite.",
    unit="steps",
    when="steps where it happens, with skipping switched on",
    better="lower",
)
SAMPLES_REPLACED_TOTAL = HEALTH.define(
    "health/samples_replaced_total",
    Kind.COUNTER,
    "Samples trained in place of others that could not be encoded.",
    unit="samples",
    when="steps where it happens, in stage 1 with `strict: false`",
)
TOKEN_TYPES_SKIPPED_TOTAL = HEALTH.define(
    "health/token_types_skipped_total",
    Kind.COUNTER,
    "Batches without token-type metrics because types and labels did not align.",
    unit="batches",
    when="steps where it happens",
    better="lower",
)
OOM_RETRIES_TOTAL = HEALTH.define(
    "health/oom_retries_total",
    Kind.COUNTER,
    "Times that memory ran out and half the work was tried: a chunk of the head, a batch of decoding or evaluation.",
    unit="retries",
    when="steps where it happens",
    better="lower",
)

LOGGED = "records of training steps"
PACE = KeySection(
    "Progress, time and memory of a run (`train/*`, `time/*`, `memory/*`, `lr/*`)",
    "Counts are of all ranks; `*_seen` is kept across a resume. Seconds are taken at the borders of a step's parts: on "
    "CUDA by events on the training stream, read when a record is written (so work that is still queued counts where "
    "it runs, and nothing waits for it), elsewhere by the host's clock. A step lasts from asking for its data to the "
    "end of the optimizer's update; evaluations, saves and the writing of records lie between steps.",
)
TRAIN_TOKENS_TOTAL = PACE.define(
    "train/tokens_total",
    Kind.COUNTER,
    "Tokens with a loss (what masks leave: text with a weight, and coordinates) that were trained on.",
    unit="tokens",
)
TRAIN_TOKENS_SEEN = PACE.define(
    "train/tokens_seen",
    Kind.GAUGE,
    "Running total of `train/tokens_total` over all ranks, kept across a resume.",
    unit="tokens",
    reduce=Reduce.MAX,
)
TRAIN_TOKENS_PER_S = PACE.define(
    "train/tokens_per_s",
    Kind.GAUGE,
    "`train/tokens_total` over the seconds of its steps (`time/step_s` times steps).",
    unit="tokens/s",
    when=LOGGED,
    better="higher",
)
TRAIN_IMAGES_TOTAL = PACE.define(
    "train/images_total", Kind.COUNTER, "Pictures that were trained on.", unit="pictures"
)
TRAIN_IMAGES_SEEN = PACE.define(
    "train/images_seen",
    Kind.GAUGE,
    "Running total of `train/images_total` over all ranks, kept across a resume.",
    unit="pictures",
    reduce=Reduce.MAX,
)
PACKING_MODE = PACE.define(
    "packing/mode",
    Kind.FLAG,
    "1 where samples share a sequence, 0 where a batch is padded; in words under `tags` of the payload (`packed`, "
    "`padded`).",
)
PACKING_UTILIZATION = PACE.define(
    "packing/utilization",
    Kind.RATE,
    "Tokens of samples over the tokens there is room for: `packing_length` of each pack, or the padded batch.",
    unit="fraction",
    over="tokens of room",
    better="higher",
)
TIME_STEP = PACE.define(
    "time/step_s",
    Kind.GAUGE,
    "Seconds of an optimizer step, mean over steps and ranks.",
    unit="s",
    over="optimizer steps",
    better="lower",
)
TIME_FIRST_STEP = PACE.define(
    "time/first_step_s",
    Kind.SECONDS,
    "Seconds by which the first step of this process took longer than the median of the next ten: what is set up, "
    "compiled or cached only once.",
    unit="s",
    when="once, in the first record after eleven steps",
)
PHASES = ("data", "generation", "forward", "backward", "optimizer", "push", "other")
"""The parts of a step."""
_PHASE_MEANINGS = {
    "data": "waiting for the data loader",
    "generation": "generating rollouts; starting the engine for the first of them too",
    "forward": "forwards and losses (with a fused head also the head's gradients)",
    "backward": "the backward pass with its exchange of gradients; under DeepSpeed the update too",
    "optimizer": "clipping, the update and the schedule, and what the HF Trainer checks of the loss before them",
    "push": "pushing weights to the rollout engine",
    "other": "all else: planning the step, parsing and matching rollouts, callbacks",
}
TIME_SHARES = {
    phase: PACE.define(
        f"time/share_{phase}",
        Kind.RATE,
        f"Share of the step spent on {_PHASE_MEANINGS[phase]}. The shares sum to 1.",
        unit="fraction",
        over="seconds of all steps and ranks",
        pattern="time/share_<part>",
    )
    for phase in PHASES
}
"""Part of a step -> key of its share."""
MEMORY_PEAK = PACE.define(
    "memory/peak_gb",
    Kind.GAUGE,
    "Most memory that the rank with the most has used so far: what the accelerator's allocator gave out at once, on a "
    "CPU the largest resident set of the process.",
    unit="GB (1e9 bytes)",
    when=LOGGED,
    reduce=Reduce.MAX,
    better="lower",
)
LR_PHASE = PACE.define(
    "lr/phase",
    Kind.GAUGE,
    "Where the learning rate of the record stands in its schedule: 0 warm-up, 1 stable, 2 decay; in words under "
    "`tags` of the payload.",
    when=LOGGED,
)

FRAMEWORK = KeySection(
    "Logged by ms-swift and the HF Trainer",
    "Reduced by them, not by CoordExp; listed so that every key of a log can be looked up.",
)


def _external(
    key: str,
    kind: Kind,
    meaning: str,
    unit: str = "1",
    *,
    source: str,
    when: str = "every step",
    better: Better | None = None,
) -> str:
    in_loss = key in ("loss", "eval_loss", "train_loss")
    reduce = Reduce.MEAN if kind is Kind.RATE else None
    return FRAMEWORK.define(
        key, kind, meaning, unit=unit, when=when, in_loss=in_loss, reduce=reduce, source=source, better=better
    )


HF, SWIFT = "transformers", "ms-swift"
AT_EVAL, AT_END = "evaluation", "end of training"

LOSS = _external(
    "loss", Kind.LOSS, "Mean objective of the optimizer steps since the last log.", "nats", source=HF
)
EVAL_LOSS = _external(
    "eval_loss",
    Kind.LOSS,
    "Mean objective over the evaluation set. Absent in rollout evaluation, which runs no teacher-forced "
    "forward.",
    "nats",
    source=HF,
    when=AT_EVAL,
)
GRAD_NORM = _external(
    "grad_norm", Kind.GAUGE, "Gradient norm before clipping, of the last optimizer step.", source=HF
)
LEARNING_RATE = _external(
    "learning_rate",
    Kind.GAUGE,
    "Learning rate of the first parameter group once the step is over: that of the next one.",
    source=HF,
)
EPOCH = _external("epoch", Kind.GAUGE, "Passes over the training set so far.", "epochs", source=HF)
NUM_INPUT_TOKENS_SEEN = _external(
    "num_input_tokens_seen", Kind.COUNTER, "Input tokens so far.", "tokens", source=HF, when="when asked for"
)
PROGRESS = _external(
    "global_step/max_steps", Kind.GAUGE, "Progress, as text such as `20/400`.", "text", source=SWIFT
)
_external("elapsed_time", Kind.GAUGE, "Time since training started, as text.", "text", source=SWIFT)
REMAINING = _external(
    "remaining_time", Kind.GAUGE, "Estimated time to the end, as text.", "text", source=SWIFT
)
MEMORY = _external(
    "memory(GiB)",
    Kind.GAUGE,
    "Largest reserved accelerator memory.",
    "GiB",
    source=SWIFT,
    better="lower",
    when="on an accelerator",
)
TRAIN_SPEED = _external(
    "train_speed(s/it)", Kind.SECONDS, "Mean time of an optimizer step.", "s/step", source=SWIFT
)
_external(
    "aux_loss", Kind.LOSS, "Router loss of mixture-of-experts models.", source=SWIFT, when="such models"
)
MFU = _external(
    "MFU",
    Kind.GAUGE,
    "Model FLOPs utilisation.",
    "fraction",
    source=SWIFT,
    when="with the perf_log callback",
    better="higher",
)


def _times(split: str, when: str) -> str:
    runtime = _external(f"{split}_runtime", Kind.SECONDS, f"Time of {when}.", "s", source=HF, when=when)
    for what in ("samples", "steps"):
        key, unit = f"{split}_{what}_per_second", f"{what}/s"
        _external(key, Kind.RATE, "Throughput.", unit, source=HF, when=when, better="higher")
    return runtime


EVAL_RUNTIME, TRAIN_RUNTIME = _times("eval", AT_EVAL), _times("train", AT_END)
_external(
    "train_tokens_per_second",
    Kind.RATE,
    "Throughput.",
    "tokens/s",
    source=HF,
    when="when asked for",
    better="higher",
)
_external(
    "eval_model_preparation_time",
    Kind.SECONDS,
    "Placing the model before evaluation.",
    "s",
    source=HF,
    when=AT_EVAL,
)
TRAIN_LOSS = _external(
    "train_loss", Kind.LOSS, "Mean objective over the whole run.", "nats", source=HF, when=AT_END
)
_external("total_flos", Kind.COUNTER, "Floating-point operations of the run.", "FLOP", source=HF, when=AT_END)

TRAJECTORY_ON = "every `telemetry.trajectory_probe.every_steps` optimizer steps"
TRAJECTORY = KeySection(
    "Trajectory of hidden states (`trajectory/*`)",
    "On a few fixed samples: how the row at the head's input moves from token to token. `free`: along the model's own "
    "greedy answer; `nudged`: along the ground truth, each token predicted from the true ones before it. Velocity "
    "v_t = h_{t+1} - h_t; metric g = 1 / (variance + eps), with the variance of each coordinate over all rows of both "
    "phases.",
)
ANSWER_PHASES = ("free", "nudged")
"""Of the trajectory probe."""
_TRAJECTORY_MEANINGS = {
    "lior": ("LIoR_t = R_t * speed_t", "1"),
    "R": ("R_t = |v_{t+1} - v_t| / (|v_t| + eps), how much the motion turns", "1"),
    "speed": ("speed_t = v_t' diag(g) v_t / H, the squared step length of a coordinate", "1"),
    "nll": ("-log p of a token", "nats"),
}
TRAJECTORY_NUMBERS = tuple(_TRAJECTORY_MEANINGS)
for _phase in ANSWER_PHASES:
    for _name, (_what, _unit) in _TRAJECTORY_MEANINGS.items():
        TRAJECTORY.define(
            f"trajectory/{_phase}/{_name}_mean",
            Kind.GAUGE,
            f"Mean over the tokens of the {_phase} answers of {_what}.",
            unit=_unit,
            when=TRAJECTORY_ON,
            over="windows",
            pattern=f"trajectory/<phase>/{_name}_mean",
        )
for _name, (_what, _unit) in _TRAJECTORY_MEANINGS.items():
    TRAJECTORY.define(
        f"trajectory/gap/{_name}_mean",
        Kind.GAUGE,
        f"`trajectory/free/{_name}_mean` minus `trajectory/nudged/{_name}_mean`: the exposure gap.",
        unit=_unit,
        when=TRAJECTORY_ON,
        over="windows",
        pattern="trajectory/gap/<number>_mean",
    )
TRAJECTORY_MS = TRAJECTORY.define(
    "trajectory/window_ms",
    Kind.SECONDS,
    "Wall time of one measurement, generation included.",
    unit="ms",
    when=TRAJECTORY_ON,
)


def trajectory_key(phase: str, name: str) -> str:
    """`trajectory/<phase>/<name>_mean`; KeyError for a pair that is not defined."""
    return TRAJECTORY.specs[f"trajectory/{phase}/{name}_mean"].key


def trajectory_gap(name: str) -> str:
    """`trajectory/gap/<name>_mean`; KeyError for a number that is not defined."""
    return TRAJECTORY.specs[f"trajectory/gap/{name}_mean"].key


GRADIENT_TOTAL, GRADIENT_COORD_CE = "total", "coord_ce"
"""Instead of a term: the loss itself; cross-entropy of coordinate tokens over the whole vocabulary (ablation)."""
GRADIENT_ATOMS: dict[str, tuple[str, ...]] = {
    "stage 1": (
        keys_stage1.BASE_CE_LOSS,
        keys_stage1.COORD_DIAG_SOFT_CE,
        keys_stage1.COORD_DIAG_W1,
        keys_stage1.COORD_DIAG_CE,
        keys_stage1.COORD_DIAG_GATE,
        GRADIENT_COORD_CE,
    ),
    **{
        f"channel {channel}": tuple(
            key for key in keys_stage2.LOSS.specs if key.startswith(f"loss/{channel}")
        )
        for channel in "AB"
    },
}
"""Kind of step -> the terms that its loss can have, by the key of the metric behind each."""
GRADIENT = KeySection(
    "Gradient probe (`gradient/*`)",
    "Gradients of the terms of the loss, after all weights and the denominators of the step, at the hidden states that "
    "the head turns into logits: all supervised rows of all forwards of the step, over all ranks. A term without a "
    "gradient has no cosine. Over a logging window: the mean of its probed steps.",
)


def _define_gradients() -> None:
    probed = "every `telemetry.gradient_probe.every_steps` optimizer steps"
    norm = "Length of the gradient of a term; `total` is that of the loss."
    GRADIENT.define(
        f"gradient/norm/{GRADIENT_TOTAL}",
        Kind.GAUGE,
        norm,
        when=probed,
        over="probed steps",
        pattern="gradient/norm/<term>",
    )
    for kind, atoms in GRADIENT_ATOMS.items():
        for place, atom in enumerate(atoms):
            meanings = {
                f"gradient/norm/{atom}": (norm, "gradient/norm/<term>"),
                f"gradient/cos_total/{atom}": (
                    "Cosine of the gradient of a term with that of the loss: negative where the step undoes it.",
                    "gradient/cos_total/<term>",
                ),
            }
            for earlier in atoms[:place]:
                meanings[f"gradient/cos/{earlier}/{atom}"] = (
                    "Cosine of the gradients of two terms: 1 where they pull the same way, 0 where they have nothing "
                    "to do with each other (as on different rows), negative where they work against each other.",
                    "gradient/cos/<term>/<term>",
                )
            for key, (meaning, pattern) in meanings.items():
                GRADIENT.define(
                    key, Kind.GAUGE, meaning, when=f"{probed}, {kind}", over="probed steps", pattern=pattern
                )


_define_gradients()
GRADIENT_PAIRS: tuple[str, ...] = tuple(key for key in GRADIENT.specs if key.startswith("gradient/cos/"))
"""Keys of the cosines of two terms."""


def gradient_norm(atom: str) -> str:
    """Key for the norm of the gradient of one term of the loss. atom: key of the term, or GRADIENT_TOTAL."""
    return f"gradient/norm/{atom}"


def gradient_cos_total(atom: str) -> str:
    """Key for the cosine of the gradients of a term and the loss."""
    return f"gradient/cos_total/{atom}"


def gradient_cos(earlier: str, later: str) -> str:
    """Key for the cosine of the gradients of two terms, in the order of GRADIENT_ATOMS."""
    return f"gradient/cos/{earlier}/{later}"


SECTIONS = (PACE, HEALTH, TRAJECTORY, GRADIENT, FRAMEWORK)
