"""Named tensors between two processes: what arrives is what was sent, and a dead end is noticed."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import torch
from support.processes import free_port
from torch import Tensor

from coordexp.errors import RolloutError
from coordexp.rollout.weights import connection as weight_connection
from coordexp.rollout.weights import handshake
from coordexp.rollout.weights.connection import WeightConnection, listen, send_to_all
from coordexp.rollout.weights.handshake import NUM_BYTES, receive_exactly

CPU = torch.device("cpu")
SESSION = "the name of this training, as HTTP has told the server"
SMALL_BUCKET = 1000  # bytes
PATIENCE_S = 120.0  # a process takes its time to start on a busy machine; nothing here waits so long


def tensors(seed: int) -> list[tuple[str, Tensor]]:
    """Several buckets, odd sizes, a scalar, an empty one, a view, one larger than a bucket, three dtypes."""
    torch.manual_seed(seed)
    return [
        ("odd.bf16", torch.randn(7, 3).bfloat16()),
        ("scalar", torch.tensor(1.5)),
        ("empty", torch.empty(0, 4)),
        ("transposed", torch.randn(9, 11).T),
        ("large", torch.randn(40, 25)),
        ("half", torch.randn(5).half()),
        *[(f"layer.{index}", torch.randn(13, 5)) for index in range(9)],
    ]


def send_once(port: int) -> None:
    connection = WeightConnection.connect(
        "127.0.0.1", port, session=SESSION, device=CPU, timeout_s=PATIENCE_S
    )
    send_to_all([connection], tensors(0))
    connection.close()


def in_a_thread(target: Any, *arguments: Any) -> Any:
    thread = threading.Thread(target=target, args=arguments, daemon=True)
    thread.start()
    return thread


def in_a_process(target: Any, *arguments: Any) -> Any:
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def send_twice(port: int) -> None:
    weight_connection.BUCKET_BYTES = SMALL_BUCKET
    connection = WeightConnection.connect(
        "127.0.0.1", port, session=SESSION, device=CPU, timeout_s=PATIENCE_S
    )
    send_to_all([connection], tensors(0))
    send_to_all([connection], iter(tensors(1)))
    connection.close()


def send_and_die(port: int, has_started: Any) -> None:
    has_started.set()
    connection = WeightConnection.connect(
        "127.0.0.1", port, session=SESSION, device=CPU, timeout_s=PATIENCE_S
    )
    connection.post({"end": False, "num_bytes": 4, "tensors": []}, None)
    os._exit(1)


def send_and_fail(port: int) -> None:
    connection = WeightConnection.connect(
        "127.0.0.1", port, session=SESSION, device=CPU, timeout_s=PATIENCE_S
    )

    def failing() -> Iterator[tuple[str, Tensor]]:
        yield "first", torch.zeros(3)
        raise ValueError("no second tensor")

    with pytest.raises(ValueError, match="no second"):
        send_to_all([connection], failing())


def never_take(port: int, listens: Any) -> None:
    listener = listen("127.0.0.1", port)
    listens.set()
    connection = WeightConnection.serve(listener, session=SESSION, device=CPU, timeout_s=PATIENCE_S)
    next(connection.receive())
    os._exit(1)


def served(start: Any, target: Any, timeout_s: float = PATIENCE_S) -> tuple[WeightConnection, Any]:
    """The server's end here, with `target` at the other."""
    listener = listen("127.0.0.1", 0)
    other = start(target, listener.getsockname()[1])
    return WeightConnection.serve(listener, session=SESSION, device=CPU, timeout_s=timeout_s), other


def test_streams_arrive_in_order_bit_for_bit():
    connection, process = served(in_a_process, send_twice)
    for seed in (0, 1):
        # a received tensor is valid until the next one is asked for
        received = [(name, tensor.clone()) for name, tensor in connection.receive()]
        expected = tensors(seed)
        assert [name for name, _ in received] == [name for name, _ in expected]
        for (_, found), (_, wanted) in zip(received, expected, strict=True):
            assert found.dtype == wanted.dtype
            assert found.shape == wanted.shape
            assert torch.equal(found, wanted)
    process.join()
    assert process.exitcode == 0


