"""Named tensors from a training process to a rollout server: over NCCL between CUDA devices, over TCP otherwise.

Both ends meet at a `TCPStore` that the server keeps. Tensors travel in buckets; for bucket n of a channel

    header/n   from the trainer   JSON: names, dtypes, shapes, places in the bucket; or "no more"; or why it gives up
    bytes/n    from the trainer   the bucket itself, without NCCL
    taken/n    from the server    it has used the bucket; the next one may come

Nothing is unpickled. There is no authentication: whoever reaches the port may read and write.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import DistError, TCPStore

from coordexp.errors import RolloutError

BUCKET_BYTES = 256 * 2**20
ALIGNMENT = 16  # bytes; a tensor starts at a multiple, so that the bucket can be viewed as its dtype
SERVER_RANK, TRAINER_RANK, WORLD_SIZE = 0, 1, 2
POLL_S = 0.001
NamedTensor = tuple[str, Tensor]


def listen(host: str, port: int) -> socket.socket:
    """The socket that the server's end of a channel takes over; OSError when the port is taken."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


class WeightChannel:
    """One end of a channel; the trainer's end sends, the server's end receives, any number of streams one by one.

    device: of the tensors; both ends have one of the same type.
    timeout_s: longest wait for the other end, at the start and at each bucket.

    After a RolloutError the channel is of no use any more: close it and make another.
    """

    def __init__(
        self, store: TCPStore, *, peer: str, rank: int, device: torch.device, timeout_s: float
    ) -> None:
        self._store: Any = store
        self._peer = peer
        self._rank = rank
        self._device = device
        self._timeout_s = timeout_s
        self._number = 0
        self._nccl: Any = None
        if device.type == "cuda":
            from coordexp.rollout.weights.nccl import communicator

            with self._failures("at the start of NCCL"):
                self._nccl = communicator(store, rank, WORLD_SIZE, device)

    @classmethod
    def serve(cls, listener: socket.socket, *, device: torch.device, timeout_s: float) -> WeightChannel:
        """The server's end; waits until a trainer has connected to `listener`, which it takes over."""
        host, port = listener.getsockname()
        descriptor = listener.detach()
        with _failures("the weight channel", "while waiting for the trainer to connect"):
            try:
                store = TCPStore(
                    host, port, WORLD_SIZE, is_master=True, timeout=timedelta(seconds=timeout_s),
                    master_listen_fd=descriptor, use_libuv=False,
                )  # fmt: skip
            except DistError:
                _close_if_open(descriptor)
                raise
        return cls(store, peer="the trainer", rank=SERVER_RANK, device=device, timeout_s=timeout_s)

    @classmethod
    def connect(cls, host: str, port: int, *, device: torch.device, timeout_s: float) -> WeightChannel:
        """The trainer's end."""
        peer = f"the server's weight port {host}:{port}"
        with _failures(peer, "while connecting"):
            store = _within(
                timeout_s,
                lambda: TCPStore(
                    host,
                    port,
                    WORLD_SIZE,
                    is_master=False,
                    timeout=timedelta(seconds=timeout_s),
                    use_libuv=False,
                ),
            )
        return cls(store, peer=peer, rank=TRAINER_RANK, device=device, timeout_s=timeout_s)

    def send(self, tensors: Iterable[NamedTensor]) -> None:
        """All of `tensors`; returns when the other end has used them."""
        send_to_all([self], tensors)

    def receive(self) -> Iterator[NamedTensor]:
        """What the other end sends, until its end. A tensor is valid only until the next one is asked for."""
        while True:
            with self._failures("while receiving"):
                header = json.loads(self._pop("header"))
            if "failed" in header:
                raise RolloutError(f"{self._peer} gave up: {header['failed']}")
            if header["end"]:
                self._confirm()
                return
            with self._failures("while receiving"):
                bucket = self._receive_bucket(header["num_bytes"])
            yield from _unpacked(bucket, header["tensors"])
            self._confirm()

    def close(self) -> None:
        """Let go of connection and port; a second call does nothing."""
        nccl, self._nccl, self._store = self._nccl, None, None
        if nccl is not None:
            nccl.destroy()

    # one bucket

    def post(self, header: dict[str, Any], bucket: Tensor | None) -> None:
        """Hand over header and bucket, uint8 [bytes]; `await_taken` comes before the next."""
        with self._failures("while sending"):
            self._store.set(self._key("header"), json.dumps(header).encode())
            if bucket is None:
                return
            if self._nccl is None:
                self._store.set(self._key("bytes"), bucket.cpu().numpy().tobytes())
            else:
                self._broadcast(bucket.to(self._device))

    def await_taken(self) -> None:
        """Wait until the other end has used what was posted."""
        with self._failures("while it takes in the weights"):
            self._pop("taken")
        self._number += 1

    def _receive_bucket(self, num_bytes: int) -> Tensor:
        if self._nccl is None:
            data = torch.frombuffer(bytearray(self._pop("bytes")), dtype=torch.uint8)
            return data.to(self._device)
        bucket = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        self._broadcast(bucket)
        return bucket

    def _broadcast(self, bucket: Tensor) -> None:
        """From the trainer's device to the server's; NCCL itself would wait for a dead peer for ever."""
        with torch.cuda.device(self._device):
            self._nccl.broadcast(bucket, src=TRAINER_RANK)
            done = torch.cuda.Event()
            done.record()
        end = time.monotonic() + self._timeout_s
        while not done.query():
            if time.monotonic() > end:
                raise TimeoutError(f"a bucket did not pass in {self._timeout_s:g} s")
            time.sleep(POLL_S)

    def _confirm(self) -> None:
        with self._failures("while receiving"):
            self._store.set(self._key("taken"), b"")
        self._number += 1

    def _pop(self, what: str) -> bytes:
        key = self._key(what)
        value: bytes = self._store.get(key)
        self._store.delete_key(key)
        return value

    def _key(self, what: str) -> str:
        return f"{what}/{self._number}"

    def _failures(self, when: str) -> Any:
        return _failures(self._peer, when)


