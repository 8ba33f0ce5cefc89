"""Types of command-line arguments."""

from __future__ import annotations

import argparse


def positive_int(text: str) -> int:
    """An integer of at least 1, for `type=` of an argparse argument."""
    return _whole_number(text, 1)


def count(text: str) -> int:
    """An integer of at least 0, for `type=` of an argparse argument."""
    return _whole_number(text, 0)


def _whole_number(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return value
