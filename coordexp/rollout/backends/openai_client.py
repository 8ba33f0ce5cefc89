"""Answers by a server that speaks the OpenAI chat-completions format (`vllm serve`, `swift deploy`, others).

The strict parser works on token ids. They are taken, in this order, from
1. `token_ids` of the choice (vLLM, asked by `return_token_ids`);
2. the tokens of the log-probabilities, when each is a token of our vocabulary (vLLM's `token_id:N` form included);
3. the answer's text, tokenised again: recorded as `retokenized`, and without log-probabilities.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from coordexp.codec.pieces import token_bytes
from coordexp.codec.schema import IM_END
from coordexp.errors import RolloutError
from coordexp.pictures import picture_bytes
from coordexp.rollout.checks import encoding, name_of
from coordexp.rollout.types import IMAGE_TAG, Rollout, RolloutRequest

_TOKEN_ID_PREFIX = "token_id:"
_VLLM_FIELDS = {"return_token_ids": True, "return_tokens_as_token_ids": True, "skip_special_tokens": False}


@dataclass(frozen=True)
class ServerRollout(Rollout):
    """retokenized: whether the token ids come from the answer's text, and may not be those the model wrote."""

    retokenized: bool = False


@dataclass(frozen=True)
class OpenAiBackend:
    """A `RolloutBackend` with greedy decoding that keeps `batch_size` requests at the server.

    model: the name the server knows the model by.  tokenizer: of the same checkpoint.
    """

    base_url: str
    model: str
    tokenizer: Any
    max_new_tokens: int = 1024
    batch_size: int = 16
    api_key: str = "none"
    timeout_s: float = 600.0

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        """Answers in the order of `requests`; RolloutError naming the server and what it said."""
        import openai  # takes a second, so only when it is asked for

        client = openai.OpenAI(
            base_url=self.base_url, api_key=self.api_key, timeout=self.timeout_s, max_retries=3
        )
        with client, ThreadPoolExecutor(self.batch_size) as pool:
            started = time.perf_counter()
            answers = list(
                pool.map(
                    lambda item: self._ask(client, name_of(item[1], item[0]), item[1]), enumerate(requests)
                )
            )
        seconds = (time.perf_counter() - started) / len(requests)
        return [self._rollout(answer, seconds) for answer in answers]

    def _ask(self, client: Any, name: str, request: RolloutRequest) -> Any:
        import openai

        with encoding("openai", name):
            messages = list(chat_messages(request))
        question = {
            "model": self.model,
            "messages": messages,
            "max_tokens": self.max_new_tokens,
            "temperature": 0.0,
            "logprobs": True,
        }
        try:
            try:
                answer = client.chat.completions.create(**question, extra_body=_VLLM_FIELDS)
            except openai.BadRequestError as error:
                if not any(field in str(error) for field in _VLLM_FIELDS):
                    raise
                answer = client.chat.completions.create(**question)  # a server that takes no fields of vLLM
        except openai.APIError as error:
            raise RolloutError(
                f"{self.base_url}: {name} was not answered: {type(error).__name__}: {error}. Is the server up, does it "
                f"serve {self.model!r} (--served-model), and is the key right (--api-key-env)?"
            ) from error
        if not answer.choices:
            raise RolloutError(f"{self.base_url}: {name} was answered without a choice.")
        return answer

    def _rollout(self, answer: Any, seconds: float) -> ServerRollout:
        choice = answer.choices[0]
        logprobs = list((choice.logprobs and choice.logprobs.content) or ())
        ids = list(_extra(choice, "token_ids") or ())
        from_logprobs = [self._token_id(entry) for entry in logprobs]
        if not ids and None not in from_logprobs:
            ids = from_logprobs
        retokenized = not ids
        if retokenized:
            ids = self._tokenised(choice)
        return ServerRollout(
            prompt_token_ids=tuple(_extra(answer, "prompt_token_ids") or _extra(choice, "prompt_token_ids") or ()),
            response_token_ids=tuple(ids),
            token_logprobs=tuple(entry.logprob for entry in logprobs) if len(logprobs) == len(ids) and not retokenized
            else (),
            finish_reason="length" if choice.finish_reason == "length" else "stop",
            seconds=seconds,
            retokenized=retokenized,
        )  # fmt: skip

    def _token_id(self, entry: Any) -> int | None:
        """The id of a token of the log-probabilities; None when our vocabulary holds no such token."""
        if entry.token.startswith(_TOKEN_ID_PREFIX):
            return int(entry.token.removeprefix(_TOKEN_ID_PREFIX))
        ids = self.tokenizer.encode(entry.token, add_special_tokens=False)
        if len(ids) != 1 or token_bytes(self.tokenizer.convert_ids_to_tokens(ids[0])) != entry.token.encode():
            return None
        return int(ids[0])

    def _tokenised(self, choice: Any) -> list[int]:
        text = choice.message.content or ""
        if choice.finish_reason == "stop" and not text.endswith(IM_END):
            text += IM_END
        return list(self.tokenizer.encode(text, add_special_tokens=False))


def chat_messages(request: RolloutRequest) -> Iterator[dict[str, Any]]:
    """The request's messages in chat-completions form, each `<image>` replaced by the image itself."""
    images = iter(request.images)
    for message in request.messages:
        content: list[dict[str, Any]] = []
        for index, text in enumerate(message["content"].split(IMAGE_TAG)):
            if index:
                content.append({"type": "image_url", "image_url": {"url": _image_uri(next(images))}})
            if text:
                content.append({"type": "text", "text": text})
        yield {"role": message["role"], "content": content}


def _image_uri(image: str | bytes) -> str:
    """Any server's own reader makes of it the pixels that our models are trained on."""
    data, media_type = picture_bytes(image)
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"


def _extra(model: Any, name: str) -> Any:
    """A field that the OpenAI format does not have, from what the server sent beside it."""
    return (model.model_extra or {}).get(name)
