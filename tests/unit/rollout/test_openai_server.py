"""Answers of an OpenAI-compatible server: what is asked, and how token ids are won from what comes back."""

from __future__ import annotations

import base64
import io
import json
import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from openai.types.chat import ChatCompletionTokenLogprob
from PIL import Image

from coordexp.codec.parse import parse_rollout
from coordexp.codec.schema import BoxObject
from coordexp.codec.serialize import serialize
from coordexp.errors import RolloutError
from coordexp.models.tiny_tokenizer import train_tiny_tokenizer
from coordexp.rollout.backends.openai_client import OpenAiBackend, chat_messages
from coordexp.rollout.types import RolloutRequest
from coordexp.swift_bridge.generation_prompts import encode_question, questions_template

VLLM_FIELDS = ("return_token_ids", "return_tokens_as_token_ids", "skip_special_tokens")


def answer_of(image: bytes) -> str:
    """What the server's model writes about an image: one box at the bin of its first pixel's red."""
    red = Image.open(io.BytesIO(image)).getpixel((0, 0))[0]
    return serialize([BoxObject("müsli box", "bbox_2d", (red, 2, 300, 400))])


def write_picture(path: Path, red: int) -> Path:
    Image.new("RGB", (8, 8), (red, 0, 0)).save(path)
    return path


class ChatServer(ThreadingHTTPServer):
    """A chat-completions server whose answers have the fields that `kind` says."""

    def __init__(self, tokenizer, kind: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokenizer = tokenizer
        self.kind = kind
        self.prompts: Iterator[list[int]] | None = (
            None  # tokens that the model is said to have seen, by request
        )
        self.asked: list[dict] = []
        self.keys: list[str | None] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def reply(self, body: dict) -> tuple[int, dict]:
        if self.kind == "broken":
            return 404, {"error": {"message": "no such model"}}
        if self.kind == "plain" and any(field in body for field in VLLM_FIELDS):
            return 400, {"error": {"message": f"Unrecognized request argument: {VLLM_FIELDS[0]}"}}
        [message] = body["messages"]
        [image] = [part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url"]
        text = answer_of(base64.b64decode(image.partition(",")[2]))
        ids = self.tokenizer.encode(text + "<|im_end|>", add_special_tokens=False)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        answer = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [choice],
        }
        if self.kind in ("token_ids", "logprob_ids"):
            tokens = [
                {"token": f"token_id:{i}", "logprob": -0.01 * n, "top_logprobs": []}
                for n, i in enumerate(ids)
            ]
            choice["logprobs"] = {"content": tokens}
        if self.kind == "token_ids":
            choice["token_ids"] = ids
            answer["prompt_token_ids"] = [5, 6, 7] if self.prompts is None else next(self.prompts)
        if self.kind == "other_tokens":  # of a vocabulary that is not ours
            choice["logprobs"] = {"content": [{"token": text, "logprob": -1.0, "top_logprobs": []}]}
        return 200, answer


class Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self.server.keys.append(self.headers.get("Authorization"))
        status, reply = self.server.reply(body)
        payload = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args) -> None:
        """Keep quiet."""


@pytest.fixture(scope="module")
def tokenizer():
    return train_tiny_tokenizer()


@pytest.fixture
def requests(tmp_path) -> list[RolloutRequest]:
    """Three questions about pictures of different colours."""
    message = {"role": "user", "content": "<image>Find all objects."}
    return [
        RolloutRequest((message,), (str(write_picture(tmp_path / f"{number}.png", 10 * number)),))
        for number in range(3)
    ]


@pytest.fixture
def serve(tokenizer):
    servers = []

    def start(kind: str) -> tuple[ChatServer, OpenAiBackend]:
        servers.append(ChatServer(tokenizer, kind))
        backend = OpenAiBackend(
            servers[-1].url, "tiny", tokenizer, max_new_tokens=64, batch_size=2, api_key="secret"
        )
        return servers[-1], backend

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("kind", "has_logprobs", "retokenized"),
    [
        ("token_ids", True, False),
        ("logprob_ids", True, False),
        ("other_tokens", False, True),
        ("plain", False, True),
    ],
)
def test_token_ids_come_back_in_order(serve, tokenizer, requests, kind, has_logprobs, retokenized):
    _, backend = serve(kind)
    rollouts = backend.generate(requests)
    for number, rollout in enumerate(rollouts):
        image = Path(requests[number].images[0]).read_bytes()
        expected = tokenizer.encode(answer_of(image) + "<|im_end|>", add_special_tokens=False)
        assert list(rollout.response_token_ids) == expected
        [found] = parse_rollout(rollout.response_token_ids, tokenizer).objects
        assert found.as_box() == BoxObject("müsli box", "bbox_2d", (10 * number, 2, 300, 400))
        assert rollout.retokenized is retokenized
        assert rollout.finish_reason == "stop"
        assert rollout.prompt_token_ids == ((5, 6, 7) if kind == "token_ids" else ())
        logprobs = [-0.01 * n for n in range(len(expected))] if has_logprobs else []
        assert list(rollout.token_logprobs) == pytest.approx(logprobs)


def test_tokens_of_our_vocabulary_keep_their_log_probabilities(serve, tokenizer):
    """A server that names tokens as text: each is looked up, and must be spelled exactly so."""
    backend = serve("plain")[1]

    def token_id(text: str) -> int | None:
        return backend._token_id(ChatCompletionTokenLogprob(token=text, logprob=-1.0, top_logprobs=[]))

    coord_id = tokenizer.convert_tokens_to_ids("<|coord_7|>")
    assert token_id("<|coord_7|>") == coord_id
    assert token_id("token_id:12") == 12
    assert token_id("no such token in there") is None


