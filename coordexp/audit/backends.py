"""Another backend of `infer` against hf: equal prompt ids, equal pixels as far as they can be seen, equal answers."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from coordexp.audit.answers import TIE, Answered, compare_ids
from coordexp.audit.findings import DifferenceError
from coordexp.rollout.backends.openai_client import chat_messages
from coordexp.rollout.types import RolloutRequest
from coordexp.swift_bridge.generation_prompts import encode_question, questions_template


def check_backend_prompts(answered: Answered, other: Answered, name: str) -> str:
    """The backend says that it answered the same prompt ids, image placeholders expanded."""
    num_prompts = 0
    for request_id, rollout in other.rollouts.items():
        if not rollout.prompt_token_ids:
            raise DifferenceError(f"{request_id}: {name} does not say which prompt ids it answered")
        own = answered.rollouts[request_id].prompt_token_ids
        compare_ids(f"{request_id}: {name}", rollout.prompt_token_ids, "hf", own, answered.tokenizer)
        num_prompts += 1
    return f"{num_prompts} prompts, by the ids that the backend returns"


def check_engine_pixels(answered: Answered, other: Answered, name: str) -> str:
    """Patches by vLLM's own processor, from the picture that it is handed."""
    found, in_bytes = _compare_patches(answered, other.backend.patches, name)
    how = ", as bytes: it normalises them inside the model" if in_bytes else ""
    return f"{found} patches, as the engine's own processor makes them of each request{how}"


def check_sent_pixels(answered: Answered, name: str) -> str:
    """A server shows no pixels: what it is sent is decoded, and encoded as hf does."""
    questions = questions_template(answered.backend.template, answered.model)

    def sent(request: RolloutRequest) -> Tensor | None:
        messages = chat_messages(request, answered.backend.template.pixel_limits)
        parts = [part for message in messages for part in message["content"]]
        uris = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        pictures = [base64.b64decode(uri.partition(",")[2]) for uri in uris]
        encoded: dict[str, Any] = encode_question(questions, request.messages, pictures)
        patches: Tensor | None = encoded.get("pixel_values")
        return patches

    found, _ = _compare_patches(answered, sent, name)
    return f"{found} patches of the pictures as they are sent; the server's own are not to be seen"


def _compare_patches(
    answered: Answered, patches_of: Callable[[RolloutRequest], Tensor | None], name: str
) -> tuple[int, bool]:
    """How many patches are equal to the bit, and whether they were compared as bytes."""
    num_patches, in_bytes = 0, False
    for request, encoded in zip(answered.job.requests(), answered.encoded, strict=True):
        own, theirs = encoded.get("pixel_values"), patches_of(request)
        if own is None or theirs is None:
            continue
        if theirs.dtype == torch.uint8:
            own, in_bytes = as_bytes(own, answered.backend.template.processor.image_processor), True
        if own.shape != theirs.shape:
            raise DifferenceError(
                f"{request.request_id}: {theirs.shape[0]} patches in {name}, {own.shape[0]} in hf: another pixel budget"
            )
        if not torch.equal(own, theirs.to(own.dtype)):
            worst = float((own.float() - theirs.float()).abs().max())
            raise DifferenceError(
                f"{request.request_id}: other pixels in {name} than in hf (largest difference {worst:.3g})"
            )
        num_patches += int(own.shape[0])
    return num_patches, in_bytes


def as_bytes(patches_PD: Tensor, processor: Any) -> Tensor:
    """Normalised patches as the 8-bit pixels they were made of, uint8 [P, D].

    A patch holds its channels one after another.
    """
    mean, std = (
        torch.tensor(values, dtype=torch.float64) for values in (processor.image_mean, processor.image_std)
    )
    planes_PCd = patches_PD.double().unflatten(1, (mean.numel(), -1))
    pixels_PCd: Tensor = (planes_PCd * std[:, None] + mean[:, None]) * 255
    return pixels_PCd.round().to(torch.uint8).flatten(1)


def check_same_answers(answered: Answered, other: Answered, name: str) -> str:
    """The same greedy tokens; where two tokens are equally likely, an answer may go on either way."""
    ties = 0
    for index, request in enumerate(answered.job.requests()):
        own = answered.answer_ids[index]
        theirs = list(other.rollouts[request.request_id].response_token_ids)
        if own == theirs:
            continue
        if not _part_at_a_tie(answered, index, own, theirs):
            compare_ids(f"{request.request_id}: {name}", theirs, "hf", own, answered.tokenizer)
        ties += 1
    total = len(answered.answer_ids)
    parted = f"; {ties} part where two tokens are equally likely" if ties else ""
    return f"{total} answers, token for token{parted}"


def _part_at_a_tie(answered: Answered, index: int, own: Sequence[int], theirs: Sequence[int]) -> bool:
    """Whether hf finds the first two tokens that differ equally likely."""
    t = next((t for t, (a, b) in enumerate(zip(own, theirs, strict=False)) if a != b), None)
    if t is None or len(answered.teachable(own[: t + 1])) <= t:
        return False
    row_V = answered.rows(index, own[: t + 1])[t]
    return float((row_V[own[t]] - row_V[theirs[t]]).abs()) <= TIE
