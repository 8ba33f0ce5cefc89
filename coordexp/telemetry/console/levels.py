"""Levels 1 to 3: the line of a step, the terms of its loss, and the state of the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.text import Text

from coordexp.control.lr_schedule import LR_PHASES
from coordexp.metrics import keys_control, keys_rollout, keys_run, keys_stage1, keys_stage2
from coordexp.telemetry.console.atoms import Atom, atoms_of
from coordexp.telemetry.console.view import ConsoleView
from coordexp.telemetry.console.words import (
    QUIET,
    Numbers,
    ShownNumber,
    Writer,
    below,
    four,
    large,
    line,
    percent,
    prompted,
    short,
)

ATOMS_OF_A_STEP = 2
SMALLEST_SHARE = 0.005
"""Of the time; less is not shown."""

_ROLLOUT = (
    ShownNumber(keys_rollout.F1, "F1 {}", short),
    ShownNumber(keys_rollout.MATCHED_MASKIOU_MEAN, "maskIoU {}", short),
    ShownNumber(keys_rollout.PARSE_TRUNCATED_RATE, "truncated {}", percent),
    ShownNumber(keys_rollout.DUPLICATE_RATE_MEAN, "duplicates {}", percent),
)
_LATENT = (
    ShownNumber(keys_stage1.LATENT_FIRST_TOKEN_ACC, "first token {}", percent),
    ShownNumber(keys_stage1.LATENT_NLL, "nll {}", short),
    ShownNumber(keys_stage1.LATENT_KEEP_PROB, "keep {}", percent),
)
_COUNTED = (
    ShownNumber(keys_run.TRAIN_TOKENS_SEEN, "{} tokens", large),
    ShownNumber(keys_stage1.TRAIN_SAMPLES_SEEN, "{} samples", large),
    ShownNumber(keys_run.TRAIN_IMAGES_SEEN, "{} pictures seen", large),
)
_PACKING = (
    ShownNumber(keys_run.PACKING_UTILIZATION, "{} filled", percent),
    ShownNumber(keys_stage1.PACK_NUM_SAMPLES, "{} samples a sequence", short),
)


def step_line(step: int, numbers: Numbers, view: ConsoleView, remaining: str | None = None) -> Text:
    """Level 1. remaining: time to the end of the run, in words."""
    write = Writer(step, numbers, view.is_healthy)
    parts = [
        *_channel(numbers),
        *_loss(numbers, view, write),
        *write.numbers_of(*_ROLLOUT),
        *write.numbers_of(*_LATENT),
        *_learning_rate(numbers, write),
        *write.numbers_of(ShownNumber(keys_run.GRAD_NORM, "grad norm {}", short)),
        *_pace(numbers, write),
        *([Text(f"{remaining} left", QUIET)] if remaining else []),
    ]
    return line(f"step {step}/{view.max_steps}", parts)


def atom_lines(step: int, numbers: Numbers, view: ConsoleView) -> list[Text]:
    """Level 2: every term of the loss; a line for each channel."""
    write = Writer(step, numbers, view.is_healthy)
    return [
        below(f"loss of channel {channel}" if channel else "loss", [_written(atom, write) for atom in atoms])
        for channel, atoms in atoms_of(numbers, view.coord_weights).items()
    ]


def run_lines(
    step: int, numbers: Numbers, view: ConsoleView, tags: Mapping[str, str] | None = None
) -> list[Text]:
    """Level 3: schedule, packing and memory, where the time goes, and what changes settings.

    tags: of the payload; they hold the labels of controllers.
    """
    write = Writer(step, numbers, view.is_healthy)
    found = {
        "schedule": [
            *write.numbers_of(ShownNumber(keys_run.EPOCH, "epoch {}", short)),
            *_phase(numbers),
            *write.numbers_of(
                ShownNumber(keys_stage2.B_RATIO_REALIZED, "{} of the steps channel B", percent), *_COUNTED
            ),
        ],
        "packing": [
            *(Text(word) for word in _packing_mode(numbers)),
            *write.numbers_of(*_PACKING),
        ],
        "memory": write.numbers_of(ShownNumber(keys_run.MEMORY_PEAK, "{} GB at most", short)),
        "time": _time(numbers, write),
        "in force": _in_force(numbers, write),
        "controllers": _controllers(numbers, tags or {}),
    }
    return [below(head, parts) for head, parts in found.items() if parts]


def _channel(numbers: Numbers) -> list[Text]:
    """Which channels the steps of the record ran, or how they were prompted."""
    if keys_stage1.LATENT_TEXT_STEPS in numbers:
        return [Text(f"prompt {prompted(numbers[keys_stage1.LATENT_TEXT_STEPS])}")]
    if keys_stage2.STAGE2_CHANNEL_B not in numbers:
        return []
    channels = list(atoms_of(numbers, None)) or ["B" if numbers[keys_stage2.STAGE2_CHANNEL_B] else "A"]
    return [Text(f"channel {'+'.join(channels)}")]


def _loss(numbers: Numbers, view: ConsoleView, write: Writer) -> list[Text]:
    loss = write.number(ShownNumber(keys_run.LOSS, "loss {}"))
    if loss is None:
        return []
    every = [atom for atoms in atoms_of(numbers, view.coord_weights).values() for atom in atoms]
    largest = sorted(every, key=lambda atom: -atom.value)[:ATOMS_OF_A_STEP]
    if not largest:
        return [loss]
    terms = Text(", ").join(
        Text.assemble(f"{atom.name} ", write.marked(atom.key, numbers[atom.key], four(atom.value)))
        for atom in largest
    )
    return [Text.assemble(loss, " (", terms, ")")]


def _learning_rate(numbers: Numbers, write: Writer) -> list[Text]:
    rate = write.number(ShownNumber(keys_run.LEARNING_RATE, "lr {}", short))
    return [] if rate is None else [Text(" ").join([rate, *_phase(numbers)])]


def _phase(numbers: Numbers) -> list[Text]:
    phase = numbers.get(keys_run.LR_PHASE)
    return [] if phase is None else [Text(LR_PHASES[int(phase)])]


def _pace(numbers: Numbers, write: Writer) -> Iterator[Text]:
    yield from write.numbers_of(ShownNumber(keys_run.TRAIN_TOKENS_PER_S, "{} tokens/s", large))
    samples = samples_per_s(numbers)
    if samples is not None:
        yield Text(f"{large(samples)} samples/s")
    yield from write.numbers_of(ShownNumber(keys_run.TIME_STEP, "{} s/step", short))


def samples_per_s(numbers: Numbers) -> float | None:
    """Original samples over the seconds of their steps, in which the tokens of the same steps were trained on."""
    tokens, per_s = numbers.get(keys_run.TRAIN_TOKENS_TOTAL), numbers.get(keys_run.TRAIN_TOKENS_PER_S)
    samples = numbers.get(keys_stage1.TRAIN_SAMPLES_TOTAL)
    if not tokens or not per_s or samples is None:
        return None
    return samples * per_s / tokens


def _written(atom: Atom, write: Writer) -> Text:
    gradient = "" if atom.gradient_share is None else f", {percent(atom.gradient_share)} of the gradient"
    return Text.assemble(
        f"{atom.name} ",
        write.marked(atom.key, write.numbers[atom.key], four(atom.value)),
        (f" ({percent(atom.share)}{gradient})", QUIET),
    )


def _packing_mode(numbers: Numbers) -> Sequence[str]:
    mode = numbers.get(keys_run.PACKING_MODE)
    return () if mode is None else (("padded", "packed")[int(mode)],)


def _in_force(numbers: Numbers, write: Writer) -> list[Text]:
    """Settings that change over the run."""
    return write.numbers_of(
        *(
            ShownNumber(key, f"{key.partition('/')[2]} {{}}")
            for key in keys_control.IN_FORCE.specs
            if key in numbers
        )
    )


def _controllers(numbers: Numbers, tags: Mapping[str, str]) -> list[Text]:
    """Name, value of its knob and labels of each."""
    value_of_any = keys_control.control_key(keys_control.ANY_NAME, "value")
    return [
        Text(" ".join([key.split("/")[1], four(value), *([tags[key]] if key in tags else [])]))
        for key, value in numbers.items()
        if keys_control.pattern_of(key) == value_of_any
    ]


def _time(numbers: Numbers, write: Writer) -> list[Text]:
    shares: Mapping[str, float] = {
        phase: numbers[key] for phase, key in keys_run.TIME_SHARES.items() if key in numbers
    }
    largest = sorted(shares, key=lambda phase: -shares[phase])
    return write.numbers_of(
        *(
            ShownNumber(keys_run.TIME_SHARES[phase], f"{phase} {{}}", percent)
            for phase in largest
            if shares[phase] >= SMALLEST_SHARE
        )
    )
