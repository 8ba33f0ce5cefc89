"""The notebook of the runbooks, executed as it is on a taught nano model."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import coordexp

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "runbooks/notebooks/quick_start.ipynb"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def executed(
    taught_model: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory
) -> nbformat.NotebookNode:
    """The notebook after all of its cells ran in a kernel of this Python."""
    folder = tmp_path_factory.mktemp("jupyter")
    spec = folder / "kernels/python3/kernel.json"
    spec.parent.mkdir(parents=True)
    launch = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec.write_text(json.dumps({"argv": launch, "display_name": "Python 3", "language": "python"}))
    settings = {
        "JUPYTER_PATH": str(folder),
        "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "COORDEXP_NOTEBOOK_MODEL": str(taught_model),
        "COORDEXP_NOTEBOOK_DATA": str(scenes / "train.jsonl"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=str(folder))
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return notebook


def printed(notebook: nbformat.NotebookNode) -> str:
    return "".join(
        output["text"]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "stream" and output.name == "stdout"
    )


def test_it_shows_records_pictures_pairs_and_numbers(executed, taught_model, scenes):
    text = printed(executed)
    records = coordexp.load_records(scenes / "train.jsonl")
    for obj in records[0].objects:
        assert f"    {obj.desc} {obj.bins}\n" in text
    pictures = [
        output
        for cell in executed.cells
        for output in cell.get("outputs", [])
        if output.output_type == "display_data" and "image/png" in output.data
    ]
    assert len(pictures) == 2
    pairs = re.search(r"(\d+) pairs, (\d+) objects missed, (\d+) boxes without", text)
    assert pairs is not None
    hits, missed, extra = map(int, pairs.groups())
    with coordexp.Detector.from_pretrained(taught_model, max_new_tokens=128) as detector:
        found = detector([record.image_paths()[0] for record in records])
    assert hits + missed == sum(len(record.objects) for record in records)
    assert hits + extra == sum(map(len, found)) > 0
    numbers = coordexp.evaluate(records, found)
    assert f"AP50 {numbers['AP50']:.3f}\n" in text


def test_the_notebook_is_kept_without_outputs():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert all(
        cell.outputs == [] and cell.execution_count is None for cell in cells if cell.cell_type == "code"
    )