def test_the_port_can_be_taken_again_by_the_next_connection():
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    for _ in range(2):
        other = in_a_thread(send_once, port)
        connection = WeightConnection.serve(listener, session=SESSION, device=CPU, timeout_s=PATIENCE_S)
        assert [name for name, _ in connection.receive()] == [name for name, _ in tensors(0)]
        other.join()
        connection.close()
        listener = listen("127.0.0.1", port)
    listener.close()


def test_a_taken_port_is_an_error():
    with listen("127.0.0.1", 0) as held, pytest.raises(OSError, match="in use"):
        listen("127.0.0.1", held.getsockname()[1])


def test_a_sender_that_died_does_not_hold_the_receiver():
    listener, has_started = listen("127.0.0.1", 0), multiprocessing.get_context("spawn").Event()
    process = in_a_process(send_and_die, listener.getsockname()[1], has_started)
    assert has_started.wait(PATIENCE_S)
    connection = WeightConnection.serve(listener, session=SESSION, device=CPU, timeout_s=5.0)
    process.join()
    started = time.monotonic()
    with pytest.raises(
        RolloutError, match="the trainer failed while receiving: ConnectionError: the connection was closed"
    ):
        list(connection.receive())
    assert time.monotonic() - started < PATIENCE_S / 2


def test_a_sender_that_fails_says_why():
    connection, other = served(in_a_thread, send_and_fail)
    with pytest.raises(RolloutError, match="the trainer gave up: ValueError: no second tensor"):
        list(connection.receive())
    other.join()


def test_nobody_connects():
    with pytest.raises(RolloutError, match="while waiting for the trainer to connect"):
        WeightConnection.serve(listen("127.0.0.1", 0), session=SESSION, device=CPU, timeout_s=1.0)


def test_a_port_that_takes_the_connection_and_says_nothing():
    with listen("127.0.0.1", 0) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(
            RolloutError, match=rf"weight port 127\.0\.0\.1:{port} failed while connecting: TimeoutError"
        ):
            WeightConnection.connect("127.0.0.1", port, session=SESSION, device=CPU, timeout_s=0.5)


# --- strangers ---


def guess_the_session(port: int) -> None:
    """Speaks the protocol, and would push a weight of its own."""
    connection = WeightConnection.connect(
        "127.0.0.1", port, session="a guess", device=CPU, timeout_s=PATIENCE_S
    )
    send_to_all([connection], [("odd.bf16", torch.full((7, 3), 9.0).bfloat16())])


def write_at_random(port: int) -> bytes:
    """Writes as much as a proof has, and more; returns what came back."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as connection:
        connection.sendall(bytes(range(200)))
        return received_until_the_end(connection)


def repeat_what_comes(port: int) -> bytes:
    """Sends the server's challenge back as challenge and proof."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as connection:
        challenge = connection.recv(NUM_BYTES)
        connection.sendall(challenge * 2)
        return challenge + received_until_the_end(connection)


def received_until_the_end(connection: socket.socket) -> bytes:
    data = b""
    with suppress(ConnectionResetError):
        while part := connection.recv(1000):
            data += part
    return data


def test_strangers_at_the_port_neither_send_nor_receive_nor_stop_the_training(caplog, monkeypatch):
    monkeypatch.setattr(handshake, "CANDIDATE_S", PATIENCE_S)
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
    with ThreadPoolExecutor(5) as pool, caplog.at_level(logging.WARNING):
        server = pool.submit(
            WeightConnection.serve, listener, session=SESSION, device=CPU, timeout_s=PATIENCE_S
        )
        for stranger in (write_at_random, repeat_what_comes):
            assert (
                len(pool.submit(stranger, port).result(PATIENCE_S)) == NUM_BYTES
            )  # the challenge, and no proof
        guess = pool.submit(guess_the_session, port)
        with pytest.raises(RolloutError, match=r"failed while connecting: UnprovenError: .*does not know"):
            guess.result(PATIENCE_S)
        assert not server.done()
        trainer = pool.submit(send_once, port)
        received = [(name, tensor.clone()) for name, tensor in server.result(PATIENCE_S).receive()]
        trainer.result(PATIENCE_S)
    for (name, found), (expected, wanted) in zip(received, tensors(0), strict=True):
        assert (name, torch.equal(found, wanted)) == (expected, True)
    assert caplog.text.count("connected to the weight port without knowing the session: refused") == 3
    with pytest.raises(ConnectionRefusedError):  # one training, and the port is closed again
        socket.create_connection(("127.0.0.1", port))
    for connection in silent:
        assert len(received_until_the_end(connection)) == NUM_BYTES
        connection.close()


