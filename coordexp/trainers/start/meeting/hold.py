"""The meeting of the ranks of a run, from its flags."""

from __future__ import annotations

import os
from functools import partial

from coordexp.config import Sections
from coordexp.config.run.data_files import files_of_mixture
from coordexp.swift_bridge.arguments import PluginFlags
from coordexp.trainers.start.meeting.facts import (
    OutputFolder,
    StartFacts,
    output_of,
    places_of,
    settings_of,
    versions,
)
from coordexp.trainers.start.meeting.ranks import Ranks
from coordexp.trainers.start.meeting.store import Launch


def meet(ranks: Ranks, flags: PluginFlags, sections: Sections) -> None:
    """See that all ranks start the same run, and watch them from then on.

    Raises ConfigError where they do not, MeetingError where some do not come; on every rank.
    """
    output = output_of(flags.swift) if sections.custom.dry_run is None else OutputFolder(None, False, False)
    facts = partial(_facts, ranks.launch, flags, sections, output)
    ranks.meet(facts, output, flags.swift["external_plugins"] or ())
    ranks.watch()


def _facts(
    launch: Launch, flags: PluginFlags, sections: Sections, output: OutputFolder, sees_output: bool
) -> StartFacts:
    fusion = sections.custom.fusion
    mixed = (
        []
        if fusion is None
        else [file for val in (False, True) for file in files_of_mixture(fusion, validation=val)]
    )
    return StartFacts(
        launch.rank,
        launch.host,
        launch.node,
        settings_of(flags.swift, sections, os.environ),
        versions(),
        places_of(flags.swift, [*flags.datasets, *mixed]),
        output.path,
        sees_output,
    )
