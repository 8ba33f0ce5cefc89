"""Rollouts by vLLM engines in processes of their own (`rollout_matching.vllm.mode: server`, `coordexp rollout-server`).

`push_policy` copies the trained weights into every server and proves by checksums that they hold them. Questions are
seeded one by one and go round the servers in turn, so the answers do not depend on how many there are.
"""

from __future__ import annotations

import base64
import itertools
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from coordexp.codec.forms.base import AnswerForm
from coordexp.codec.forms.choose import form_of
from coordexp.codec.forms.json_form import JsonForm
from coordexp.config.api_key import api_key_from
from coordexp.config.schema.rollout import RolloutMatching
from coordexp.errors import ConfigError, CoordExpError, RolloutError
from coordexp.pictures import picture_bytes
from coordexp.rollout.backend import PolicyBackend
from coordexp.rollout.checks import (
    batch_name,
    encoding,
    name_of,
    refuse_stale,
    timed,
)
from coordexp.rollout.server.http_client import ServerClient
from coordexp.rollout.server.wire import Answer, WeightsReply
from coordexp.rollout.time_limit import TimeLimit, generate_limit
from coordexp.rollout.types import Rollout, RolloutRequest
from coordexp.rollout.weights.connection import send_to_all
from coordexp.rollout.weights.policy_model import fingerprint
from coordexp.rollout.weights.sync import (
    FoldModule,
    PushedWeights,
    as_it_is,
    differences,
    digest,
    has_own_head,
    policy_tensors,
    refuse_differences,
)
from coordexp.swift_bridge.generation_prompts import stop_token_ids

AFTERMATH_S = 10.0  # how long a server gets to say why a push broke off


