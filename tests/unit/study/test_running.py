"""A cell that cannot be run fails alone."""

from __future__ import annotations

from pathlib import Path

from coordexp.study.plan import Cell, read_study
from coordexp.study.processes import Processes
from coordexp.study.running import CellRunner

STUDY = """
name: small
output: {output}
seeds: [1]
data: {{few: {{shapes: {{preset: few, train: 2, val: 1}}}}}}
model: {{preset: nano}}
recipes: {{untrained: {{budget: {{steps: 0}}}}}}
baseline: untrained
"""


def test_a_folder_that_cannot_be_written_is_a_failure_of_its_cell(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(STUDY.format(output=tmp_path / "out"), encoding="utf-8")
    study, cell = read_study(tmp_path / "study.yaml"), Cell("few", "untrained", 1)
    folder = study.folder_of(cell)
    folder.parent.mkdir(parents=True)
    folder.touch()  # a file where the folder should be
    record = CellRunner(study, Processes(1, keep_open=-1), 1, print).run(cell, {})
    assert record["state"] == "failed"
    assert str(folder) in record["error"]
