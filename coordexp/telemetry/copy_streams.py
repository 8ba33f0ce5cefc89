"""Copies what a process writes to its console, to that console and into a file. Run as a program of its own:

    python -I copy_streams.py CONTROL PREFIX OUT_PIPE OUT ERR_PIPE ERR

All but PREFIX are file descriptors: what comes from OUT_PIPE goes to OUT, from ERR_PIPE to ERR, byte for byte and at
once. CONTROL brings the path of the file, a line break, a header for the file and a NUL, when the file's folder
exists; until then its lines wait. The file gets whole lines without escape sequences (colours), each behind PREFIX; of
a line that was drawn over (a progress bar) the last state. The program ends when both pipes do, so it also writes what
a killed process has left.
"""

from __future__ import annotations

import os
import re
import selectors
import sys
from contextlib import suppress

_ESCAPES = re.compile(rb"\x1b\[[0-?]*[ -/]*[@-~]")


class LogFile:
    """The file, or the lines that wait for it."""

    def __init__(self, prefix: bytes) -> None:
        self.prefix = prefix
        self.descriptor: int | None = None
        self.waiting: list[bytes] = []

    def open(self, message: bytes) -> None:
        path, _, header = message.partition(b"\n")
        self.descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(self.descriptor, header + b"".join(self.waiting))
        self.waiting = []

    def add(self, line: bytes) -> None:
        line = self.prefix + line.rstrip(b"\r").rpartition(b"\r")[2] + b"\n"
        line = _ESCAPES.sub(b"", line)
        if self.descriptor is None:
            self.waiting.append(line)
        else:
            os.write(self.descriptor, line)


def write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def main() -> None:
    control, prefix, *streams = sys.argv[1:]
    console = dict(zip(map(int, streams[::2]), map(int, streams[1::2]), strict=True))
    log, unfinished, message = LogFile(os.fsencode(prefix)), dict.fromkeys(console, b""), b""
    selector = selectors.DefaultSelector()
    for source in (int(control), *console):
        selector.register(source, selectors.EVENT_READ)
    while any(source in console for source in selector.get_map()):
        for key, _ in selector.select():
            data = os.read(key.fd, 1 << 16)
            if not data:
                selector.unregister(key.fd)
            if key.fd not in console:
                message += data
                if message.endswith(b"\0"):
                    log.open(message[:-1])
                    message = b""
                continue
            with suppress(OSError):  # nobody may read the console any more; the file goes on
                write_all(console[key.fd], data)
            *lines, rest = (unfinished[key.fd] + data).split(b"\n")
            if not data and rest:
                lines, rest = [rest], b""
            unfinished[key.fd] = rest[rest.rfind(b"\r", 0, -1) + 1 :]
            for line in lines:
                log.add(line)


if __name__ == "__main__":
    main()
