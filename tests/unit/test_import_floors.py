"""The floors of the package: a folder imports only from strictly lower floors, never sideways."""

from __future__ import annotations

import ast
import hashlib
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "coordexp"
FLOORS = [
    {"errors"},
    {"files"},
    {"shipped"},
    {"config", "pictures", "image_size"},
    {"codec", "geometry", "metrics", "control", "swift_bridge"},
    {"matching", "losses", "packing", "telemetry", "models", "optim"},
    {"head", "rollout"},
    {"targets", "eval"},
    {"data", "handover"},
    {"trainers", "inference"},
    {"study", "audit", "stages", "machine"},
    {"plugin", "cli", "api"},
]
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}
TORCH_FREE = (
    "coordexp.config",
    "coordexp.errors",
    "coordexp.files",
    "coordexp.shipped.project",
    "coordexp.codec.parse",
    "coordexp.codec.records",
    "coordexp.geometry",
    "coordexp.matching",
    "coordexp.pictures",
    "coordexp.metrics.payload",
    "coordexp.metrics.catalog",
    "coordexp.telemetry.rules.check",
    "coordexp.telemetry.rules.watch",
    "coordexp.stages.runner",
)


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(path: Path) -> str:
    """The folder (or top-level module) of coordexp that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_every_room_has_a_floor():
    assert {room_of(path) for path in SOURCES} <= set(FLOOR_OF)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path):
    room = room_of(path)
    for name in imported_modules(path):
        parts = name.split(".")
        if parts[0] != "coordexp" or len(parts) < 2 or parts[1] not in FLOOR_OF or parts[1] == room:
            continue
        assert FLOOR_OF[parts[1]] < FLOOR_OF[room], f"{path}: {room} (floor {FLOOR_OF[room]}) imports {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_swift_is_imported_in_one_folder(path: Path):
    roots = {name.split(".")[0] for name in imported_modules(path)}
    assert "swift" not in roots or room_of(path) == "swift_bridge"
    assert "vllm" not in roots or "rollout" in path.parts


def test_no_two_folders_import_each_other():
    """Sub-folders included. A folder's `__init__`, which only gathers names, is not looked at."""
    folder_of = {name_of(path): path.parent for path in SOURCES}
    edges: dict[tuple[Path, Path], str] = {}
    for path in SOURCES:
        if path.name == "__init__.py":
            continue
        for name in imported_modules(path) & folder_of.keys():
            target = folder_of[name]
            if target != path.parent:
                edges[path.parent, target] = f"{name_of(path)} -> {name}"
    both = {
        frozenset((a, b)): (edges[a, b], edges[b, a])
        for a, b in edges
        if (b, a) in edges and PACKAGE not in (a, b)  # errors, files and geometry stand beside the folders
    }
    assert not both, sorted(both.values())


def name_of(path: Path) -> str:
    """The module that a file is."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_is_longer_than_500_lines(path: Path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


def test_no_folder_holds_more_than_15_files():
    counts = Counter(path.parent for path in SOURCES if path.name != "__init__.py")
    assert {str(folder): count for folder, count in counts.items() if count > 15} == {}


def test_no_two_classes_share_a_name():
    names = Counter(
        node.name
        for path in SOURCES
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_torch_free_rooms_import_without_torch():
    blocked = "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None; "
    code = blocked + "; ".join(f"import {name}" for name in TORCH_FREE)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_diagram_of_the_runbooks_has_its_picture():
    """The site shows pictures of the mermaid blocks; whoever changes a block draws it anew (tools/docs/diagrams.py)."""
    runbooks = PACKAGE.parent / "runbooks"
    blocks = [
        block
        for page in runbooks.rglob("*.md")
        for block in re.findall(r"^```mermaid\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    ]
    names = {hashlib.sha256(block.encode()).hexdigest()[:12] for block in blocks}
    assert names == {path.stem for path in (runbooks / "images/diagrams").glob("*.svg")}
    assert len(names) >= 2