def send_to_all(channels: Sequence[WeightChannel], tensors: Iterable[NamedTensor]) -> None:
    """The same stream to several servers, bucket by bucket. When `tensors` fails, the servers are told.

    A tensor is copied before the next one is asked for.

    Raises:
        RolloutError: a server is gone or does not take a bucket in time.
    """
    try:
        for header, bucket in _packed(tensors):
            _to_each(channels, header, bucket)
    except BaseException as error:
        for channel in channels:
            _give_up(channel, error)
        raise
    _to_each(channels, {"end": True}, None)


def _to_each(channels: Sequence[WeightChannel], header: dict[str, Any], bucket: Tensor | None) -> None:
    for channel in channels:
        channel.post(header, bucket)
    for channel in channels:
        channel.await_taken()


def _give_up(channel: WeightChannel, error: BaseException) -> None:
    """Tell the other end, where it can still be told."""
    try:
        channel.post({"failed": f"{type(error).__name__}: {error}"}, None)
    except RolloutError:
        channel.close()


def _packed(tensors: Iterable[NamedTensor]) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """(header, bucket) for as many tensors as go into `BUCKET_BYTES`; a larger tensor has a bucket of its own."""
    bucket: Tensor | None = None
    used, places = 0, []
    for name, tensor in tensors:
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        if bucket is not None and used + data.numel() > bucket.numel():
            yield _header(used, places), bucket[:used]
            bucket, used, places = None, 0, []
        if bucket is None:
            bucket = torch.empty(max(BUCKET_BYTES, data.numel()), dtype=torch.uint8, device=data.device)
        bucket[used : used + data.numel()].copy_(data)
        places.append(
            (name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), used, data.numel())
        )
        used = -(-(used + data.numel()) // ALIGNMENT) * ALIGNMENT
    if bucket is not None:
        used = min(used, bucket.numel())
        yield _header(used, places), bucket[:used]


def _header(num_bytes: int, places: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
    return {"end": False, "num_bytes": num_bytes, "tensors": places}


def _unpacked(bucket: Tensor, places: Sequence[Sequence[Any]]) -> Iterator[NamedTensor]:
    for name, dtype, shape, start, num_bytes in places:
        yield name, bucket[start : start + num_bytes].view(getattr(torch, dtype)).reshape(shape)


@contextmanager
def _failures(peer: str, when: str) -> Iterator[None]:
    """A lost connection or a wait that is too long becomes a RolloutError."""
    try:
        yield
    except (DistError, OSError, RuntimeError) as error:
        first_line = str(error).splitlines()[0] if str(error) else ""
        raise RolloutError(f"{peer} failed {when}: {type(error).__name__}: {first_line}") from error


def _within(seconds: float, make: Callable[[], TCPStore]) -> TCPStore:
    """`make()` with a limit: a store has none of its own for a server that accepts the connection and says nothing."""
    made: Future[TCPStore] = Future()

    def work() -> None:
        try:
            made.set_result(make())
        except Exception as error:  # noqa: BLE001 - raised by the caller
            made.set_exception(error)

    threading.Thread(target=work, name="connect", daemon=True).start()
    try:
        return made.result(seconds)
    except TimeoutError as error:
        raise TimeoutError(f"no answer in {seconds:g} s") from error


def _close_if_open(descriptor: int) -> None:
    try:
        socket.close(descriptor)
    except OSError:
        return  # the store had taken it over and closed it