class VllmClientBackend(PolicyBackend):
    """The training's side of rollout servers, which have at most `decode_batch_size` of its requests at a time.

    All ranks make one, and call `push_policy` together. Without a time limit for the call, each request has
    `infer_timeout_s` and `generate_timeout_s`. Closing hangs up; the servers go on, and the next training takes them
    over.

    `generate` may be called in a background thread while the model trains: it reads a few of the trained tensors to see
    that they are still those that were pushed, and nothing else of the model.

    Arguments:
        model: unwrapped model in training, PEFT or not.
        template: of the training run.
        dtype: that the engines must have.
        form: of the answers, which guided decoding keeps to; None: CoordJSON.
        fold: what modules of our own amount to in a plain model.
        offload: makes the context that generation runs in.

    token_logprobs: give log-probabilities of the answers; may be switched between calls.
    policy_checksum: digest of the weights that are served.

    Raises:
        ConfigError: an address that is none, or an API key that is not set.
        RolloutError: a server that does not answer within `vllm.server.timeout_s`.
    """

    name = "vllm"

    def __init__(
        self,
        settings: RolloutMatching,
        model: Any,
        template: Any,
        *,
        dtype: torch.dtype,
        form: AnswerForm | None = None,
        fold: FoldModule = as_it_is,
        offload: Callable[[], AbstractContextManager[None]] = nullcontext,
        token_logprobs: bool = False,
    ) -> None:
        super().__init__()
        servers, section = settings.vllm.server, f"{settings.where}.vllm.server"
        if servers is None:
            raise ConfigError(f"{section} is missing: mode: server needs the servers' addresses.")
        self.settings = settings
        self._section = section
        self.policy_checksum = ""
        self.token_logprobs = token_logprobs
        self._model = model
        self._form = form or form_of()
        self._fold = fold
        self._dtype = dtype
        self._offload = offload
        self._limits = template.pixel_limits
        self._stop_ids = stop_token_ids(template, model.generation_config.eos_token_id)
        self._announced: int | None = None
        self._served: int | None = None  # None after a push that failed
        self._session = ""
        self._pushed_fingerprint: tuple[int, ...] = ()
        self._spare_seeds = itertools.count()
        self._rank, self._distributed = _rank()
        key = api_key_from(f"{section}.api_key_env", servers.api_key_env)
        self._servers = [
            ServerClient(server, backend=self.name, api_key=key, timeout_s=servers.timeout_s, section=section)
            for server in servers.servers
        ]
        try:
            for server in self._servers:
                server.wait_until_healthy()
        except BaseException:
            self.close()
            raise

    # weights

    def _push(self, version: int) -> None:
        """Into all servers; a failure is raised on every rank."""
        self._announced, self._served = version, None
        failure: Exception | None = None
        outcome: Any = None
        try:
            if self._rank == 0:
                checksum = self._send(version)
                outcome = self._session, checksum
            else:
                self._gather_along()
        except Exception as error:  # noqa: BLE001 - raised below, once the other ranks have been told
            failure = error
        outcome = self._outcome_of_first_rank(outcome, failure)
        if failure is not None:
            raise failure
        if isinstance(outcome, str):
            raise RolloutError(outcome)
        self._session, self.policy_checksum = outcome
        self._pushed_fingerprint = fingerprint(self._model)
        self.policy_version = self._served = version

    def _gather_along(self) -> None:
        """Partitioned parameters are gathered by all ranks, though rank 0 alone sends them."""
        for _ in policy_tensors(self._model, self._fold):
            pass

    def _outcome_of_first_rank(self, outcome: Any, failure: Exception | None) -> Any:
        """(session, checksum) of rank 0, or the message of its failure."""
        box = [outcome if failure is None else f"{failure} (on rank 0)"]
        if self._distributed:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def _send(self, version: int) -> str:
        """Send the weights from this rank; returns their checksum."""
        weights = PushedWeights(policy_tensors(self._model, self._fold), self._dtype)
        stream = iter(weights)
        try:
            with self._open_servers():
                replies = self._transfer(stream, version)
                pushed = weights.checksums()
                checksum = digest(pushed)
                for server, reply in zip(self._servers, replies, strict=True):
                    _refuse_lost(server.url, version, pushed, reply)
                    found = differences(pushed, reply.held(), reply.engine_names)
                    refuse_differences(
                        found, backend=f"{self.name} ({server.url})", version=version, checksum=checksum
                    )
        finally:
            for _ in stream:  # other ranks gather partitioned parameters to the end, and wait for this one
                pass
        return checksum

    @contextmanager
    def _open_servers(self) -> Iterator[None]:
        """Every server is ours and has a connection; after a failure none, so that the next push starts anew."""
        try:
            if not all(server.is_connected for server in self._servers):
                self._session = secrets.token_hex(32)
                for server in self._servers:
                    server.hang_up()
                    server.open(
                        self._session,
                        own_head=has_own_head(self._model),
                        dtype=self._dtype,
                        device=self._device,
                    )
            yield
        except BaseException:
            for server in self._servers:
                server.hang_up()
            raise

    def _transfer(self, stream: Iterator[tuple[str, torch.Tensor]], version: int) -> list[WeightsReply]:
        """Send while the servers receive; what each engine holds afterwards."""
        pool = ThreadPoolExecutor(len(self._servers), thread_name_prefix="push")
        try:
            posts = [pool.submit(server.push, self._session, version) for server in self._servers]
            try:
                send_to_all([server.connect(self._session, self._device) for server in self._servers], stream)
            except RolloutError as error:
                for server in self._servers:
                    server.hang_up()
                raise _reason(posts) or RolloutError(
                    f"{self.name} backend: the push of policy version {version} broke off: {error}. Is the server "
                    "still running, and its group_port open in the firewall? Its own log says more."
                ) from error
            return [
                self._reply(server, post, version) for server, post in zip(self._servers, posts, strict=True)
            ]
        finally:
            pool.shutdown(wait=False)

    def _reply(self, server: ServerClient, post: Future[WeightsReply], version: int) -> WeightsReply:
        try:
            return post.result(server.timeout_s)
        except TimeoutError as error:
            raise RolloutError(
                f"{self.name} backend: {server.url} got policy version {version}, but did not serve it within "
                f"{server.timeout_s:g} s ({self._section}.timeout_s). Look into its log, or raise the "
                "limit."
            ) from error

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self._model.parameters()).device
        return device

    # answers

    @property
    def max_new_tokens(self) -> int:
        return self.settings.max_new_tokens

    def _answers(
        self, requests: Sequence[RolloutRequest], max_new_tokens: int, time_limit: TimeLimit | None
    ) -> list[Rollout]:
        refuse_stale(
            self.name,
            batch_name(requests),
            announced=self._announced,
            served=None if self._served is None else str(self._served),
            changed=fingerprint(self._model) != self._pushed_fingerprint,
        )
        if not requests:
            return []
        common = {
            "settings": self.settings.model_dump(mode="json"),
            "policy_version": self.policy_version,
            "session": self._session,
            "max_new_tokens": max_new_tokens,
            "logprobs": self.token_logprobs,
            "stop_token_ids": list(self._stop_ids),
            "answer_form": self._form.name,
            "field_order": self._form.field_order if isinstance(self._form, JsonForm) else "desc_first",
        }
        with self._offload(), timed() as seconds:
            answers = self._ask_all(common, requests, time_limit)
        return [_rollout(answer, seconds() / len(requests)) for answer in answers]

    def _ask_all(
        self, common: dict[str, Any], requests: Sequence[RolloutRequest], time_limit: TimeLimit | None
    ) -> list[Answer]:
        pool = ThreadPoolExecutor(self.settings.decode_batch_size, thread_name_prefix="ask")
        try:
            asked = [
                pool.submit(self._ask, common, request, index, time_limit)
                for index, request in enumerate(requests)
            ]
            return [future.result() for future in asked]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(
        self, common: dict[str, Any], request: RolloutRequest, index: int, time_limit: TimeLimit | None
    ) -> Answer:
        server = self._servers[(self._rank + index) % len(self._servers)]
        name = name_of(request, index)
        with encoding(self.name, name):
            files = [picture_bytes(image, fit=self._limits.fit)[0] for image in request.images]
        images = [base64.b64encode(file).decode("ascii") for file in files]
        question = {
            "messages": [dict(message) for message in request.messages],
            "images": images,
            "seed": next(self._spare_seeds) if request.seed is None else request.seed,
            "request_id": request.request_id,
        }
        limit = time_limit or self._limit_of_one()
        rollouts = server.generate({**common, "requests": [question]}, name, limit).rollouts
        if len(rollouts) != 1:
            raise RolloutError(f"{self.name} backend: {server.url} gave {len(rollouts)} answers to {name}.")
        return rollouts[0]

    def _limit_of_one(self) -> TimeLimit:
        servers = self.settings.vllm.server
        limits = [generate_limit(self.settings)]
        if servers is not None:
            limits.append(TimeLimit(servers.infer_timeout_s, f"{self._section}.infer_timeout_s"))
        return min(limits, key=lambda limit: float("inf") if limit.seconds is None else limit.seconds)

    def _release(self) -> None:
        for server in self._servers:
            server.close()


