"""One rollout server as a training process sees it: every failure names its address and what to do."""

from __future__ import annotations

import time
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests
import torch
from pydantic import BaseModel, ValidationError

from coordexp.config.schema.rollout import VllmServer
from coordexp.errors import ConfigError, RolloutError
from coordexp.rollout.server.wire import (
    GENERATE,
    HEALTH,
    OPEN,
    STATUS_TOO_LATE,
    WEIGHTS,
    Answers,
    OpenBody,
    OpenReply,
    WeightsBody,
    WeightsReply,
)
from coordexp.rollout.time_limit import TimeLimit
from coordexp.rollout.weights.connection import WeightConnection

Reply = TypeVar("Reply", bound=BaseModel)
MAX_CONNECTIONS = 256
POLL_S = 0.5
HEALTH_TIMEOUT_S = 5.0
GRACE_S = 10.0  # what the server gets beyond a time limit to say itself that it is over


class ServerClient:
    """Calls to one server; may be used by several threads.

    Arguments:
        backend: what errors call the backend.
        api_key: None sends none.
        timeout_s: longest wait for the server to answer at start, and for its weight connection.
        section: what a run file calls the settings of its servers.

    Raises ConfigError for an address that is none.
    """

    def __init__(
        self, server: VllmServer, *, backend: str, api_key: str | None, timeout_s: float, section: str
    ) -> None:
        address = urlsplit(server.base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ConfigError(
                f"{section}.servers: base_url {server.base_url!r} is no address; write it as "
                "http://HOST:PORT."
            )
        self.url = server.base_url.rstrip("/")
        self._host = address.hostname
        self._group_port = server.group_port
        self._backend = backend
        self._section = section
        self.timeout_s = timeout_s
        self._connection: WeightConnection | None = None
        self._http = requests.Session()
        self._http.trust_env = False  # a proxy for the internet knows no rollout server
        for scheme in ("http://", "https://"):
            self._http.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=MAX_CONNECTIONS))
        if api_key is not None:
            self._http.headers["Authorization"] = f"Bearer {api_key}"

    def wait_until_healthy(self) -> None:
        """Raises RolloutError when the server does not answer in time or says that it is broken."""
        limit = TimeLimit(self.timeout_s, f"{self._section}.timeout_s")
        while True:
            try:
                response = self._http.get(self.url + HEALTH, timeout=HEALTH_TIMEOUT_S)
            except requests.RequestException as error:
                self._wait_on(limit, error)
                continue
            if response.status_code != 200:
                raise self._refusal("the health check", response)
            return

    def _wait_on(self, limit: TimeLimit, error: Exception) -> None:
        left = limit.left()
        if left is not None and left < POLL_S:
            raise RolloutError(
                f"{self._backend} backend: {self.url} did not answer within {limit.seconds:g} s ({limit.key}): "
                f"{type(error).__name__}. Start it with `coordexp rollout-server`, check base_url and the network, or "
                "raise the limit."
            ) from error
        time.sleep(POLL_S)

    # weights

    @property
    def is_connected(self) -> bool:
        """Does this process hold a weight connection to the server?"""
        return self._connection is not None

    def open(self, session: str, *, own_head: bool, dtype: torch.dtype, device: torch.device) -> None:
        """Take the server over; it listens at its weight port from here on.

        Raises:
            RolloutError: it refuses, cannot be reached, or its engine has another dtype or kind of device.
        """
        body = OpenBody(session=session, own_head=own_head, timeout_s=self.timeout_s)
        doing = "to be taken over"
        reply = self._post(OPEN, body.model_dump(), doing, OpenReply, self.timeout_s + GRACE_S)
        expected = str(dtype).removeprefix("torch.")
        if reply.dtype != expected:
            raise RolloutError(
                f"{self._backend} backend: {self.url} has an engine in {reply.dtype}, the run's torch_dtype is "
                f"{expected}. Restart the server with --dtype {expected}, or change torch_dtype."
            )
        if reply.device != device.type:
            raise RolloutError(
                f"{self._backend} backend: {self.url} generates on {reply.device}, the run trains on {device.type}; "
                "weights can be pushed only between devices of one kind."
            )
        if reply.group_port != self._group_port:
            raise RolloutError(
                f"{self._backend} backend: {self.url} takes weights at port {reply.group_port}, but its group_port in "
                f"{self._section}.servers is {self._group_port}; make the two equal."
            )

    def connect(self, session: str, device: torch.device) -> WeightConnection:
        """The connection to send weights by, while the server waits for them (`push`).

        Raises:
            RolloutError: no connection in time, or to somebody who does not know `session`.
        """
        if self._connection is None:
            self._connection = WeightConnection.connect(
                self._host, self._group_port, session=session, device=device, timeout_s=self.timeout_s
            )
        return self._connection

    def push(self, session: str, version: int) -> WeightsReply:
        """Ask the server to take what comes over the connection meanwhile; call it in a thread of its own."""
        body = WeightsBody(session=session, policy_version=version)
        return self._post(
            WEIGHTS, body.model_dump(), f"the push of policy version {version}", WeightsReply, None
        )

    def hang_up(self) -> None:
        """The next push opens another; the server keeps what it has."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    # answers

    def generate(self, body: dict[str, Any], name: str, limit: TimeLimit) -> Answers:
        """`body`: JSON of a `GenerateBody`; its time limit is set here.

        Raises:
            RolloutError: the server refuses, fails, or takes longer than `limit`.
        """
        limit.check(self._backend, name)
        left = limit.left()
        timeout = None if left is None else left + GRACE_S
        try:
            return self._post(GENERATE, body | {"time_limit_s": left}, name, Answers, timeout)
        except _TooLateError as error:
            raise limit.exceeded(f"{self._backend} backend: {self.url}: {name}") from error

    def close(self) -> None:
        """Hang up."""
        self.hang_up()
        self._http.close()

    # HTTP

    def _post(
        self, path: str, body: dict[str, Any], doing: str, reply: type[Reply], timeout_s: float | None
    ) -> Reply:
        try:
            response = self._http.post(self.url + path, json=body, timeout=(self.timeout_s, timeout_s))
        except requests.ReadTimeout as error:
            raise _TooLateError(
                f"{self._backend} backend: {self.url} did not answer {doing} within {timeout_s} s."
            ) from error
        except requests.RequestException as error:
            raise RolloutError(
                f"{self._backend} backend: {self.url} was lost at {doing}: {type(error).__name__}: {error}. Is the "
                "server still running? Its own log says why it stopped."
            ) from error
        if response.status_code == STATUS_TOO_LATE:
            raise _TooLateError(str(self._refusal(doing, response)))
        if response.status_code != 200:
            raise self._refusal(doing, response)
        try:
            return reply.model_validate_json(response.content)
        except ValidationError as error:
            raise RolloutError(
                f"{self._backend} backend: {self.url} gave no valid answer to {doing}: {error.errors()[0]['msg']}. Do "
                "server and run have the same version of coordexp?"
            ) from error

    def _refusal(self, doing: str, response: requests.Response) -> RolloutError:
        try:
            sentence = str(response.json()["error"])
        except (ValueError, KeyError, TypeError):
            sentence = f"{response.text[:200]!r}. Is this a server started by `coordexp rollout-server`?"
        sentence = sentence.removeprefix(f"{self._backend} backend: ")
        advice = ""
        if response.status_code == 401:
            advice = f" Set {self._section}.api_key_env to the variable that holds the server's key."
        return RolloutError(
            f"{self._backend} backend: {self.url} answered {response.status_code} to {doing}: {sentence}{advice}"
        )


class _TooLateError(RolloutError):
    """No answer in time."""
