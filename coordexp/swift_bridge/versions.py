"""The ms-swift and transformers releases this bridge was written for, checked once when the plugin loads."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from coordexp.errors import ConfigError

# package -> (first tested release, first untested release)
TESTED = {"ms-swift": ("4.6", "4.7"), "transformers": ("5.19", "5.20")}


def check_versions() -> dict[str, str]:
    """Installed versions of the packages in TESTED; ConfigError outside the tested range."""
    found: dict[str, str] = {}
    for package, (lowest, below) in TESTED.items():
        try:
            installed = version(package)
        except PackageNotFoundError:
            raise ConfigError(
                f"{package} is not installed; expected >={lowest},<{below}. Run `make setup`."
            ) from None
        if not Version(lowest) <= Version(installed) < Version(below):
            raise ConfigError(
                f"{package} {installed} is installed; this release of coordexp is tested with >={lowest},<{below}. "
                f"Install a tested version: pip install '{package}>={lowest},<{below}'."
            )
        found[package] = installed
    return found
