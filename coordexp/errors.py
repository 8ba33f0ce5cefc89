"""Every error CoordExp raises on purpose, and the process exit code each one maps to.

A user-facing message names the place (file and line, dotted key, token or record), says what was
found and what was expected, and ends with what to do about it.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_NOT_ACCEPTED = 3
EXIT_STOPPED = 4
"""A rule of `telemetry.stop_on` ended the run."""


class CoordExpError(Exception):
    """Base of all CoordExp errors. `exit_code` is what the command line returns for it."""

    exit_code: int = EXIT_FAILURE


class ConfigError(CoordExpError):
    """A configuration, flag, tokenizer or model that cannot be used as given."""

    exit_code = EXIT_BAD_INPUT


class RecordError(CoordExpError):
    """A data file or record that breaks the JSONL contract."""

    exit_code = EXIT_BAD_INPUT


class ContractError(CoordExpError):
    """A value that crosses a module boundary in a form the contract forbids (payloads, metric keys)."""

    exit_code = EXIT_BAD_INPUT


class RolloutError(CoordExpError):
    """A rollout that cannot be produced, parsed into a target, or appended to."""

    exit_code = EXIT_FAILURE


class DeviceMemoryError(CoordExpError):
    """Something that does not fit into the memory of the device, also in smaller pieces."""
