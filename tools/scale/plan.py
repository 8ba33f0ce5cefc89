"""A training to be predicted, as a person tells it, and what follows for one of its GPUs."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from coordexp.errors import ConfigError
from coordexp.packing.choice import plan_packs
from scale.memory import DDP, ZERO_2, StepMemory, state_bytes, step_memory, trained_parameters
from scale.rates import Rates
from scale.shapes import BF16, MODELS, ModelShape, Pass, causal_pairs
from scale.step import Rollouts, Run, StepTime, step_time
from scale.work import Training

Engine = Literal["colocate", "servers", "hf"]
DRAWN = 512
"""Samples whose packing is simulated."""
ANSWERS_AT_ONCE = 64


@dataclass(frozen=True)
class Plan:
    """Defaults: configs/stage1/base.yaml on COCO train2017.

    gpus: all of them, servers included.  pack: tokens; 0 pads instead, `batch` samples a forward.
    packs_a_step, samples_a_step: of all GPUs, without and with rollouts.  objects: of a picture, in the mean.
    rollout_length: tokens of an answer; 0: as long as the mean annotation.  answers: to each question.
    b_ratio: share of steps with rollouts; the others teach on annotations.  forwards: of those others (self-context).
    servers: of the GPUs those that only answer.
    """

    model: str = "4B"
    gpus: int = 8
    zero: int = ZERO_2
    stage: Literal["stage1", "rollouts"] = "stage1"
    engine: Engine = "colocate"
    servers: int = 0
    rollout_length: int = 0
    answers: int = 1
    b_ratio: float = 1.0
    forwards: int = 1
    pack: int = 8192
    batch: int = 4
    packs_a_step: int = 32
    samples_a_step: int = 64
    objects: float = 7.3
    tokens_of_object: int = 25
    prompt: int = 25
    width: int = 640
    height: int = 480
    max_pixels: int = 786_432
    checkpointing: bool = True
    vision_trained: bool = False
    lora_rank: int = 0
    head: Literal["fused", "plain"] = "fused"

    def __post_init__(self) -> None:
        if self.model.upper() not in MODELS:
            raise ConfigError(f"model {self.model!r}: expected one of {', '.join(MODELS)}.")
        if self.engine == "servers" and not 0 < self.servers < self.gpus:
            raise ConfigError(
                f"servers is {self.servers} of {self.gpus} GPUs: expected at least one, and one left to train."
            )
        if self.engine != "servers" and self.servers:
            raise ConfigError("servers: only with engine servers.")
        if self.gpus < 1 or self.objects <= 0 or not 0 <= self.b_ratio <= 1:
            raise ConfigError("gpus: at least 1; objects: above 0; b_ratio: 0 to 1.")

    @property
    def shape(self) -> ModelShape:
        return MODELS[self.model.upper()]

    @property
    def training_gpus(self) -> int:
        return self.gpus - self.servers

    @property
    def how(self) -> Training:
        return Training(BF16, self.checkpointing, self.vision_trained, self.lora_rank)

    @property
    def visual(self) -> int:
        """Tokens of a picture."""
        return self.shape.visual_tokens(self.width, self.height, self.max_pixels)

    @property
    def answer(self) -> int:
        """Tokens of the mean annotation: 7 for an empty one."""
        return 7 + round(self.objects * self.tokens_of_object)

    @property
    def written(self) -> int:
        """Tokens of an answer of the model."""
        return self.rollout_length or self.answer

    @property
    def images_a_step(self) -> float:
        """Pictures of a step of all GPUs."""
        return (
            self.samples_a_step
            if self.stage == "rollouts"
            else self.packs_a_step * self.packs(self.answer).samples
        )

    def packs(self, answer: int) -> Packs:
        """Of samples whose answers have `answer` tokens in the mean."""
        if not self.pack:
            mean = self.visual + self.prompt + answer
            longest = _padded(self.visual + self.prompt, answer, self.batch)
            return Packs(float(self.batch), longest * self.batch, mean / longest)
        return simulated(self.visual + self.prompt, answer, self.pack)


@dataclass(frozen=True)
class Packs:
    """A mean pack: samples in it, its tokens, and how full it is."""

    samples: float
    tokens: float
    fill: float


def lengths(question: int, answer: int, number: int) -> list[int]:
    """Tokens of `number` samples; answers beyond an empty one are drawn from an exponential distribution.

    As with objects of pictures, many are short and few are long.
    """
    draw = random.Random(0)
    return [question + 7 + round(draw.expovariate(1 / max(1, answer - 7))) for _ in range(number)]


@cache
def simulated(question: int, answer: int, pack: int) -> Packs:
    """Packs that the trainers' own packer makes of drawn samples; longer ones are cut to a pack."""
    drawn = [min(length, pack) for length in lengths(question, answer, DRAWN)]
    packs = plan_packs(drawn, pack)
    return Packs(len(drawn) / len(packs), sum(drawn) / len(packs), sum(drawn) / len(packs) / pack)


