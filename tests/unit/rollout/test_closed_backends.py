"""A closed backend answers nothing and says so; closing twice is closing once."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from coordexp.config.schema.rollout import RolloutMatching
from coordexp.errors import RolloutError
from coordexp.rollout.backend import PolicyBackend, RolloutBackend
from coordexp.rollout.backends.hf import HfBackend
from coordexp.rollout.backends.openai_client import OpenAiBackend
from coordexp.rollout.backends.vllm_client import VllmClientBackend


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        payload = json.dumps({"status": "ok"}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args: object) -> None:
        """Keep quiet."""


@pytest.fixture
def address() -> Iterator[str]:
    """Of a rollout server as far as its health check goes."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def hf(policy: Any, address: str) -> RolloutBackend:
    return HfBackend(RolloutMatching(backend="hf", max_new_tokens=2), policy.model, policy.template)


def openai(policy: Any, address: str) -> RolloutBackend:
    return OpenAiBackend(address, "tiny", policy.template.tokenizer)


def client(policy: Any, address: str) -> RolloutBackend:
    servers = {"mode": "server", "server": {"servers": [{"base_url": address}]}}
    settings = RolloutMatching(backend="vllm", vllm=servers)
    return VllmClientBackend(settings, policy.model, policy.template, dtype=torch.float32)


@pytest.mark.parametrize("make", [hf, openai, client])
def test_a_closed_backend_refuses_and_closes_once(
    policy, requests, address: str, make: Callable[..., RolloutBackend], monkeypatch
):
    backend = make(policy, address)
    released: list[bool] = []
    release = backend._release
    monkeypatch.setattr(backend, "_release", lambda: (released.append(True), release()))
    backend.close()
    backend.close()
    assert released == [True]
    says = f"{backend.name} backend: 2 requests .*val:0 to request val:1.* came after the backend was closed"
    with pytest.raises(RolloutError, match=says):
        backend.generate(requests[:2])
    if isinstance(backend, PolicyBackend):
        with pytest.raises(
            RolloutError, match="the push of policy version 3 came after the backend was closed"
        ):
            backend.push_policy(3)
        assert backend.policy_version == 0


def test_a_server_that_says_it_is_broken_leaves_no_connection_open(policy, monkeypatch):
    closed: list[str] = []

    class Broken(Healthy):
        def do_GET(self) -> None:
            self.send_error(503, "the engine failed")

    monkeypatch.setattr(
        VllmClientBackend, "_release", lambda self: closed.extend(s.url for s in self._servers)
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), Broken) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(RolloutError, match="answered 503 to the health check"):
            client(policy, address)
        server.shutdown()
    assert closed == [address]
