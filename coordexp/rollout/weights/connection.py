"""Named tensors from a training process to a rollout server: over NCCL between CUDA devices, over TCP otherwise.

The server listens, and takes the one connection that proves to know the session (`handshake`). Over it go buckets of
tensors, each a frame and its answer:

    length, header, bytes   from the trainer   header is JSON: names, dtypes, shapes, places in the bucket; or "no
                                               more"; or why it gives up. The bytes follow, unless NCCL carries them
    one byte                from the server    it has used the bucket; the next one may come

Nothing is unpickled, and nothing is encrypted: whoever can read the network can read the weights.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from coordexp.errors import RolloutError
from coordexp.rollout.weights.handshake import accept_trainer, greet_server, receive_exactly, receive_into

BUCKET_BYTES = 256 * 2**20
ALIGNMENT = 16  # bytes; a tensor starts at a multiple, so that the bucket can be viewed as its dtype
SERVER_RANK, TRAINER_RANK, WORLD_SIZE = 0, 1, 2
POLL_S = 0.001
_LENGTH = struct.Struct(">Q")
_TAKEN = b"\1"
NamedTensor = tuple[str, Tensor]


def listen(host: str, port: int) -> socket.socket:
    """The socket that the server's end of a connection takes over; OSError when the port is taken."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


class WeightConnection:
    """One end; the trainer's sends (`send_to_all`), the server's receives, any number of streams one by one.

    device: of the tensors; both ends have one of the same type.
    timeout_s: longest wait for the other end, at the start and at each bucket.

    After a RolloutError the connection is of no use any more: close it and make another.
    """

    def __init__(
        self, sock: socket.socket, *, peer: str, rank: int, device: torch.device, timeout_s: float
    ) -> None:
        sock.settimeout(timeout_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self._peer = peer
        self._device = device
        self._timeout_s = timeout_s
        self._nccl: Any = None
        if device.type == "cuda":
            with self._failures("at the start of NCCL"):
                self._nccl = _communicator(sock, rank, device)

    @classmethod
    def serve(
        cls, listener: socket.socket, *, session: str, device: torch.device, timeout_s: float
    ) -> WeightConnection:
        """The server's end; waits until a trainer that knows `session` has connected to `listener`, and closes that."""
        with _failures("the weight connection", "while waiting for the trainer to connect"):
            sock = accept_trainer(listener, session, timeout_s)
        return cls(sock, peer="the trainer", rank=SERVER_RANK, device=device, timeout_s=timeout_s)

    @classmethod
    def connect(
        cls, host: str, port: int, *, session: str, device: torch.device, timeout_s: float
    ) -> WeightConnection:
        """The trainer's end. Nothing is sent to a server that does not know `session`."""
        peer = f"the server's weight port {host}:{port}"
        with _failures(peer, "while connecting"):
            sock = socket.create_connection((host, port), timeout_s)
            try:
                greet_server(sock, session)
            except OSError:
                sock.close()
                raise
        return cls(sock, peer=peer, rank=TRAINER_RANK, device=device, timeout_s=timeout_s)

    def receive(self) -> Iterator[NamedTensor]:
        """What the other end sends, until its end. A tensor is valid only until the next one is asked for."""
        while True:
            with self._failures("while receiving"):
                (length,) = _LENGTH.unpack(receive_exactly(self._socket, _LENGTH.size))
                header = json.loads(receive_exactly(self._socket, length))
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
        """Hang up; a second call does nothing."""
        nccl, self._nccl = self._nccl, None
        if nccl is not None:
            nccl.destroy()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # whoever waits at either end is told
        self._socket.close()

    # one bucket

    def post(self, header: dict[str, Any], bucket: Tensor | None) -> None:
        """Hand over header and bucket, uint8 [bytes]; `await_taken` comes before the next."""
        text = json.dumps(header).encode()
        with self._failures("while sending"):
            self._socket.sendall(_LENGTH.pack(len(text)) + text)
            if bucket is None:
                return
            if self._nccl is None:
                self._socket.sendall(_bytes_of(bucket.cpu()))
            else:
                self._broadcast(bucket.to(self._device))

    def await_taken(self) -> None:
        """Wait until the other end has used what was posted."""
        with self._failures("while it takes in the weights"):
            receive_exactly(self._socket, len(_TAKEN))

    def _receive_bucket(self, num_bytes: int) -> Tensor:
        if self._nccl is None:
            data = torch.empty(num_bytes, dtype=torch.uint8)
            receive_into(self._socket, _bytes_of(data))
            return data.to(self._device)
        bucket = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        self._broadcast(bucket)
        return bucket

    def _broadcast(self, bucket: Tensor) -> None:
        """From the trainer's device to the server's; NCCL itself would wait for a dead peer for ever."""
        with torch.cuda.device(self._device):
            self._nccl.broadcast(bucket, src=TRAINER_RANK)
            done: Any = torch.cuda.Event()
            done.record()
        end = time.monotonic() + self._timeout_s
        while not done.query():
            if time.monotonic() > end:
                raise TimeoutError(f"a bucket did not pass in {self._timeout_s:g} s")
            time.sleep(POLL_S)

    def _confirm(self) -> None:
        with self._failures("while receiving"):
            self._socket.sendall(_TAKEN)

    def _failures(self, when: str) -> Any:
        return _failures(self._peer, when)


def _communicator(sock: socket.socket, rank: int, device: torch.device) -> Any:
    """NCCL between the two ends; the server makes its id."""
    from coordexp.rollout.weights.nccl import ID_BYTES, communicator, unique_id

    if rank == SERVER_RANK:
        nccl_id = unique_id()
        sock.sendall(nccl_id)
    else:
        nccl_id = receive_exactly(sock, ID_BYTES)
    return communicator(nccl_id, rank, WORLD_SIZE, device)


def send_to_all(connections: Sequence[WeightConnection], tensors: Iterable[NamedTensor]) -> None:
    """The same stream to several servers, bucket by bucket. When `tensors` fails, the servers are told.

    A tensor is copied before the next one is asked for.

    Raises:
        RolloutError: a server is gone or does not take a bucket in time.
    """
    try:
        for header, bucket in _packed(tensors):
            _to_each(connections, header, bucket)
    except BaseException as error:
        for connection in connections:
            _give_up(connection, error)
        raise
    _to_each(connections, {"end": True}, None)


def _to_each(connections: Sequence[WeightConnection], header: dict[str, Any], bucket: Tensor | None) -> None:
    for connection in connections:
        connection.post(header, bucket)
    for connection in connections:
        connection.await_taken()


def _give_up(connection: WeightConnection, error: BaseException) -> None:
    """Tell the other end, where it can still be told."""
    try:
        connection.post({"failed": f"{type(error).__name__}: {error}"}, None)
    except RolloutError:
        connection.close()


def _packed(tensors: Iterable[NamedTensor]) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """(header, bucket) for as many tensors as go into `BUCKET_BYTES`; a larger tensor has a bucket of its own."""
    bucket: Tensor | None = None
    used = 0
    places: list[tuple[Any, ...]] = []
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


def _bytes_of(bucket: Tensor) -> memoryview:
    """The memory of a uint8 tensor on the CPU, shared with it."""
    memory: Any = bucket.numpy()
    return memoryview(memory)


@contextmanager
def _failures(peer: str, when: str) -> Iterator[None]:
    """A lost connection or a wait that is too long becomes a RolloutError."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        first_line = str(error).splitlines()[0] if str(error) else ""
        raise RolloutError(f"{peer} failed {when}: {type(error).__name__}: {first_line}") from error
