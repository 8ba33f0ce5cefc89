"""Who is at the other end of the weight port? Both ends prove that they know the session, and neither says it.

The session is a secret of the training process, which the server learns over HTTP from whoever holds its key:

    server  -> trainer   32 random bytes s
    trainer -> server    32 random bytes t, HMAC-SHA256(session, "trainer" s t)
    server  -> trainer   HMAC-SHA256(session, "server" s t)

Whoever cannot prove it is hung up on, and the server waits on; nothing else is read from or sent to him.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import selectors
import socket
import time
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

NUM_BYTES = 32  # of a challenge, and of a proof
CANDIDATE_S = 10.0  # for a proof, once connected
MAX_CANDIDATES = 64  # at a time; the oldest goes


class UnprovenError(OSError):
    """The other end does not know the session."""


def greet_server(connection: socket.socket, session: str) -> None:
    """The trainer's part, on a connection with a timeout.

    Raises UnprovenError when the other end hangs up or proves nothing, OSError when it is lost or says nothing.
    """
    theirs, ours = receive_exactly(connection, NUM_BYTES), secrets.token_bytes(NUM_BYTES)
    connection.sendall(ours + _proof(session, b"trainer", theirs, ours))
    try:
        proof = receive_exactly(connection, NUM_BYTES)
    except ConnectionError as error:
        raise UnprovenError("it hung up: it does not know this session") from error
    if not hmac.compare_digest(proof, _proof(session, b"server", theirs, ours)):
        raise UnprovenError("it does not know this session; is it the rollout server?")


def accept_trainer(listener: socket.socket, session: str, timeout_s: float) -> socket.socket:
    """The first connection to `listener` that proves to know the session; blocking. Closes `listener`.

    Raises TimeoutError when there is none in time.
    """
    end = time.monotonic() + timeout_s
    listener.setblocking(False)
    candidates: dict[socket.socket, _Candidate] = {}
    with listener, selectors.DefaultSelector() as waiting:
        waiting.register(listener, selectors.EVENT_READ)
        try:
            while (left := end - time.monotonic()) > 0:
                for key, _ in waiting.select(min(left, 1.0)):
                    if key.fileobj is listener:
                        _admit(listener, candidates, waiting)
                        continue
                    candidate: _Candidate = key.data
                    if candidate.read() and candidate.knows(session):
                        del candidates[candidate.connection]
                        return candidate.connection
                for candidate in [c for c in candidates.values() if c.is_over()]:
                    candidate.hang_up(waiting)
                    del candidates[candidate.connection]
        finally:
            for candidate in candidates.values():
                candidate.connection.close()
    raise TimeoutError(f"nobody who knows the session connected in {timeout_s:g} s")


@dataclass
class _Candidate:
    """A connection that has proved nothing yet."""

    connection: socket.socket
    address: str
    challenge: bytes = field(default_factory=lambda: secrets.token_bytes(NUM_BYTES))
    answer: bytes = b""
    is_lost: bool = False
    since: float = field(default_factory=time.monotonic)

    def read(self) -> bool:
        """Take in what has come; is it all?"""
        try:
            part = self.connection.recv(2 * NUM_BYTES - len(self.answer))
        except BlockingIOError:
            return False
        except OSError:
            part = b""
        self.answer += part
        self.is_lost = not part
        return len(self.answer) == 2 * NUM_BYTES

    def knows(self, session: str) -> bool:
        """Check the proof, and give ours for it."""
        theirs, proof = self.answer[:NUM_BYTES], self.answer[NUM_BYTES:]
        if not hmac.compare_digest(proof, _proof(session, b"trainer", self.challenge, theirs)):
            self.is_lost = True
            return False
        self.connection.sendall(_proof(session, b"server", self.challenge, theirs))
        self.connection.setblocking(True)
        return True

    def is_over(self) -> bool:
        return self.is_lost or time.monotonic() - self.since > CANDIDATE_S

    def hang_up(self, waiting: selectors.BaseSelector) -> None:
        logger.warning("%s connected to the weight port without knowing the session: refused", self.address)
        waiting.unregister(self.connection)
        self.connection.close()


def _admit(
    listener: socket.socket, candidates: dict[socket.socket, _Candidate], waiting: selectors.BaseSelector
) -> None:
    try:
        connection, (address, *_) = listener.accept()
    except OSError:
        return  # gone before it was let in
    connection.setblocking(False)
    candidate = _Candidate(connection, str(address))
    if len(candidates) == MAX_CANDIDATES:
        oldest = next(iter(candidates))
        candidates.pop(oldest).hang_up(waiting)
    candidates[connection] = candidate
    waiting.register(connection, selectors.EVENT_READ, candidate)
    try:
        connection.send(candidate.challenge)  # fits into the buffer of a fresh connection
    except OSError:
        candidate.is_lost = True


def receive_exactly(connection: socket.socket, num_bytes: int) -> bytes:
    """The next `num_bytes`; ConnectionError when the other end hangs up before."""
    data = bytearray(num_bytes)
    receive_into(connection, memoryview(data))
    return bytes(data)


def receive_into(connection: socket.socket, place: memoryview) -> None:
    """Fill `place`; ConnectionError when the other end hangs up before."""
    while place:
        count = connection.recv_into(place)
        if count == 0:
            raise ConnectionError("the connection was closed")
        place = place[count:]


def _proof(session: str, who: bytes, server_challenge: bytes, trainer_challenge: bytes) -> bytes:
    return hmac.digest(session.encode(), who + server_challenge + trainer_challenge, "sha256")
