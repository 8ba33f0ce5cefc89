"""The prompt of a model, in a small versioned file that stays with its weights.

    write_prompt(checkpoint, prompt)
    record = find_prompt([checkpoint])                          # None where no folder holds one
    prompt, differences = settle(record, {"user": "Find all cats."})

Training writes it into every checkpoint. Whoever asks the model later takes it from there; a value that is given
instead is told (`Difference`), so that nothing is asked in another way in silence.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from coordexp.config.checks.problems import COMMAND_LINE, Place, raise_problems
from coordexp.config.checks.validation import validate
from coordexp.config.checks.yaml_tree import Tree
from coordexp.config.schema.answer_form import settings_of
from coordexp.config.schema.custom import Custom
from coordexp.config.schema.prompt import Prompt
from coordexp.errors import ConfigError
from coordexp.files import read_json, write_json

PROMPT_FILE = "coordexp_prompt.json"
PROMPT_VERSION = 1
SETTINGS = tuple(name for name in Prompt.model_fields if name != "rendered")
RUN_NAMES = {
    "user": "custom.prompt",
    "system": "system",
    "template": "template",
    "media_order": "custom.media_order",
    "min_pixels": "custom.min_pixels",
    "max_pixels": "max_pixels",
    "answer_form": "custom.answer_format with custom.coord_tokens.enabled",
    "object_field_order": "custom.object_field_order",
    "object_ordering": "custom.object_ordering",
}
"""How a run file writes the settings of a prompt."""


class PromptRecord(NamedTuple):
    """A prompt and the file it was read from."""

    path: Path
    prompt: Prompt


class Difference(NamedTuple):
    """A value that is not the one the model was trained with."""

    name: str
    given: Any
    trained: Any


def write_prompt(folder: str | Path, prompt: Prompt) -> None:
    """Write PROMPT_FILE into `folder`. CoordJSON is not named, so that earlier releases read it."""
    unnamed = {"answer_form"} if prompt.answer_form == "coordjson" else set()
    write_json(Path(folder) / PROMPT_FILE, {"version": PROMPT_VERSION, **prompt.model_dump(exclude=unnamed)})


def read_prompt(folder: str | Path) -> PromptRecord | None:
    """What a folder says about its model's prompt; None when it holds no PROMPT_FILE.

    Raises ConfigError naming the file for one of another version, or with keys or values that no prompt has.
    """
    path = Path(folder) / PROMPT_FILE
    if not path.is_file():
        return None
    content = read_json(path, error=ConfigError)
    if not isinstance(content, dict) or content.get("version") != PROMPT_VERSION:
        found = content.get("version") if isinstance(content, dict) else content
        raise ConfigError(
            f"{path}: version {json.dumps(found)}; this release of coordexp reads version {PROMPT_VERSION}. Install "
            "the release that wrote it."
        )
    del content["version"]
    prompt, problems = validate(Prompt, Tree(content, {(): Place(str(path))}))
    raise_problems(problems)
    assert prompt is not None
    return PromptRecord(path, prompt)


def find_prompt(folders: Iterable[str | Path | None]) -> PromptRecord | None:
    """The record of the first of `folders` that holds one; None stands for a folder that is not given."""
    records = (read_prompt(folder) for folder in folders if folder is not None)
    return next((record for record in records if record is not None), None)


def settle(record: PromptRecord | None, given: Mapping[str, Any]) -> tuple[Prompt, list[Difference]]:
    """The prompt to use (what is given, else what the record says, else the default), and where the first two differ.

    given: values by names of `Prompt`. Raises ConfigError for one that no prompt can have.
    """
    trained = Prompt() if record is None else record.prompt
    before = trained.model_dump(exclude={"rendered"})
    prompt, problems = validate(Prompt, Tree({**before, **given}, {(): COMMAND_LINE}))
    raise_problems(problems)
    assert prompt is not None
    if record is None:
        return prompt, []
    after = prompt.model_dump()
    return prompt, [Difference(n, after[n], before[n]) for n in SETTINGS if after[n] != before[n]]


def describe(differences: Sequence[Difference], names: Mapping[str, str]) -> str:
    """One line for each difference, with both values in full. names: how the reader writes a setting."""
    return "".join(
        f"\n  {names.get(d.name, d.name)} is {_shown(d.given)}, trained with {_shown(d.trained)}"
        for d in differences
    )


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def given_by_run(custom: Custom, swift: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a run states itself, by names of `Prompt`.

    swift: ms-swift's arguments, flat; None where one is not given. Raises ConfigError for a `system` file that is not
    there.
    """
    given: dict[str, Any] = {}
    if {"answer_format", "coord_tokens"} & custom.model_fields_set:
        given["answer_form"] = custom.answer_form
    for name, written in RUN_NAMES.items():
        if name == "answer_form":
            continue
        key = written.removeprefix("custom.")
        if key != written:
            if key in custom.model_fields_set:
                given[name] = getattr(custom, key)
        elif swift.get(key) is not None:
            given[name] = system_text(swift[key]) if name == "system" else swift[key]
    return given


def with_prompt(custom: Custom, prompt: Prompt) -> Custom:
    """The section with the settings of `prompt`, wherever they come from."""
    ours = {
        name: key.removeprefix("custom.")
        for name, key in RUN_NAMES.items()
        if key.startswith("custom.") and name != "answer_form"
    }
    answer_format, coord_tokens = settings_of(prompt.answer_form)
    return custom.model_copy(
        update={
            **{key: getattr(prompt, name) for name, key in ours.items()},
            "answer_format": answer_format,
            "coord_tokens": custom.coord_tokens.model_copy(update={"enabled": coord_tokens}),
        }
    )


def system_text(written: str) -> str | None:
    """The system message that ms-swift makes of `--system`: a .txt file, or text with \\n for a new line."""
    if not written.endswith(".txt"):
        return written.replace("\\n", "\n") or None
    try:
        return Path(written).read_text(encoding="utf-8") or None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"system: {written}: cannot be read ({error}).") from error
