"""Evaluation with another prompt than training: which tokens reach the backend, and what an evaluation says of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.rollout import load_policy
from swift.dataset import LazyLLMDataset

from coordexp.codec.records import read_jsonl
from coordexp.config import Prompt, parse_sections
from coordexp.config.schema.rollout import Matching
from coordexp.data.dataset import read_training_rows
from coordexp.data.shapes import PRESETS, generate_shapes
from coordexp.rollout.backends.hf import HfBackend
from coordexp.rollout.session.session import RolloutSession
from coordexp.rollout.types import Rollout, RolloutRequest
from coordexp.swift_bridge.generation_prompts import encode_question, questions_template
from coordexp.targets import TargetBuilder
from coordexp.trainers.datasets import EVAL, TRAIN, question_datasets
from coordexp.trainers.rollouts.answers import AnswerJudge, AnswerTeacher
from coordexp.trainers.rollouts.eval import evaluate_rollouts
from coordexp.trainers.runtime import RunSettings

TRAINED = Prompt(user="Find all.", system="You detect.")
LONGER = "Detect all objects. Use only these names: box, disk."


class Listening(HfBackend):
    """Keeps the prompt tokens that its model has seen."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seen: list[tuple[int, ...]] = []

    def _answers(self, requests: Sequence[RolloutRequest], *options: Any) -> list[Rollout]:
        rollouts = super()._answers(requests, *options)
        self.seen += [rollout.prompt_token_ids for rollout in rollouts]
        return rollouts


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    generate_shapes(root, PRESETS["pixels"], num_train=2, num_val=2, seed=1)
    return root


def settings_of(variant: str | None) -> RunSettings:
    sections = parse_sections(
        {
            "custom": {"prompt_variants": {"longer": LONGER}},
            "rollout_matching": {"backend": "hf", "max_new_tokens": 4, "eval_prompt_variant": variant},
        }
    )
    return RunSettings(
        "stage2_rollout_aligned", sections, {"strict": True, "seed": 0, "data_seed": 0}, TRAINED
    )


@pytest.mark.parametrize("variant", [None, "longer"])
def test_the_other_prompt_is_asked_in_evaluation_alone(nano: Path, scenes: Path, variant: str | None) -> None:
    model, template = load_policy(nano)
    settings = settings_of(variant)
    arguments: dict[str, Any] = {"template": template, "args": None}
    for name, file in ((TRAIN, "train.jsonl"), (EVAL, "val.jsonl")):
        arguments[name] = LazyLLMDataset(read_training_rows(scenes / file, TRAINED), template.encode)
    question_datasets(arguments, settings, samples_per_step=1, packing_length=None)

    rollout = settings.sections.rollout_matching
    assert rollout is not None
    backend = Listening(rollout, model, template)
    session = RolloutSession(
        lambda: backend,
        first_question=lambda: arguments[TRAIN][0],
        template=template,
        preflight_timeout_s=60.0,
        agree=lambda number: number,
    )
    judge = AnswerJudge(template.tokenizer, Matching())
    evaluate_rollouts(session, judge, arguments[EVAL], rollout, version=1, seed=0, step=0)
    preflight, *evaluated = backend.seen
    backend.seen.clear()
    builder = TargetBuilder(template.tokenizer)
    teacher = AnswerTeacher(session, judge, builder, policy_version=lambda step: step + 1, seed=0)
    raws = [arguments[TRAIN][index] for index in range(2)]
    teacher(raws, 0)

    def ids(file: str, prompt: Prompt) -> list[tuple[int, ...]]:
        questions = questions_template(template, None)
        paths = [str(record.image_paths()[0]) for record in read_jsonl(scenes / file)]
        return [tuple(encode_question(questions, prompt.messages(1), [path])["input_ids"]) for path in paths]

    assert backend.seen == ids("train.jsonl", TRAINED)
    assert preflight == backend.seen[0]
    asked = TRAINED if variant is None else TRAINED.model_copy(update={"user": LONGER})
    assert evaluated == ids("val.jsonl", asked)
    assert (evaluated == ids("val.jsonl", TRAINED)) is (variant is None)
    assert (LONGER in template.tokenizer.decode(evaluated[0])) is (variant is not None)
    assert arguments[EVAL][0].objects == read_jsonl(scenes / "val.jsonl")[0].objects
