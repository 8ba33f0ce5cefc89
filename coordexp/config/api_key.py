"""Keys of servers: settings name an environment variable, so that no key is written into a file or a command line."""

from __future__ import annotations

import os

from coordexp.errors import ConfigError


def api_key_from(setting: str, variable: str | None) -> str | None:
    """The key in the environment variable that `setting` names, None without one; ConfigError when it is unset."""
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise ConfigError(
            f"{setting}: the environment variable {variable} is not set; put the server's key in it."
        )
    return key