def test_what_is_asked(serve, requests):
    server, backend = serve("token_ids")
    backend.generate(requests[:1])
    [body], [key] = server.asked, server.keys
    assert (body["model"], body["temperature"], body["max_tokens"], body["logprobs"]) == (
        "tiny",
        0.0,
        64,
        True,
    )
    assert all(field in body for field in VLLM_FIELDS)
    assert key == "Bearer secret"
    [message] = body["messages"]
    file = base64.b64encode(Path(requests[0].images[0]).read_bytes()).decode()
    assert message["content"][0]["image_url"]["url"] == f"data:image/png;base64,{file}"
    assert message["content"][1] == {"type": "text", "text": "Find all objects."}


def test_images_stand_where_the_placeholders_stood(tmp_path):
    files = [write_picture(tmp_path / f"{red}.png", red) for red in (10, 20)]
    message = {"role": "user", "content": "left <image> right <image>"}
    [asked] = chat_messages(RolloutRequest((message,), tuple(map(str, files))), None)
    assert [part["type"] for part in asked["content"]] == ["text", "image_url", "text", "image_url"]
    assert asked["content"][3]["image_url"]["url"].endswith(base64.b64encode(files[1].read_bytes()).decode())


def test_a_server_that_refuses_is_named(serve, requests):
    server, backend = serve("broken")
    with pytest.raises(
        RolloutError, match=rf"{server.url}: request 0 was not answered: NotFoundError.*'tiny'"
    ):
        backend.generate(requests[:1])


def test_a_missing_image_is_named(serve, requests):
    Path(requests[0].images[0]).unlink()
    with pytest.raises(RolloutError, match=r"request 0 cannot be encoded: image .*0\.png does not exist"):
        serve("token_ids")[1].generate(requests[:1])


@pytest.fixture
def compared(policy, requests):
    """A server, a backend that holds it to the checkpoint's template, and the prompts of that template."""
    servers = []

    def start(kind: str = "token_ids") -> tuple[ChatServer, OpenAiBackend]:
        servers.append(ChatServer(policy.template.tokenizer, kind))
        options = {"max_new_tokens": 64, "batch_size": 1, "template": policy.template}
        return servers[-1], OpenAiBackend(servers[-1].url, "tiny", policy.template.tokenizer, **options)

    questions = questions_template(policy.template, None)
    prompts = [list(encode_question(questions, r.messages, r.images)["input_ids"]) for r in requests]
    yield start, prompts
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_server_with_the_prompt_of_the_checkpoint_passes(compared, requests):
    start, prompts = compared
    server, backend = start()
    server.prompts = iter(prompts)
    assert [list(rollout.prompt_token_ids) for rollout in backend.generate(requests)] == prompts


@pytest.mark.parametrize("first_differs", [True, False])
def test_a_server_that_writes_another_prompt_is_an_error_with_both_texts(
    compared, requests, policy, first_differs
):
    """Such as one whose chat template puts a system message in front of every conversation."""
    start, prompts = compared
    server, backend = start()
    added = policy.template.tokenizer.encode(
        "<|im_start|>system\nBe kind.<|im_end|>\n", add_special_tokens=False
    )
    wrong = [
        added + prompt if first_differs or index == 2 else prompt for index, prompt in enumerate(prompts)
    ]
    server.prompts = iter(wrong)
    with pytest.raises(RolloutError) as caught:
        backend.generate(requests)
    said = str(caught.value)
    name = f"the prompt of request {0 if first_differs else 2} has"
    assert said.startswith(f"openai ({server.url}) backend: {name}")
    text = "<|im_start|>user\\n<|vision_start|><|image_pad|><|vision_end|>Find all objects.<|im_end|>"
    assert f"The engine: '<|im_start|>system\\nBe kind.<|im_end|>\\n{text}" in said
    assert f"The template: '{text}" in said


def test_a_picture_of_another_size_is_an_error(compared, requests, policy):
    """Too many visual tokens in the first prompt: the server scales pictures by limits of its own."""
    start, prompts = compared
    server, backend = start()
    image = policy.template.image_token_id
    at = prompts[0].index(image)
    server.prompts = iter([prompts[0][:at] + [image] * 3 + prompts[0][at:]])
    with pytest.raises(
        RolloutError, match=rf"has {len(prompts[0]) + 3} tokens in the engine, .* {len(prompts[0])};"
    ):
        backend.generate(requests[:1])


def test_each_conversation_is_compared(compared, requests):
    start, prompts = compared
    server, backend = start()
    other = replace(requests[1], messages=({"role": "user", "content": "<image>Find cats."},))
    server.prompts = iter([prompts[0], prompts[1]])
    with pytest.raises(RolloutError, match=r"The template: '.*Find cats\."):
        backend.generate([requests[0], other])


def test_a_server_that_does_not_say_what_it_was_asked_is_told_once(compared, requests, caplog):
    start, _ = compared
    _, backend = start("logprob_ids")
    with caplog.at_level(logging.WARNING, logger="coordexp"):
        backend.generate(requests)
        backend.generate(requests)
    assert [
        r.getMessage().split(" does not say")[0] for r in caplog.records if "does not say" in r.getMessage()
    ] == [backend.base_url]
