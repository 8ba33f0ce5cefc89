"""Seconds of an optimizer step, part by part, in the order in which our trainers run them.

    stage 1      load -> forward and backward of each micro-batch -> gradients meet -> update
    rollouts     load -> push weights -> generate -> parse, match, encode -> as above

A step is planned as a whole before its first forward, so rollouts and training take turns, also with servers: what
these save is memory and the engine's waking, and they can be more GPUs. Where devices run beside their host, data
loaders hide behind the step, and gradients meet behind the last backward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from scale.memory import ZERO_1, ZERO_2, ZERO_3, trained_parameters
from scale.rates import Rates
from scale.shapes import BF16, ModelShape, Pass
from scale.work import Training, backward_work, decode_work, forward_work, prefill_work, update_bytes

GPUS_OF_A_NODE = 8
LOADERS = 4
"""Processes that read and encode samples for a rank."""


@dataclass(frozen=True)
class Rollouts:
    """The answers of one rank in a step.

    questions: with several answers to one each counts.  prompt: tokens, the picture's among them.  new_tokens: of an
    answer.  at_once: answers written together (hf: `decode_batch_size`; vLLM: requests running).
    waits: a batch ends with its longest answer (hf); else the next question takes a free place (vLLM).
    longest: over the mean, for a batch that waits.
    servers: GPUs that do nothing but answer, for all ranks; 0: an engine in each rank, or the model itself.
    pushes: weights are copied into an engine.  wakes: an engine that slept takes its weights from host memory first.
    """

    questions: int
    prompt: int
    new_tokens: float
    at_once: int
    patches: int = 0
    waits: bool = True
    longest: float = 1.0
    servers: int = 0
    pushes: bool = False
    wakes: bool = False


@dataclass(frozen=True)
class Run:
    """One rank's step. passes: its forwards.  graphs: forwards of one pass (self-context).

    samples: raw ones of the rank, sample_tokens: tokens of each.
    """

    shape: ModelShape
    passes: Sequence[Pass]
    how: Training
    gpus: int = 1
    zero: int = 0
    graphs: int = 1
    rollouts: Rollouts | None = None
    samples: int = 0
    sample_tokens: float = 0.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of the parts of a step, as far as they are not hidden behind others."""

    load: float = 0.0
    push: float = 0.0
    generate: float = 0.0
    judge: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
    meet: float = 0.0
    update: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Name -> seconds, in order."""
        return {one.name: float(getattr(self, one.name)) for one in fields(self)}

    def mixed(self, other: StepTime, share: float) -> StepTime:
        """Mean step where `share` of the steps are `other` (`b_ratio`)."""
        theirs = other.parts()
        return StepTime(
            **{name: (1 - share) * own + share * theirs[name] for name, own in self.parts().items()}
        )


def step_time(run: Run, rates: Rates) -> StepTime:
    """Of a mean step."""
    forward = run.graphs * sum(forward_work(run.shape, one, run.how).seconds(rates) for one in run.passes)
    backwards = [run.graphs * backward_work(run.shape, one, run.how).seconds(rates) for one in run.passes]
    backward = sum(backwards)
    meet = meeting_seconds(run, rates)
    if rates.device_beside_host:
        meet = max(0.0, meet - (backwards[-1] if run.zero < ZERO_2 else forward + backward) / 2)
    trained = trained_parameters(run.shape, run.how)
    update = (
        update_bytes(trained / (run.gpus if run.zero >= ZERO_1 else 1), width=run.how.width) / rates.update
    )
    if run.zero in (ZERO_1, ZERO_2) and run.gpus > 1:
        update += _gathered(run, trained) / link(run.gpus, rates)
    push, generate, judge = rollout_seconds(run, rates)
    load = run.samples * (rates.sample_s + run.sample_tokens * rates.token_s)
    if rates.device_beside_host:
        load = max(0.0, load / LOADERS - (push + generate + judge + forward + backward + meet + update))
    return StepTime(load, push, generate, judge, forward, backward, meet, update + rates.step_s)


def link(gpus: int, rates: Rates) -> float:
    """Bytes a second between ranks: of the slowest link among them."""
    return rates.reduce if gpus <= GPUS_OF_A_NODE else rates.reduce_nodes


def _gathered(run: Run, numbers: float) -> float:
    """Bytes that a rank receives when all gather `numbers` numbers, or sum them up and keep their parts."""
    return numbers * run.how.width * (run.gpus - 1) / run.gpus


def meeting_seconds(run: Run, rates: Rates) -> float:
    """Of gradients that meet (DDP, ZeRO-1: once; ZeRO-2: after each pass), and weights that are gathered for ZeRO-3."""
    if run.gpus == 1:
        return 0.0
    trained = _gathered(run, trained_parameters(run.shape, run.how))
    if run.zero < ZERO_2:
        moved = 2 * trained if run.zero < ZERO_1 else trained
    else:
        moved = trained * len(run.passes)
    if run.zero >= ZERO_3:
        moved += 2 * _gathered(run, run.shape.parameters) * len(run.passes) * run.graphs
    return moved / link(run.gpus, rates)


def rollout_seconds(run: Run, rates: Rates) -> tuple[float, float, float]:
    """Pushing, generating, and judging."""
    told = run.rollouts
    if told is None or not told.questions:
        return 0.0, 0.0, 0.0
    engine_bytes = BF16 * run.shape.parameters
    push = engine_bytes / rates.push if told.pushes else 0.0
    if told.wakes:
        push += engine_bytes / rates.wake
    number = told.questions * run.gpus / told.servers if told.servers else told.questions
    return (
        push,
        generation_seconds(run, rates, number),
        told.questions * told.new_tokens * rates.judge_token_s,
    )


def generation_seconds(run: Run, rates: Rates, questions: float) -> float:
    """Of `questions` answers on one GPU, each question encoded first where the host is not beside the device."""
    told = run.rollouts
    assert told is not None
    rounds = math.ceil(questions / told.at_once) if told.waits else max(1.0, questions / told.at_once)
    each = questions / rounds
    steps = told.new_tokens * (told.longest if told.waits else 1.0)
    prompts = Pass.padded((told.prompt,) * max(1, round(each)), 0, patches=told.patches)
    launch_s = rates.decode_launch_s
    prefill = prefill_work(run.shape, prompts, run.how).seconds(rates, launch_s=launch_s)
    token = decode_work(run.shape, each, told.prompt + steps / 2, width=run.how.width)
    tokens = steps * (token.seconds(rates, launch_s=launch_s) + rates.decode_s)
    encode = 0.0 if rates.device_beside_host else questions * (rates.sample_s + told.prompt * rates.token_s)
    return rounds * (prefill + tokens) + encode
