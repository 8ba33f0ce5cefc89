"""What ms-swift loads: `--external_plugins coordexp/plugin.py --custom_trainer_variant NAME`.

Importing this file registers the template, the JSONL datasets and the trainer of the chosen variant. It reads our
settings from `--coordexp '{...}'` or `--coordexp_config FILE`, and refuses flags that nobody knows. It is imported
again by data-loader workers, where it does nothing but make the package importable.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# ms-swift puts the plugin's folder on sys.path, where our sub-packages (data, eval, config, ...) would shadow
# top-level modules of the same names.
_HERE = str(Path(__file__).resolve().parent)
sys.path[:] = [entry for entry in sys.path if str(Path(entry or ".").resolve()) != _HERE]

from coordexp.config.exit_code import leave_exit_code  # noqa: E402
from coordexp.errors import CoordExpError  # noqa: E402
from coordexp.telemetry import run_log  # noqa: E402
from coordexp.trainers.activate import activate_from_argv, trains  # noqa: E402
from coordexp.trainers.start.meeting.ranks import tell_failure  # noqa: E402

if trains(sys.argv):
    run_log.start(int(os.environ.get("RANK") or 0))
try:
    if not activate_from_argv(sys.argv[1:]):
        run_log.stop()
except CoordExpError as error:
    tell_failure(error)
    leave_exit_code(error.exit_code)
    print(f"coordexp: {error}", file=sys.stderr)
    raise SystemExit(error.exit_code) from None
