"""Parts of a stage-2 step without a trainer: raw samples of words, a model that answers what it is told, one rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from support.stage2 import PIPELINE, objective_spec

from coordexp.codec.coord_vocab import CoordVocab
from coordexp.codec.forms.base import AnswerForm
from coordexp.codec.schema import BoxObject
from coordexp.config.schema.rollout import Matching
from coordexp.data.raw_samples import RawSample
from coordexp.data.source import DatasetFilter
from coordexp.losses.columns import CoordColumns
from coordexp.losses.objective import Stage2Objective
from coordexp.packing.position_ids import VisionLayout
from coordexp.rollout.session.session import RolloutSession
from coordexp.rollout.types import Rollout, RolloutRequest
from coordexp.targets.builder import TargetBuilder
from coordexp.trainers.rollouts.answers import AnswerJudge, AnswerTeacher
from coordexp.trainers.step.assembly import SampleLayout, StepAssembly

PROMPT = "What is there?"


class WrittenAnswers:
    """A backend whose answers are given; keeps what it was asked, call by call."""

    name = "written"

    def __init__(self, tok: Any, answers: Sequence[str], policy_version: int = 1) -> None:
        self.tok, self.answers, self.policy_version = tok, list(answers), policy_version
        self.calls: list[list[RolloutRequest]] = []
        self.closed = 0

    @property
    def asked(self) -> list[RolloutRequest]:
        return [request for call in self.calls for request in call]

    def push_policy(self, version: int) -> None:
        self.policy_version = version

    def close(self) -> None:
        self.closed += 1

    def generate(self, requests: Sequence[RolloutRequest], **_options: Any) -> list[Rollout]:
        first = len(self.asked)
        self.calls.append(list(requests))
        prompt = tuple(self.tok.encode(PROMPT, add_special_tokens=False))
        texts = self.answers[first : first + len(requests)]
        ids = [tuple(self.tok.encode(text, add_special_tokens=False)) for text in texts]
        return [Rollout(prompt, answer, (), "stop", 0.0, self.policy_version) for answer in ids]


def box(desc: str, *bins: int) -> BoxObject:
    return BoxObject(desc, "bbox_2d", bins)


def raw(tok: Any, number: int, *objects: BoxObject) -> RawSample:
    ids = tuple(tok.encode(PROMPT, add_special_tokens=False))
    question = ({"role": "user", "content": PROMPT},)
    return RawSample(f"data.jsonl:{number}", "shapes", ids, None, objects, question, (), 64, 64)


def opened(backend: Any, agree: Any = lambda number: number, at_once: int = 256) -> RolloutSession:
    """A session that holds the backend already."""
    session = RolloutSession(
        lambda: backend,
        first_question=lambda: raw(backend.tok, 0),
        template=None,
        preflight_timeout_s=1.0,
        agree=agree,
        at_once=at_once,
    )
    session._backend = backend
    return session


def teacher(
    tok: Any,
    backend: WrittenAnswers,
    first_index: int = 0,
    num_answers: int = 1,
    teaches_best: bool = False,
    form: AnswerForm | None = None,
    **matching: Any,
) -> AnswerTeacher:
    return AnswerTeacher(
        opened(backend),
        AnswerJudge(tok, Matching(**matching), form=form),
        TargetBuilder(tok, form=form),
        policy_version=lambda step: step + 1,
        seed=7,
        first_index=first_index,
        num_answers=num_answers,
        teaches_best=teaches_best,
    )


def layout(tok: Any, packing_length: int | None, batch_size: int = 2) -> SampleLayout:
    columns = CoordColumns(CoordVocab.from_tokenizer(tok).ids)
    return SampleLayout(
        columns, VisionLayout(image_token_id=0, spatial_merge_size=2), 0, packing_length, batch_size
    )


def objective() -> Stage2Objective:
    return Stage2Objective(objective_spec(PIPELINE["objective"], PIPELINE["diagnostics"]))


def assembly(
    tok: Any, packing_length: int | None, *, agree: Any = lambda number: number, batch_size: int = 2
) -> StepAssembly:
    """Of one rank, whose neighbours `agree` speaks for."""
    return StepAssembly(
        layout(tok, packing_length, batch_size),
        objective(),
        agree=agree,
        add_up=lambda counts: counts,
        device=torch.device("cpu"),
        typed_datasets=DatasetFilter((), ()),
    )
