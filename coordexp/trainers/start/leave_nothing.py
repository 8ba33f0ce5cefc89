"""A dry run under plain `swift sft`: the process starts over with a folder that goes away with it."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
from collections.abc import Sequence

from coordexp.config.run import dry_run


def leave_nothing(argv: Sequence[str], output_dir: str | None) -> None:
    """See to it that nothing of this process is left: neither a run folder nor what a tracker would write.

    ms-swift makes the run folder that its flags name, so other flags are needed: where `output_dir` is not the folder
    of a dry run yet, this process is replaced by one that has them, and the call does not return.
    """
    if output_dir is not None and dry_run.is_folder(output_dir):
        atexit.register(shutil.rmtree, output_dir, ignore_errors=True)
        return
    flags = [*dry_run.without_resume(argv), *dry_run.flags(dry_run.make_folder())]
    os.execv(sys.executable, [sys.executable, sys.argv[0], *flags])
