"""The engine of a rollout server and whose weights it holds. Nothing is answered before the first push."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from socket import socket
from typing import Any

import torch
from torch import Tensor

from coordexp.codec.forms.choose import form_of
from coordexp.codec.pieces import pieces_of
from coordexp.errors import RolloutError
from coordexp.rollout.checks import name_of
from coordexp.rollout.server.engine_loop import EngineLoop
from coordexp.rollout.server.wire import (
    Answer,
    ConflictError,
    GenerateBody,
    OpenBody,
    OpenReply,
    Question,
    TooLateError,
    WeightsBody,
    WeightsReply,
)
from coordexp.rollout.time_limit import TimeLimit
from coordexp.rollout.types import RolloutRequest
from coordexp.rollout.weights.connection import WeightConnection, listen
from coordexp.swift_bridge.generation_prompts import stop_token_ids
from coordexp.swift_bridge.vllm_engine import build_vllm_engine, set_environment

logger = logging.getLogger(__name__)
NAME = "vllm"


@dataclass(frozen=True)
class EngineOptions:
    """How the engine is started. None leaves a value to vLLM, or `dtype` to the checkpoint."""

    dtype: torch.dtype | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False
    own_head: bool = False
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments by vLLM's names."""


@dataclass(frozen=True)
class _Served:
    """Whose weights the engine holds, and their version."""

    session: str
    version: int


class ServedEngine:
    """Loads a checkpoint into an engine, takes weights from one training process at a time, answers questions.

    All methods may be called from any thread.

    Arguments:
        template: of the checkpoint (`coordexp.swift_bridge.checkpoint.load_template`).
        host, group_port: where the training process connects to push weights.

    Raises RolloutError when the engine does not start.
    """

    def __init__(
        self, model_dir: str, template: Any, options: EngineOptions, *, host: str, group_port: int
    ) -> None:
        set_environment()
        from coordexp.rollout.decoding.vllm_requests import ENCODING_THREADS

        self.model_dir = model_dir
        self._address = host, group_port
        self._dtype = options.dtype or template.model_info.torch_dtype
        self._pieces = pieces_of(template.tokenizer)
        self._stop_ids = stop_token_ids(template, None)
        self._encoders = threading.BoundedSemaphore(ENCODING_THREADS)
        self._served: _Served | None = None
        self._session: str | None = None  # who may push
        self._listener: socket | None = None
        self._connection: WeightConnection | None = None
        self._timeout_s = 0.0
        try:
            self._loop = EngineLoop(lambda: _start(model_dir, template, self._dtype, options))
        except Exception as error:
            raise RolloutError(
                f"{model_dir}: the vLLM engine did not start: {type(error).__name__}: {error}. Its own message is "
                "above; where memory is short, lower --max-model-len, --max-num-seqs or --gpu-memory-utilization."
            ) from error

    @property
    def failure(self) -> str | None:
        """Why nothing is served any more; None while all is well."""
        return self._loop.failure

    @property
    def policy_version(self) -> int | None:
        """Version of the weights that are served; None before the first push, and during each."""
        served = self._served
        return None if served is None else served.version

    def close(self) -> None:
        """Stop the engine; whoever still waits for an answer gets an error."""
        self._loop.close()
        self._hang_up()

    # weights

    def open(self, body: OpenBody) -> OpenReply:
        """Let a training process take the server over; waits for a push that is going on.

        Raises:
            ConflictError: its model does not fit the engine.
            RolloutError: the weight port is taken.
        """
        if body.own_head and self._is_tied():
            raise ConflictError(
                "the model in training has an output head apart from its embedding (or adapters on one of them), but "
                "this engine ties the two; restart the server with --own-head."
            )
        return self._loop.exclusive(lambda: self._open(body))

    def _open(self, body: OpenBody) -> OpenReply:
        self._forget_session()
        host, port = self._address
        try:
            self._listener = listen(host, port)
        except OSError as error:
            raise RolloutError(
                f"the weight port {host}:{port} cannot be opened: {error}. Does another process use it? Restart the "
                "server with another --group-port."
            ) from error
        self._session, self._timeout_s = body.session, body.timeout_s
        return OpenReply(
            group_port=port, device=self._device.type, dtype=str(self._dtype).removeprefix("torch.")
        )

    def push(self, body: WeightsBody) -> WeightsReply:
        """Take the weights that come over the connection, once no question is being answered.

        Raises:
            ConflictError: another training process has taken over.
            RolloutError: the weights do not come, or the engine does not take them; nothing is served then.
        """
        return self._loop.exclusive(lambda: self._push(body))

    def _push(self, body: WeightsBody) -> WeightsReply:
        if body.session != self._session:
            raise ConflictError(
                "this training process does not hold the server: another one has taken it over, the server was "
                "restarted, or a push has failed before. Run one training per server."
            )
        self._served = None
        try:
            reply = self._load(body.session, body.policy_version)
        except BaseException:
            self._forget_session()
            raise
        self._served = _Served(body.session, body.policy_version)
        logger.info("serving policy version %d", body.policy_version)
        return reply

    def _load(self, session: str, version: int) -> WeightsReply:
        from coordexp.rollout.weights.vllm_engine import (
            announce_version,
            engine_names,
            held_checksums,
            load_weights,
        )

        if self._connection is None:
            assert self._listener is not None
            listener, self._listener = self._listener, None
            self._connection = WeightConnection.serve(
                listener, session=session, device=self._device, timeout_s=self._timeout_s
            )
        names: list[str] = []
        stream = _noted(self._connection.receive(), names)
        engine = self._loop.engine
        load_weights(engine, stream)
        for _ in stream:  # up to the end that was announced, should the engine not have asked for it
            pass
        announce_version(engine, version)
        held = held_checksums(engine.inner_model, self._dtype)
        return WeightsReply(
            checksums={name: (checksum.full, checksum.probed) for name, checksum in held.items()},
            engine_names=engine_names(engine.inner_model, names, held),
        )

    def _forget_session(self) -> None:
        self._served = self._session = None
        self._hang_up()

    def _hang_up(self) -> None:
        connection, self._connection = self._connection, None
        listener, self._listener = self._listener, None
        for end in (connection, listener):
            if end is not None:
                end.close()

    def _is_tied(self) -> bool:
        return bool(self._loop.engine.engine.model_config.hf_config.tie_word_embeddings)

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self._loop.engine.inner_model.parameters()).device
        return device

    # answers

    def generate(self, body: GenerateBody) -> list[Answer]:
        """Answers in the order of the questions.

        Raises:
            ConflictError: other weights are served than those asked for, or came in between.
            TooLateError: more than `body.time_limit_s` seconds have passed.
            RequestError: a question that cannot be asked; the engine sees none of them.
            RolloutError: the engine fails or refuses a question.
        """
        self._check_version(body)
        limit = TimeLimit(body.time_limit_s, "time_limit_s")
        requests = [_request(question, index) for index, question in enumerate(body.requests)]
        names = [name_of(request, index) for index, request in enumerate(requests)]
        futures: list[Future[Any]] = []
        answers = []
        try:
            prompts = []
            for request, question, name in zip(requests, body.requests, names, strict=True):
                inputs = self._encode(request, name)
                prompts.append(inputs["input_ids"])
                futures.append(self._loop.submit(inputs, self._sampling(body, question)))
            for future, name, prompt_ids in zip(futures, names, prompts, strict=True):
                try:
                    output = future.result(_wait(limit))
                except TimeoutError as error:
                    raise TooLateError(f"{name} was not answered within {body.time_limit_s:g} s.") from error
                answers.append(self._answer(output, body, name, prompt_ids))
        finally:
            for future in futures:
                future.cancel()
        return answers

    def _check_version(self, body: GenerateBody) -> None:
        served = self._served
        if served is None:
            raise ConflictError(
                f"policy version {body.policy_version} was asked for, but no weights are served: none were pushed yet, "
                "or a push is going on or has failed."
            )
        if body.session is not None and body.session != served.session:
            raise ConflictError(
                f"the weights served (policy version {served.version}) are those of another training process, which "
                "has taken this server over. Run one training per server."
            )
        if body.policy_version != served.version:
            raise ConflictError(
                f"policy version {body.policy_version} was asked for, but version {served.version} is served."
            )

    def _encode(self, request: RolloutRequest, name: str) -> dict[str, Any]:
        from coordexp.rollout.decoding.vllm_requests import encode_request

        with self._encoders:
            return encode_request(self._loop.engine, NAME, name, request)

    def _sampling(self, body: GenerateBody, question: Question) -> Any:
        from coordexp.rollout.decoding.vllm_requests import end_id_of, sampling_params

        return sampling_params(
            body.settings,
            max_new_tokens=body.max_new_tokens,
            seed=question.seed,
            stop_ids=self._stop_ids_of(body),
            end_id=end_id_of(self._pieces),
            logprobs=body.logprobs,
            guide=_guide(body),
        )

    def _stop_ids_of(self, body: GenerateBody) -> Sequence[int]:
        return self._stop_ids if body.stop_token_ids is None else body.stop_token_ids

    def _answer(self, output: Any, body: GenerateBody, name: str, prompt_ids: Sequence[int]) -> Answer:
        from coordexp.rollout.decoding.vllm_requests import check_answered_prompt, rollout_of

        check_answered_prompt(self._loop.engine, NAME, name, prompt_ids, output)
        try:
            rollout = rollout_of(
                output,
                backend=NAME,
                version=body.policy_version,
                rules=body.settings.repeat_terminate,
                stop_ids=self._stop_ids_of(body),
                pieces=self._pieces,
                seconds=0.0,
                guide=_guide(body),
            )
        except RolloutError as error:
            raise ConflictError(str(error)) from error
        fields = asdict(rollout)
        return Answer(**{name: fields[name] for name in Answer.model_fields})


