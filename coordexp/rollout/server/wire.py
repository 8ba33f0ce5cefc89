"""What trainers and the rollout server say to each other over HTTP, and the errors that have a status of their own."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from coordexp.config.schema.rollout import RolloutMatching
from coordexp.errors import RolloutError
from coordexp.rollout.weights.sync import Checksum

HEALTH, OPEN, WEIGHTS, GENERATE = "/health", "/weights/open", "/weights", "/generate"
STATUS_BAD_REQUEST, STATUS_CONFLICT, STATUS_TOO_LATE = 400, 409, 504


class ConflictError(RolloutError):
    """The server has other weights than the caller believes, or cannot take the caller's."""


class TooLateError(RolloutError):
    """The answers took longer than the caller allows."""


def _decoded(value: object) -> bytes:
    if not isinstance(value, str):
        raise ValueError("expected base64 text")
    try:
        return base64.b64decode(value, validate=True)
    except binascii.Error as error:
        raise ValueError(f"is not base64: {error}") from error


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Message(_Body):
    """A turn of the conversation; text only."""

    role: Literal["system", "user", "assistant"]
    content: str


class Question(_Body):
    """One request. images: the bytes of image files, base64; the server reads no file and fetches nothing."""

    messages: list[Message] = Field(min_length=1)
    images: list[Annotated[bytes, BeforeValidator(_decoded)]] = []
    seed: int
    request_id: str


class GenerateBody(_Body):
    """Questions for the weights of `policy_version`.

    session: the training process whose weights are meant; null takes whoever pushed last.
    stop_token_ids: tokens that end an answer; null takes those of the server's template.
    answer_form, field_order: what guided decoding keeps to (`coordexp.codec.forms.choose.form_of`).
    time_limit_s: when to give up; null: never.
    """

    settings: RolloutMatching
    policy_version: int
    session: str | None = None
    max_new_tokens: int = Field(gt=0)
    logprobs: bool = False
    stop_token_ids: list[int] | None = None
    answer_form: str = "coordjson"
    field_order: str = "desc_first"
    time_limit_s: float | None = Field(default=None, gt=0)
    requests: list[Question]


class Answer(_Body):
    """One answer; fields as in `coordexp.rollout.types.Rollout`."""

    prompt_token_ids: list[int]
    response_token_ids: list[int]
    token_logprobs: list[float]
    finish_reason: Literal["stop", "length"]
    policy_version: int
    repeat_terminated: bool


class Answers(_Body):
    """In the order of the requests."""

    rollouts: list[Answer]


class OpenBody(_Body):
    """A training process takes the server over.

    session: a secret of its own choice, which it proves to know at the weight port.
    own_head: its model has a head apart from the embedding.
    timeout_s: longest silence while it pushes weights.
    """

    session: str = Field(min_length=32)
    own_head: bool
    timeout_s: float = Field(gt=0)


class OpenReply(_Body):
    """The weight port is open. device: of the engine, "cpu" or "cuda".  dtype: of its weights."""

    group_port: int
    device: str
    dtype: str


class WeightsBody(_Body):
    """What comes over the weight connection now is `policy_version`."""

    session: str
    policy_version: int


class WeightsReply(_Body):
    """What the engine holds afterwards.

    checksums: of the engine's tensors (`coordexp.rollout.weights.sync.Checksum`: full, probed).
    engine_names: the engine's tensor that each pushed one went into.
    """

    checksums: dict[str, tuple[int | None, int | None]]
    engine_names: dict[str, str]

    def held(self) -> dict[str, Checksum]:
        """The checksums in the form that `differences` takes."""
        return {name: Checksum(*pair) for name, pair in self.checksums.items()}
