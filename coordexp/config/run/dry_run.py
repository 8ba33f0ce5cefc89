"""How `swift sft` is started for a dry run (`custom.dry_run: step`), so that nothing of it is left. No torch.

folder = make_folder()
argv = [*without_resume(argv), *flags(folder)]
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

STEP = "step"
_PREFIX = "coordexp_dry_run_"
_RESUME = "--resume_from_checkpoint"


def make_folder() -> Path:
    """A folder for what ms-swift writes whether it is asked or not; whoever makes it removes it."""
    return Path(tempfile.mkdtemp(prefix=_PREFIX))


def is_folder(output_dir: str | None) -> bool:
    """Whether an output folder is one of `make_folder`: the process was started for a dry run."""
    return output_dir is not None and Path(output_dir).name.startswith(_PREFIX)


def flags(folder: Path) -> list[str]:
    """Flags of `swift sft` that stand behind all others: no run folder, no trackers, no upload."""
    return [
        "--output_dir", str(folder), "--add_version", "false", "--report_to", "none", "--push_to_hub", "false",
        "--custom.dry_run", STEP,
    ]  # fmt: skip


def without_resume(argv: Sequence[str]) -> list[str]:
    """`argv` of a run that starts anew."""
    kept: list[str] = []
    skip = False
    for word in argv:
        if skip:
            skip = False
        elif word == _RESUME:
            skip = True
        elif not word.startswith(f"{_RESUME}="):
            kept.append(word)
    return kept
