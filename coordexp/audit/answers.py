"""The same record on every way to an answer: training, rollouts, `infer`; and answers that are what they seem."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coordexp.audit.findings import DifferenceError
from coordexp.audit.subject import ShortRun, Subject
from coordexp.audit.token_flow import SampleTokens, samples_of
from coordexp.codec.pieces import token_names
from coordexp.data.source import source_of
from coordexp.eval.predictions.artifacts import GT_VS_PRED, TOKEN_TRACE, read_jsonl_lines
from coordexp.inference.checked_model import load_tokenizer
from coordexp.inference.infer import Inference
from coordexp.inference.settings import InferSettings
from coordexp.packing.position_ids import VisionLayout
from coordexp.rollout.backend import RolloutBackend
from coordexp.rollout.time_limit import TimeLimit
from coordexp.rollout.types import Rollout, RolloutRequest
from coordexp.swift_bridge.generation_prompts import (
    collate_questions,
    encode_question,
    questions_template,
    with_answers,
)

TIE = 1e-3
"""Logits closer than this are equal: which of two tokens is the largest is left to rounding."""


class Recorded(RolloutBackend):
    """A backend that keeps what it answered."""

    name = "recorded"

    def __init__(self, backend: RolloutBackend) -> None:
        super().__init__()
        self.backend = backend
        self.rollouts: dict[str, Rollout] = {}

    @property
    def max_new_tokens(self) -> int:
        return self.backend.max_new_tokens

    def _answers(
        self, requests: Sequence[RolloutRequest], max_new_tokens: int, time_limit: TimeLimit | None
    ) -> list[Rollout]:
        rollouts = self.backend.generate(requests, max_new_tokens=max_new_tokens, time_limit=time_limit)
        self.rollouts |= {one.request_id: rollout for one, rollout in zip(requests, rollouts, strict=True)}
        return rollouts

    def _release(self) -> None:
        self.backend.close()


@dataclass(frozen=True)
class Answered:
    """`coordexp infer` on the records, by one backend."""

    job: Inference
    backend: Any
    tokenizer: Any
    rollouts: Mapping[str, Rollout]

    @classmethod
    def by(cls, backend: str, model: Path, data: Path, output: Path, **settings: Any) -> Answered:
        """settings: further fields of `InferSettings`; a prompt of None is what the model was trained with."""
        asked = InferSettings(backend=backend, batch_size=4, **settings)
        job = Inference.prepare(model, data, output, asked)
        with job.opened(overwrite=True) as log:
            loaded, tokenizer = job.load_backend()
            recorded = Recorded(loaded)
            job.answer(log, recorded, tokenizer)
        return cls(job, loaded, tokenizer, recorded.rollouts)

    @cached_property
    def answer_ids(self) -> list[list[int]]:
        """Token ids of every answer, in the order of the records."""
        requests = self.job.requests()
        return [list(self.rollouts[request.request_id].response_token_ids) for request in requests]

    @property
    def model(self) -> nn.Module:
        """Of the hf backend."""
        model: nn.Module = self.backend.model
        return model

    @cached_property
    def encoded(self) -> list[dict[str, Any]]:
        """The questions as the hf backend's template encodes them: ids, patches, grids."""
        questions = questions_template(self.backend.template, self.model)
        return [encode_question(questions, one.messages, one.images) for one in self.job.requests()]

    def teachable(self, answer: Sequence[int]) -> list[int]:
        """An answer up to where it writes a placeholder of a picture, which no forward takes without the picture."""
        template = self.backend.template
        media = (template.image_token_id, template.video_token_id)
        stop = next((t for t, token in enumerate(answer) if token in media), len(answer))
        return list(answer[:stop])

    @torch.no_grad()
    def rows(self, index: int, answer: Sequence[int]) -> Tensor:
        """Logits [R, V] that predict each token of an answer, float32, by one teacher-forced pass."""
        inputs = self.inputs(index, answer)
        logits_TV = self.model(**inputs, use_cache=False).logits[0].float()
        start = inputs["input_ids"].shape[1] - len(answer)
        rows_RV: Tensor = logits_TV[start - 1 : -1]
        return rows_RV

    def inputs(self, index: int, answer: Sequence[int]) -> dict[str, Tensor]:
        """Model inputs of one question with its answer behind it."""
        questions = questions_template(self.backend.template, self.model)
        batch = collate_questions(questions, [self.encoded[index]], self.model.device)  # type: ignore[arg-type]
        return with_answers(batch, [answer], self.tokenizer.pad_token_id)


