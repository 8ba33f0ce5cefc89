"""The folder: wheels, what is in it (`manifest.json`), pip's list with hashes, and the script that installs from it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from offline import OfflineError
from offline.choose import Choice
from offline.target import Target

MANIFEST, REQUIREMENTS, SCRIPT, CHECK = (
    "manifest.json",
    "requirements.txt",
    "install-offline.sh",
    "check_offline.py",
)
HERE = Path(__file__).resolve().parent


def refuse_filled(out: Path) -> None:
    """Raises OfflineError where `out` is neither empty, nor absent, nor a folder of this program."""
    if out.exists() and not out.is_dir():
        raise OfflineError(f"--out {out}: is a file. Name a folder.")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise OfflineError(f"--out {out}: holds other files. Name a new folder.")


def manifest(choice: Choice, target: Target) -> dict[str, Any]:
    """What is in the folder, as JSON values: names, versions, sizes in bytes, hashes; what the machine must bring."""
    found = choice.resolution
    return {
        "python": target.python,
        "architecture": target.architecture,
        "glibc": f"2.{target.glibc}",
        "parts": choice.parts,
        "bytes": found.size,
        "wheels": [
            {
                "name": str(name),
                "version": str(wheel.version),
                "file": wheel.path.name,
                "bytes": wheel.size,
                "sha256": wheel.sha256,
                "asked_by": found.asked_by.get(name, ""),
                "built_from_source": wheel.source,
            }
            for name, wheel in sorted(found.wheels.items())
        ],
        "of_the_machine": {str(name): str(version) for name, version in sorted(found.kept.items())},
        "left_out": choice.left_out,
    }


def requirements(choice: Choice) -> str:
    """For `pip install --require-hashes`: exactly these files and no others."""
    return "".join(
        f"{name}=={wheel.version} --hash=sha256:{wheel.sha256}\n"
        for name, wheel in sorted(choice.resolution.wheels.items())
    )


def write_folder(out: Path, work: Path, choice: Choice, target: Target) -> None:
    """Make `out`, complete or not at all. work: a folder beside it, which the wheels are in."""
    new = work / "new"
    (new / "wheels").mkdir(parents=True)
    listed, pip_list = manifest(choice, target), requirements(choice)
    for wheel in choice.resolution.wheels.values():
        wheel.path.rename(new / "wheels" / wheel.path.name)
    (new / MANIFEST).write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
    (new / REQUIREMENTS).write_text(pip_list, encoding="utf-8")
    for name in (SCRIPT, CHECK):
        shutil.copy(HERE / name, new / name)
    shutil.copy(HERE.parent / "torchvision_cpu.py", new / "torchvision_cpu.py")
    (new / SCRIPT).chmod(0o755)
    if out.is_dir():
        os.replace(out, work / "old")
    os.replace(new, out)