def _guide(body: GenerateBody) -> Any:
    """The rules of guided answers, None where the questions ask for none."""
    from coordexp.rollout.decoding.guided import GuideRules

    form = form_of(body.answer_form, body.field_order)
    return GuideRules.of(body.settings, form, limit=body.max_new_tokens)


def _start(model_dir: str, template: Any, dtype: torch.dtype, options: EngineOptions) -> Any:
    """The engine; all logits processors of ours are at hand, since each request says which it wants."""
    from coordexp.rollout.decoding.vllm_rows import PROCESSORS

    settings = {
        "load_format": "auto",
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "max_model_len": options.max_model_len,
        "max_num_seqs": options.max_num_seqs,
        "enforce_eager": options.enforce_eager or not torch.cuda.is_available(),
        "enable_prefix_caching": False,
    }
    return build_vllm_engine(
        model_dir,
        template,
        dtype=dtype,
        engine_settings={name: value for name, value in settings.items() if value is not None},
        world_size=1,
        seed=0,
        own_head=options.own_head,
        logits_processors=PROCESSORS,
        engine_args=options.engine_args,
    )


def _noted(stream: Iterator[tuple[str, Tensor]], names: list[str]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in stream:
        names.append(name)
        yield name, tensor


def _request(question: Question, index: int) -> RolloutRequest:
    return RolloutRequest(
        tuple(message.model_dump() for message in question.messages),
        tuple(question.images),
        question.seed,
        question.request_id or str(index),
    )


def _wait(limit: TimeLimit) -> float | None:
    left = limit.left()
    return None if left is None else max(0.0, left)
