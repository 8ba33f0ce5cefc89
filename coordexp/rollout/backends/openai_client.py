"""Answers by a server that speaks the OpenAI chat-completions format (`vllm serve`, `swift deploy`, others).

The strict parser works on token ids. They are taken, in this order, from
1. `token_ids` of the choice (vLLM, asked by `return_token_ids`);
2. the tokens of the log-probabilities, when each is a token of our vocabulary (vLLM's `token_id:N` form included);
3. the answer's text, tokenised again: recorded as `retokenized`, and without log-probabilities.

A server that says what it was asked (vLLM: `prompt_token_ids`) is held to what the model was trained on.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from coordexp.codec.pieces import token_bytes
from coordexp.codec.schema import IM_END
from coordexp.errors import RolloutError
from coordexp.image_size import PixelLimits
from coordexp.pictures import picture_bytes
from coordexp.rollout.backend import RolloutBackend
from coordexp.rollout.checks import check_prompt, encoding, name_of, timed
from coordexp.rollout.time_limit import TimeLimit
from coordexp.rollout.types import IMAGE_TAG, Rollout, RolloutRequest
from coordexp.swift_bridge.generation_prompts import encode_question, prompt_text, questions_template

logger = logging.getLogger(__name__)
_TOKEN_ID_PREFIX = "token_id:"
_VLLM_FIELDS = {"return_token_ids": True, "return_tokens_as_token_ids": True, "skip_special_tokens": False}


class OpenAiBackend(RolloutBackend):
    """Greedy decoding by a server that knows nothing of us; keeps `batch_size` requests there.

    model: the name the server knows the model by.  tokenizer: of the same checkpoint.
    limits: of its pictures; they are scaled before they are sent, so that the server's own limits change nothing.
    template: of the checkpoint. The first answer to each conversation must have been given to the prompt that it
        encodes, picture and all, the others to one that differs in the number of visual tokens at most. None compares
        nothing.
    timeout_s: of a request; the limit of a call is looked at between answers.
    """

    name = "openai"

    def __init__(
        self,
        base_url: str,
        model: str,
        tokenizer: Any,
        max_new_tokens: int = 1024,
        batch_size: int = 16,
        api_key: str = "none",
        timeout_s: float = 600.0,
        limits: PixelLimits | None = None,
        template: Any = None,
    ) -> None:
        super().__init__()
        import openai  # takes a second, so only when it is asked for

        self.base_url, self.model, self.tokenizer = base_url, model, tokenizer
        self._max_new_tokens, self._batch_size, self._limits = max_new_tokens, batch_size, limits
        self._questions = None if template is None else questions_template(template, None)
        self._texts: dict[tuple[str, ...], str] = {}  # conversation -> the prompt that was compared
        self._client = openai.OpenAI(base_url=base_url, api_key=api_key, timeout=timeout_s, max_retries=3)

    @property
    def max_new_tokens(self) -> int:
        return self._max_new_tokens

    def _release(self) -> None:
        self._client.close()

    def _answers(
        self, requests: Sequence[RolloutRequest], max_new_tokens: int, time_limit: TimeLimit | None
    ) -> list[Rollout]:
        with timed() as seconds, ThreadPoolExecutor(self._batch_size, thread_name_prefix="ask") as pool:
            asked = [
                pool.submit(self._ask, name_of(request, index), request, max_new_tokens)
                for index, request in enumerate(requests)
            ]
            answers = []
            try:
                for index, (request, future) in enumerate(zip(requests, asked, strict=True)):
                    answers.append(_result(future, time_limit, self.base_url))
                    self._check_asked(name_of(request, index), request, _prompt_ids(answers[-1]))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        return [self._rollout(answer, seconds() / len(requests)) for answer in answers]

    def _check_asked(self, name: str, request: RolloutRequest, found: Sequence[int]) -> None:
        """RolloutError with both texts unless the server's model saw what the checkpoint's template writes."""
        if self._questions is None:
            return
        if not found:
            logger.warning(
                "%s does not say which tokens it makes of a conversation (prompt_token_ids), so nothing shows that its "
                "chat template is the one that the model was trained with.", self.base_url,
            )  # fmt: skip
            self._questions = None
            return
        conversation = tuple(f"{message['role']}\n{message['content']}" for message in request.messages)
        text = self._texts.get(conversation)
        if text is not None and text == self._text(found):
            return
        with encoding(self.name, name):
            expected = encode_question(self._questions, request.messages, request.images)["input_ids"]
        check_prompt(f"{self.name} ({self.base_url})", name, expected, found, self._text)
        self._texts[conversation] = self._text(found)

    def _text(self, ids: Sequence[int]) -> str:
        return prompt_text(self.tokenizer, ids)

    def _ask(self, name: str, request: RolloutRequest, max_new_tokens: int) -> Any:
        import openai

        with encoding(self.name, name):
            messages = list(chat_messages(request, self._limits))
        question: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "max_tokens": max_new_tokens,
            "temperature": 0.0,
            "logprobs": True,
        }
        try:
            try:
                answer = self._client.chat.completions.create(**question, extra_body=_VLLM_FIELDS)
            except openai.BadRequestError as error:
                if not any(field in str(error) for field in _VLLM_FIELDS):
                    raise
                answer = self._client.chat.completions.create(
                    **question
                )  # a server that takes no fields of vLLM
        except openai.APIError as error:
            raise RolloutError(
                f"{self.base_url}: {name} was not answered: {type(error).__name__}: {error}. Is the server up, does it "
                f"serve {self.model!r} (--served-model), and is the key right (--api-key-env)?"
            ) from error
        if not answer.choices:
            raise RolloutError(f"{self.base_url}: {name} was answered without a choice.")
        return answer

    def _rollout(self, answer: Any, seconds: float) -> Rollout:
        choice = answer.choices[0]
        logprobs = list((choice.logprobs and choice.logprobs.content) or ())
        ids = list(_extra(choice, "token_ids") or ())
        from_logprobs = [self._token_id(entry) for entry in logprobs]
        if not ids and None not in from_logprobs:
            ids = from_logprobs
        retokenized = not ids
        if retokenized:
            ids = self._tokenised(choice)
        return Rollout(
            prompt_token_ids=_prompt_ids(answer),
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


def _prompt_ids(answer: Any) -> tuple[int, ...]:
    """What the server's model saw, as far as the server says it."""
    return tuple(_extra(answer, "prompt_token_ids") or _extra(answer.choices[0], "prompt_token_ids") or ())