def check_training_prompts(run: ShortRun, subject: Subject, answered: Answered, layout: VisionLayout) -> str:
    """Prompt ids of training batches are those that `infer` uses for the same record."""
    index_of = {source_of(record).sample_id: index for index, record in enumerate(subject.records)}
    num_prompts = 0
    for sample in samples_of(run, layout):
        index = index_of[sample.sample_id]
        question = answered.encoded[index]
        prompt = sample.ids_T[: int(sample.rows[0].min())] if not sample.forward["is_rollout"] else None
        own = list(question["input_ids"])
        theirs = (sample.ids_T[: len(own)] if prompt is None else prompt).tolist()
        compare_ids(f"{sample.where}, {sample.sample_id}: training", theirs, "infer", own, subject.tokenizer)
        num_prompts += 1
    return f"{num_prompts} prompts"


def check_training_pixels(run: ShortRun, subject: Subject, answered: Answered, layout: VisionLayout) -> str:
    """Patches of training batches are those that `infer` makes of the same record's pictures, to the bit."""
    index_of = {source_of(record).sample_id: index for index, record in enumerate(subject.records)}
    num_patches = sum(
        _compare_pixels(sample, answered.encoded[index_of[sample.sample_id]])
        for sample in samples_of(run, layout)
    )
    return f"{num_patches} patches"


def _compare_pixels(sample: SampleTokens, question: Mapping[str, Any]) -> int:
    theirs, own = sample.pixels_PD, question.get("pixel_values")
    if own is None or theirs is None:
        return 0
    name = f"{sample.where}, {sample.sample_id}"
    if theirs.shape != own.shape:
        raise DifferenceError(
            f"{name}: {theirs.shape[0]} patches in training, {own.shape[0]} in infer: another pixel budget"
        )
    if not torch.equal(theirs, own.to(theirs.dtype)):
        worst = float((theirs - own).abs().max())
        raise DifferenceError(
            f"{name}: its pixels are not those of the record's picture (largest difference {worst:.3g})"
        )
    return int(own.shape[0])


def check_rollout_prompts(run: ShortRun, subject: Subject, answered: Answered) -> str:
    """Rollouts were asked what training and `infer` ask."""
    index_of = {source_of(record).sample_id: index for index, record in enumerate(subject.records)}
    answers = list(_answers(run))
    for where, answer in answers:
        own = list(answered.encoded[index_of[answer["sample_id"]]]["input_ids"])
        name = f"{where}, {answer['sample_id']}: rollout"
        compare_ids(name, answer["prompt_token_ids"], "infer", own, subject.tokenizer)
    return f"{len(answers)} rollouts"


def check_template(start: Path, checkpoint: Path) -> str:
    """The chat template and the special tokens of a checkpoint are those of the model that the run started from."""
    ours, theirs = map(load_tokenizer, (start, checkpoint))
    if ours.chat_template != theirs.chat_template:
        raise DifferenceError(f"{checkpoint.name} has another chat template than {start.name}")
    if ours.get_vocab() != theirs.get_vocab():
        changed = sorted(set(ours.get_vocab().items()) ^ set(theirs.get_vocab().items()))
        raise DifferenceError(
            f"{checkpoint.name}: token {changed[0][0]!r} has another id than in {start.name}"
        )
    return "chat template and vocabulary"


