"""Answers of a model in this process to questions whose text is read as latent vectors."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from coordexp.codec.latent_vocab import latent_text
from coordexp.errors import RolloutError
from coordexp.models.latent_prefix.place import latents_in_place
from coordexp.models.latent_prefix.prompts import PromptVectors
from coordexp.rollout.backends.hf import HfBackend
from coordexp.rollout.time_limit import TimeLimit
from coordexp.rollout.types import IMAGE_TAG, Rollout, RolloutRequest


@dataclass(frozen=True)
class LatentRequest(RolloutRequest):
    """A question with latent tokens in the place of its text. text: what they stand for."""

    text: str = ""


class LatentHfBackend(HfBackend):
    """As `HfBackend`: the text of each question becomes the latent tokens, whose embeddings are its vectors.

    Prompts of the answers hold the latent tokens, and what they cost is what those cost.

    vectors: for the model that answers.
    """

    def __init__(self, *args: Any, vectors: PromptVectors, **kwargs: Any) -> None:
        super().__init__(*args, around=self._in_place, **kwargs)
        self._vectors = vectors

    def _answers(
        self, requests: Sequence[RolloutRequest], max_new_tokens: int, time_limit: TimeLimit | None
    ) -> list[Rollout]:
        latent = [latent_request(request, self._vectors.num_latents) for request in requests]
        return super()._answers(latent, max_new_tokens, time_limit)

    def _in_place(self, requests: Sequence[RolloutRequest]) -> AbstractContextManager[None]:
        texts = [request.text for request in requests if isinstance(request, LatentRequest)]
        made: list[Tensor] = []

        def vectors(embedding: nn.Module) -> Tensor:
            if not made:
                made.append(self._vectors(embedding, texts).repeat_interleave(self.settings.num_beams, 0))
            return made[0]

        return latents_in_place(self._model, self._vectors.latent_ids_M, vectors, self._vectors.deep)


def latent_request(request: RolloutRequest, num_latents: int) -> LatentRequest:
    """The same question with latent tokens in the place of the text of its user message.

    Raises RolloutError for a conversation of several user messages.
    """
    users = [index for index, message in enumerate(request.messages) if message["role"] == "user"]
    if len(users) != 1:
        raise RolloutError(
            f"a latent prefix stands in the place of one user message; this question has {len(users)}."
        )
    content = request.messages[users[0]]["content"]
    text = content.replace(IMAGE_TAG, "")
    tags = IMAGE_TAG * content.count(IMAGE_TAG)
    place = latent_text(num_latents)
    asked = tags + place if content.startswith(IMAGE_TAG) else place + tags
    messages = list(request.messages)
    messages[users[0]] = {**messages[users[0]], "content": asked}
    return LatentRequest(tuple(messages), request.images, request.seed, request.request_id, text)
