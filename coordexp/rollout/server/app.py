"""The HTTP side of a rollout server: who may ask, and which status an error has. Errors are `{"error": sentence}`."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from anyio.to_thread import current_default_thread_limiter
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from coordexp.errors import RolloutError
from coordexp.rollout.server.served_engine import ServedEngine
from coordexp.rollout.server.wire import (
    GENERATE,
    HEALTH,
    OPEN,
    STATUS_BAD_REQUEST,
    STATUS_CONFLICT,
    STATUS_TOO_LATE,
    WEIGHTS,
    Answers,
    ConflictError,
    GenerateBody,
    OpenBody,
    OpenReply,
    TooLateError,
    WeightsBody,
    WeightsReply,
)
from coordexp.rollout.types import RequestError

MAX_HANDLERS = 1024  # calls that may wait for answers at once, over all training ranks


def create_app(policy: ServedEngine, *, api_key: str | None) -> FastAPI:
    """The application; it closes `policy` at its end.

    api_key: what callers must give as a bearer token, `/health` excepted; None lets everybody ask.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        current_default_thread_limiter().total_tokens = MAX_HANDLERS
        yield
        policy.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    _add_error_handlers(app, policy)
    guarded = [Depends(_key_check(api_key))]

    @app.get(HEALTH)
    async def health() -> Any:
        if policy.failure is not None:
            return _error(503, policy.failure)
        return {"status": "ok", "model": policy.model_dir, "policy_version": policy.policy_version}

    @app.post(OPEN, dependencies=guarded)
    def take_over(body: OpenBody) -> OpenReply:
        return policy.open(body)

    @app.post(WEIGHTS, dependencies=guarded)
    def push(body: WeightsBody) -> WeightsReply:
        return policy.push(body)

    @app.post(GENERATE, dependencies=guarded)
    def generate(body: GenerateBody) -> Answers:
        return Answers(rollouts=policy.generate(body))

    return app


def _key_check(api_key: str | None) -> Any:
    def check(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if api_key is not None and not secrets.compare_digest(given.encode(), f"Bearer {api_key}".encode()):
            raise HTTPException(
                401, "the API key is missing or wrong; send it as `Authorization: Bearer KEY`."
            )

    return check


def _error(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"error": sentence}, status)


def _add_error_handlers(app: FastAPI, policy: ServedEngine) -> None:
    @app.exception_handler(RolloutError)
    async def rollout_error(request: Request, error: RolloutError) -> JSONResponse:
        if isinstance(error, RequestError):
            return _error(STATUS_BAD_REQUEST, str(error))
        if isinstance(error, ConflictError):
            return _error(STATUS_CONFLICT, str(error))
        if isinstance(error, TooLateError):
            return _error(STATUS_TOO_LATE, str(error))
        return _error(500 if policy.failure is None else 503, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        problems = (f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors())
        return _error(422, "; ".join(problems))

    @app.exception_handler(StarletteHTTPException)
    async def refused(request: Request, error: StarletteHTTPException) -> JSONResponse:
        return _error(error.status_code, error.detail)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return _error(500, f"{type(error).__name__}: {error}. The log of the server has more.")