def check_stored(answered: Answered) -> str:
    """The ids that were generated are the ids that the artefacts keep, and the stored text is theirs."""
    traces = read_jsonl_lines(answered.job.output / TOKEN_TRACE, ("generated_token_text", "text"))
    for request, trace, ids in zip(answered.job.requests(), traces, answered.answer_ids, strict=True):
        tokens = token_names(answered.tokenizer, ids)
        if trace["generated_token_text"] != tokens:
            raise DifferenceError(
                f"{request.request_id}: the stored tokens are not those that were generated"
            )
        if trace["text"] != answered.tokenizer.decode(ids).split("<|im_end|>")[0]:
            raise DifferenceError(f"{request.request_id}: the stored text is not what its tokens decode to")
    num_lines = len(read_jsonl_lines(answered.job.output / GT_VS_PRED, ("image_id",)))
    if num_lines != len(traces):
        raise DifferenceError(f"{len(traces)} traces, but {num_lines} lines of predictions")
    return f"{num_lines} answers"


def check_teacher_forced(answered: Answered) -> str:
    """A teacher-forced pass over a greedy answer has each of its tokens as its arg-max."""
    num_tokens = 0
    for index, answer in enumerate(answered.answer_ids):
        ids = answered.teachable(answer)
        if not ids:
            continue
        rows_RV = answered.rows(index, ids)
        best, chosen = (
            rows_RV.max(-1).values,
            rows_RV.gather(1, torch.tensor(ids)[:, None].to(rows_RV.device)),
        )
        wrong = (best - chosen.squeeze(1) > TIE).nonzero().flatten()
        if wrong.numel():
            t = int(wrong[0])
            names = token_names(answered.tokenizer, [ids[t], int(rows_RV[t].argmax())])
            request = answered.job.requests()[index]
            raise DifferenceError(
                f"{request.request_id}: token {t} of the answer is {names[0]!r}, the arg-max {names[1]!r}"
            )
        num_tokens += len(ids)
    return f"{num_tokens} tokens"


def check_policy(run: ShortRun, answers_of: Mapping[int, Mapping[str, Sequence[int]]], tokenizer: Any) -> str:
    """Greedy rollouts of a step are those of the weights that the step starts from.

    answers_of: step -> sample id -> greedy answer of a fresh process with the checkpoint of that step.
    """
    checked = 0
    for where, answer in _answers(run):
        if answer["policy_version"] != answer["step"] + 1:
            raise DifferenceError(f"{where}: answered by policy version {answer['policy_version']}")
        expected = answers_of.get(answer["step"], {}).get(answer["sample_id"])
        if expected is not None:
            name = f"{where}, {answer['sample_id']}: rollout"
            compare_ids(name, answer["response_token_ids"], "a fresh process", expected, tokenizer)
            checked += 1
    return f"{checked} rollouts of steps {sorted(answers_of)}"


def compare_ids(name: str, found: Sequence[int], other: str, expected: Sequence[int], tokenizer: Any) -> None:
    """Raises DifferenceError naming the first place where the two differ, with the tokens around it."""
    found, expected = list(map(int, found)), list(map(int, expected))
    if found == expected:
        return
    pairs = enumerate(zip(found, expected, strict=False))
    t = next((t for t, (a, b) in pairs if a != b), min(len(found), len(expected)))
    around = [tokenizer.decode(ids[max(0, t - 3) : t + 3]) for ids in (found, expected)]
    raise DifferenceError(
        f"{name} has {len(found)} tokens, {other} {len(expected)}; they part at token {t}: {around[0]!r} against "
        f"{around[1]!r}"
    )


def _answers(run: ShortRun) -> Iterator[tuple[str, dict[str, Any]]]:
    for plan in run.plans:
        for answer in plan["answers"]:
            yield f"step {plan['step']}, rank {plan['rank']}", {**answer, "step": plan["step"]}