@cache
def _padded(question: int, answer: int, batch: int) -> float:
    """Mean longest sample of a batch."""
    drawn = lengths(question, answer, DRAWN // batch * batch)
    starts = range(0, len(drawn), batch)
    return sum(max(drawn[start : start + batch]) for start in starts) / len(starts)


def mean_pass(plan: Plan, answer: int) -> Pass:
    """A forward over a mean pack (flash attention), or over a mean batch."""
    made = plan.packs(answer)
    question = plan.visual + plan.prompt
    patches = plan.visual * plan.shape.merge**2
    number = made.samples
    padded = made.tokens / number if not plan.pack else question + answer
    pairs = number * causal_pairs(round(padded))
    return Pass(
        tokens=round(made.tokens), pairs=pairs, rows=round(number * answer),
        coord_rows=round(number * (answer - 7) / plan.tokens_of_object * 4), patches=round(number * patches),
        patch_pairs=number * patches**2, images=round(number), samples=round(number),
    )  # fmt: skip


def run_of(plan: Plan, *, with_rollouts: bool) -> Run:
    """One rank's step. Its packs need not be a whole number: the last of them is as full as the others in the mean."""
    answer = plan.answer
    if (
        with_rollouts
    ):  # the model's own objects and what they missed: between the annotation and both together
        answer = max(plan.answer, plan.written)
    made = plan.packs(answer)
    one, ranks = mean_pass(plan, answer), plan.training_gpus
    if plan.stage == "stage1":
        number, samples = plan.packs_a_step / ranks, plan.packs_a_step / ranks * made.samples
    else:
        samples = plan.samples_a_step / ranks * (plan.answers if with_rollouts else 1)
        number = samples / made.samples
    whole = int(number) + (1 if number % 1 > 1e-9 else 0)
    passes = tuple(_part(one, min(1.0, number - index)) for index in range(whole))
    return Run(
        plan.shape, passes, plan.how, gpus=ranks, zero=plan.zero if ranks > 1 else DDP,
        graphs=1 if with_rollouts or plan.stage == "stage1" else plan.forwards,
        rollouts=_rollouts(plan) if with_rollouts else None, samples=round(samples),
        sample_tokens=plan.visual + plan.prompt + answer,
    )  # fmt: skip


def _part(one: Pass, share: float) -> Pass:
    return Pass(
        tokens=round(one.tokens * share), pairs=one.pairs * share, rows=round(one.rows * share),
        coord_rows=round(one.coord_rows * share), patches=round(one.patches * share),
        patch_pairs=one.patch_pairs * share, images=round(one.images * share),
        samples=max(1, round(one.samples * share)),
    )  # fmt: skip


def _rollouts(plan: Plan) -> Rollouts:
    has_engine = plan.engine != "hf"
    return Rollouts(
        questions=max(1, round(plan.samples_a_step / plan.training_gpus * plan.answers)),
        prompt=plan.visual + plan.prompt,
        new_tokens=plan.written,
        at_once=ANSWERS_AT_ONCE,
        patches=plan.visual * plan.shape.merge**2,
        waits=not has_engine,
        longest=1.0 if has_engine else 2.0,
        servers=plan.servers,
        pushes=has_engine,
        wakes=plan.engine == "colocate",
    )


@dataclass(frozen=True)
class Prediction:
    """Of one GPU that trains. engine: bytes of the rollout engine beside it while it answers, 0 without one."""

    memory: StepMemory
    engine: float
    time: StepTime
    plan: Plan

    @property
    def peak(self) -> float:
        """Bytes: of training, or of states and engine together; an engine sleeps while the model trains."""
        resting = self.memory.weights + self.memory.optimizer
        return max(self.memory.peak, resting + self.engine)

    @property
    def hours_of_10k(self) -> float:
        """GPU hours of 10,000 pictures, those of servers included."""
        return 10_000 / self.plan.images_a_step * self.time.total * self.plan.gpus / 3600


def predict(plan: Plan, rates: Rates) -> Prediction:
    """Memory and time of the plan on GPUs of these rates."""
    has_rollouts = plan.stage == "rollouts"
    runs = [run_of(plan, with_rollouts=has_rollouts)]
    time = step_time(runs[0], rates)
    if has_rollouts and plan.b_ratio < 1:
        runs.append(run_of(plan, with_rollouts=False))
        time = step_time(runs[1], rates).mixed(time, plan.b_ratio)
    memories = [
        step_memory(
            plan.shape, [_at_most(plan, one) for one in run.passes], plan.how, gpus=run.gpus, zero=run.zero,
            head=plan.head, graphs=run.graphs,
        )
        for run in runs
    ]  # fmt: skip
    engine = 0.0
    if has_rollouts and plan.engine == "colocate":
        told = runs[0].rollouts
        assert told is not None
        running = min(told.questions, told.at_once)
        engine = (
            BF16 * plan.shape.parameters + running * (told.prompt + told.new_tokens) * plan.shape.kv_bytes()
        )
    return Prediction(max(memories, key=lambda one: one.peak), engine, time, plan)


def _at_most(plan: Plan, one: Pass) -> Pass:
    """A full pack in place of a mean one: what there must be room for."""
    return replace(one, tokens=plan.pack) if plan.pack else one


def state_gb(shape: ModelShape, *, gpus: int, zero: int, lora_rank: int = 0) -> float:
    """Weights, gradients and optimizer of one GPU in GB."""
    if lora_rank:
        how = Training(BF16, lora_rank=lora_rank)
        return (
            BF16 * shape.parameters + state_bytes(trained_parameters(shape, how), gpus=gpus, zero=zero)
        ) / 1e9
    return state_bytes(shape.parameters, gpus=gpus, zero=zero) / 1e9