def _refuse_lost(url: str, version: int, pushed: Collection[str], reply: WeightsReply) -> None:
    lost = sorted(set(pushed) - reply.engine_names.keys())
    if lost:
        raise RolloutError(
            f"vllm backend ({url}): {len(lost)} of {len(pushed)} tensors of policy version {version} did not arrive "
            f"({', '.join(lost[:4])}). Do server and run have the same version of coordexp?"
        )


def _rollout(answer: Answer, seconds: float) -> Rollout:
    return Rollout(
        prompt_token_ids=tuple(answer.prompt_token_ids),
        response_token_ids=tuple(answer.response_token_ids),
        token_logprobs=tuple(answer.token_logprobs),
        finish_reason=answer.finish_reason,
        seconds=seconds,
        policy_version=answer.policy_version,
        repeat_terminated=answer.repeat_terminated,
    )


def _reason(posts: Sequence[Future[WeightsReply]]) -> BaseException | None:
    """Why a server broke a push off, if one says so in time."""
    for post in posts:
        try:
            error = post.exception(AFTERMATH_S)
        except TimeoutError:
            continue
        if isinstance(error, CoordExpError):
            return error
    return None


def _rank() -> tuple[int, bool]:
    """This process's rank, and whether there are others to tell."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size() > 1
    return 0, False