def test_many_silent_strangers_do_not_use_the_server_up(monkeypatch):
    monkeypatch.setattr(handshake, "MAX_CANDIDATES", 4)
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    with ThreadPoolExecutor(2) as pool:
        server = pool.submit(
            WeightConnection.serve, listener, session=SESSION, device=CPU, timeout_s=PATIENCE_S
        )
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(9)]
        trainer = pool.submit(send_once, port)
        assert len(list(server.result(PATIENCE_S).receive())) == len(tensors(0))
        trainer.result(PATIENCE_S)
    for connection in silent:
        connection.close()


def test_a_silent_stranger_is_hung_up_on(monkeypatch):
    monkeypatch.setattr(handshake, "CANDIDATE_S", 0.2)
    listener = listen("127.0.0.1", 0)
    with ThreadPoolExecutor(1) as pool:
        server = pool.submit(WeightConnection.serve, listener, session=SESSION, device=CPU, timeout_s=3.0)
        with socket.create_connection(listener.getsockname(), PATIENCE_S) as silent:
            started = time.monotonic()
            assert len(received_until_the_end(silent)) == NUM_BYTES
            assert time.monotonic() - started < 2.5
        with pytest.raises(RolloutError, match="nobody who knows the session connected in 3 s"):
            server.result(PATIENCE_S)


def test_no_weights_go_to_a_server_that_does_not_know_the_session():
    """Somebody else listens where the server should: he sends a challenge, and cannot answer ours."""
    with listen("127.0.0.1", 0) as impostor, ThreadPoolExecutor(1) as pool:
        trainer = pool.submit(send_once, impostor.getsockname()[1])
        connection, _ = impostor.accept()
        with connection:
            connection.settimeout(PATIENCE_S)
            connection.sendall(bytes(NUM_BYTES))
            answer = receive_exactly(connection, 2 * NUM_BYTES)
            connection.sendall(answer[NUM_BYTES:])  # our own proof does not convince us
            with pytest.raises(RolloutError, match=r"UnprovenError: it does not know this session"):
                trainer.result(PATIENCE_S)
            assert received_until_the_end(connection) == b""


def test_a_receiver_that_died_is_noticed():
    port, listens = int(free_port()), multiprocessing.get_context("spawn").Event()
    process = in_a_process(never_take, port, listens)
    assert listens.wait(PATIENCE_S)
    connection = WeightConnection.connect(
        "127.0.0.1", port, session=SESSION, device=CPU, timeout_s=PATIENCE_S
    )
    started = time.monotonic()
    with pytest.raises(RolloutError, match=f"weight port 127.0.0.1:{port} failed while"):
        send_to_all([connection], tensors(0))
    assert time.monotonic() - started < PATIENCE_S / 2
    process.join()


def test_buckets_are_small_and_tensors_aligned(monkeypatch):
    monkeypatch.setattr(weight_connection, "BUCKET_BYTES", SMALL_BUCKET)
    large = 40 * 25 * 4
    packed = list(weight_connection._packed(tensors(0)))
    assert len(packed) > 3
    for header, bucket in packed:
        json.dumps(header)
        assert (
            bucket.numel() == header["num_bytes"] <= (large if len(header["tensors"]) == 1 else SMALL_BUCKET)
        )
        assert all(start % 16 == 0 for _, _, _, start, _ in header["tensors"])
