"""`coordexp train` under another launcher."""

from __future__ import annotations

import pytest

from coordexp.cli.training import train_cmd
from coordexp.errors import ConfigError


def test_ranks_do_not_start_ranks_of_their_own():
    started = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    train_cmd._refuse_two_launchers(started)
    train_cmd._refuse_two_launchers(
        {"NPROC_PER_NODE": "2", "RANK": "0", "WORLD_SIZE": "2"}
    )  # of a cluster's job
    with pytest.raises(
        ConfigError, match="NPROC_PER_NODE: torchrun or accelerate has started this process already"
    ):
        train_cmd._refuse_two_launchers({**started, "NPROC_PER_NODE": "2"})
    with pytest.raises(ConfigError, match="NPROC_PER_NODE and NNODES: "):
        train_cmd._refuse_two_launchers({**started, "NPROC_PER_NODE": "2", "NNODES": "2"})
