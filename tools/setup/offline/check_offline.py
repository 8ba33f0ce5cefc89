"""check_offline.py FOLDER: is what install-offline.sh promised in this Python? Exit code 1 where it is not.

Standard library only. It also installs the import hook that lets a torchvision built for CUDA import beside a torch
built for CPUs.
"""

import importlib.metadata
import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path


def main() -> int:
    folder = Path(sys.argv[1])
    listed = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    expected = {wheel["name"]: wheel["version"] for wheel in listed["wheels"]} | listed["of_the_machine"]
    wrong = [line for name, version in expected.items() if (line := difference(name, version))]
    hook = not wrong and {"torch", "torchvision"} <= expected.keys() and mend_torchvision(folder)
    print(
        f"{len(listed['wheels'])} packages are in {sys.prefix}, for the parts {', '.join(listed['parts'])}."
    )
    if hook:
        print(
            "torchvision is built for CUDA and torch is not: an import hook was installed that lets both work."
        )
    for name, why in listed["left_out"].items():
        print(f"Not here: {name}: {why}.")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


def difference(name: str, version: str) -> str:
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found = "not here"
    if found == version or found.split("+")[0] == version:
        return ""
    return (
        f"{name}: expected {version}, found {found}. Make the list of what the machine has on this machine."
    )


def mend_torchvision(folder: Path) -> bool:
    """As tools/setup/install.py does; True where the hook was needed and helps."""
    imports = [sys.executable, "-c", "import torchvision"]
    if subprocess.run(imports, capture_output=True, check=False).returncode == 0:
        return False
    site = Path(sysconfig.get_path("purelib"))
    shutil.copy(folder / "torchvision_cpu.py", site / "coordexp_torchvision_cpu.py")
    hook = site / "coordexp_torchvision_cpu.pth"
    hook.write_text("import coordexp_torchvision_cpu\n", encoding="utf-8")
    done = subprocess.run(imports, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return True
    hook.unlink()
    reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
    print(f"torchvision does not import: {reason}", file=sys.stderr)
    return False


if __name__ == "__main__":
    sys.exit(main())
