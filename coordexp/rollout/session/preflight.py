"""Before the first step: does the backend answer at all, in time, and to the prompt that will be trained on?"""

from __future__ import annotations

from functools import partial
from typing import Any

from coordexp.config.schema.rollout import RolloutMatching
from coordexp.rollout.backend import PolicyBackend
from coordexp.rollout.checks import check_prompt, name_of
from coordexp.rollout.time_limit import TimeLimit
from coordexp.rollout.types import Rollout, RolloutRequest
from coordexp.swift_bridge.generation_prompts import (
    encode_question,
    prompt_text,
    questions_template,
    without_training_hooks,
)

PREFLIGHT_TOKENS = 4


def preflight(
    backend: PolicyBackend,
    request: RolloutRequest,
    template: Any,
    *,
    timeout_s: float | None = 300.0,
    section: str = RolloutMatching.where,
) -> Rollout:
    """Push the weights, generate a few tokens, compare the engine's prompt with the template's. All ranks call it.

    Arguments:
        request: any question of the data set, with its image.
        timeout_s: `preflight_timeout_s` of `section`, as a run file calls the settings of rollouts.

    Returns the short answer.

    Raises:
        RolloutError: the backend does not answer in time, not once, with other weights, or to another prompt.
    """
    backend.push_policy(backend.policy_version)
    limit = TimeLimit(timeout_s, f"{section}.preflight_timeout_s")
    rollouts = backend.generate([request], max_new_tokens=PREFLIGHT_TOKENS, time_limit=limit)
    name = f"{name_of(request, 0)} (preflight)"
    limit.check(backend.name, name)
    with without_training_hooks(template):
        encoded = encode_question(questions_template(template, None), request.messages, request.images)
    check_prompt(
        backend.name,
        name,
        encoded["input_ids"],
        rollouts[0].prompt_token_ids,
        partial(prompt_text, template.tokenizer),
    )
    return rollouts[0]
