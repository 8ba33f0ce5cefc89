"""Short hashes that tell whether a checkpoint or a data file is still the one it was."""

from __future__ import annotations

import hashlib
from pathlib import Path

_WHOLE_BELOW = 64 * 2**20
_SAMPLE = 2**20
_MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.bin", "*.pt", "*.txt")


def file_fingerprint(path: Path) -> str:
    """sha256 of a file's bytes, first 16 digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]


def model_fingerprint(folder: Path) -> str:
    """Hash of names, sizes and contents of a checkpoint's files, first 16 digits.

    Of files above 64 MiB it reads 1 MiB at the start, in the middle and at the end: training changes all of them.
    """
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _MODEL_FILES for path in folder.glob(pattern)}):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as stream:
            if size < _WHOLE_BELOW:
                digest.update(stream.read())
                continue
            for offset in (0, size // 2, size - _SAMPLE):
                stream.seek(offset)
                digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()[:16]
