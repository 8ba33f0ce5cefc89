"""Wheel and sdist are built, checked, installed into an environment of their own, and train from a project's folder.

The environment sees the dependencies of the one that runs the tests, but not its CoordExp. Takes about half a minute of
CPU time, most of it imports.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email import message_from_string
from pathlib import Path
from typing import NamedTuple

import pytest
from support.processes import ROOT

from coordexp.config.checks.yaml_tree import read_yaml
from coordexp.metrics.sinks import read_payloads

pytestmark = pytest.mark.slow
CPU_SHIM = "coordexp_torchvision_cpu"


class Built(NamedTuple):
    """Wheel, sdist, and the environment that the wheel is installed in."""

    wheel: Path
    sdist: Path
    bin: Path

    @property
    def package(self) -> Path:
        return next(self.bin.parent.glob("lib/python*/site-packages")) / "coordexp"

    def run(self, *words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
        """A command of that environment; `swift` is what pip makes of ms-swift's entry point."""
        program, *flags = map(str, words)
        entry = (
            [str(self.bin / program)]
            if program != "swift"
            else [str(self.bin / "python"), "-m", "swift.cli.main"]
        )
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COORDEXP_STRICT_METRICS": "1"}
        done = subprocess.run(
            [*entry, *flags],
            capture_output=True,
            text=True,
            cwd=cwd,
            env=environment,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, (words, done.stdout[-3000:], done.stderr[-3000:])
        return done


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Built from the sources here, without a network; the wheel is made from the sdist."""
    folder = tmp_path_factory.mktemp("built")
    python("-m", "build", "--no-isolation", "--outdir", folder / "dist", ROOT)
    (wheel,), (sdist,) = (list((folder / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    venv.create(folder / "env", with_pip=False, symlinks=True)
    found = Built(wheel, sdist, folder / "env" / "bin")
    ours = Path(sysconfig.get_path("purelib"))
    hook = f"import {CPU_SHIM}\n" if (ours / f"{CPU_SHIM}.pth").is_file() else ""
    (found.package.parent / "dependencies.pth").write_text(
        f"{ours}\n{hook}"
    )  # nested .pth files are not read
    python(
        "-m", "pip", "--python", found.bin / "python", "install", "--no-deps", "--no-index", "--quiet", wheel
    )
    return found


def python(*words: object) -> None:
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, cwd="/", check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_both_hold_what_they_must_and_nothing_else(built: Built) -> None:
    python("-m", "twine", "check", "--strict", built.wheel, built.sdist)
    with zipfile.ZipFile(built.wheel) as archive:
        names = set(archive.namelist())
        info = next(name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = message_from_string(archive.read(info).decode())
    ours = [
        str(path.relative_to(ROOT))
        for folder in ("coordexp", "configs", "runbooks")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    expected = {re.sub("^(configs|runbooks)/", r"coordexp/shipped/\1/", name) for name in ours}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert (metadata["Name"], metadata["License-Expression"]) == ("coordexp", "Apache-2.0")
    assert any(one.startswith("ms-swift<4.7,>=4.6") for one in metadata.get_all("Requires-Dist", []))
    with tarfile.open(built.sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert inside >= {
        *ours,
        "pyproject.toml",
        "constraints.txt",
        "tests/conftest.py",
        "tools/setup/install.py",
    }
    assert not [name for name in inside if name.startswith(("runs/", ".venv", ".git/", ".ci/"))]


def test_recipes_and_runbooks_are_found_away_from_the_repository(built: Built, tmp_path: Path) -> None:
    plugin = built.run("coordexp", "plugin-path", cwd=tmp_path).stdout
    assert plugin == f"{built.package / 'plugin.py'}\n"
    page = built.run("coordexp", "runbook", "runbooks/when_it_breaks.md", cwd=tmp_path).stdout
    assert page == (ROOT / "runbooks" / "when_it_breaks.md").read_text()
    shown = built.run("coordexp", "config", "show", "--json", "configs/stage1/prod.yaml", cwd=tmp_path).stdout
    assert json.loads(shown)["swift"]["learning_rate"] == 2e-5  # of prod.yaml, which extends base.yaml


def test_the_commands_of_a_projects_readme_train(built: Built, tmp_path: Path) -> None:
    """`coordexp init`, then the first block of commands of the README that it wrote."""
    project = tmp_path / "my detector"
    built.run("coordexp", "init", project, cwd=tmp_path)
    block = (project / "README.md").read_text().split("```")[1]
    for line in block.strip().splitlines():
        built.run(*line.split(), cwd=project)
    run = project / "runs" / "smoke"
    assert json.loads((run / "args.json").read_text())["external_plugins"] == [
        str(built.package / "plugin.py")
    ]
    payloads = list(read_payloads(run / "metrics.jsonl"))
    losses = [one["metrics"]["loss"] for one in payloads if "loss" in one["metrics"]]
    assert len(losses) == 3
    assert 1 < losses[2] < losses[0]
    for stage in (1, 2):
        built.run("coordexp", "config", "check", f"configs/stage{stage}.yaml", cwd=project)
        assert "fill in" in (project / "configs" / f"stage{stage}.yaml").read_text()
    read = read_yaml(project / "configs" / "stage2.yaml").data
    assert (
        read["model"]["model"]
        == f"{read_yaml(project / 'configs' / 'stage1.yaml').data['training']['output_dir']}/best"
    )