def _result(future: Future[Any], time_limit: TimeLimit | None, server: str) -> Any:
    """What the future gives, within the limit of the call."""
    left = None if time_limit is None else time_limit.left()
    try:
        return future.result(left if left is None else max(0.0, left))
    except TimeoutError as error:
        assert time_limit is not None
        raise time_limit.exceeded(server) from error


def chat_messages(request: RolloutRequest, limits: PixelLimits | None) -> Iterator[dict[str, Any]]:
    """The request's messages in chat-completions form, each `<image>` replaced by the image itself.

    limits: what pictures are scaled by; None leaves them as they are.
    """
    images = iter(request.images)
    for message in request.messages:
        content: list[dict[str, Any]] = []
        for index, text in enumerate(message["content"].split(IMAGE_TAG)):
            if index:
                content.append({"type": "image_url", "image_url": {"url": _image_uri(next(images), limits)}})
            if text:
                content.append({"type": "text", "text": text})
        yield {"role": message["role"], "content": content}


def _image_uri(image: str | bytes, limits: PixelLimits | None) -> str:
    """Any server's own reader makes of it the pixels that our models are trained on."""
    data, media_type = picture_bytes(image, fit=None if limits is None else limits.fit)
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"


def _extra(model: Any, name: str) -> Any:
    """A field that the OpenAI format does not have, from what the server sent beside it."""
    return (model.model_extra or {}).get(name)
