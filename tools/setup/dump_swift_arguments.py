"""Write coordexp/config/checks/swift_arguments.json: the arguments of the installed ms-swift's `swift sft` and `rlhf`.

Run it after an upgrade of ms-swift or transformers:  python tools/setup/dump_swift_arguments.py

The file lets a configuration be checked without importing torch. Per argument: the section it is shown in,
the types it takes, its choices where it has some, and its default. Of `swift rlhf` those are written that `swift sft`
does not have, or has in another form.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import types
import typing
from importlib.metadata import version
from pathlib import Path
from typing import Any

OUTPUT = Path(__file__).parents[2] / "coordexp" / "config" / "checks" / "swift_arguments.json"
NAMES = {str: "str", bool: "bool", int: "int", float: "float", type(None): "null"}


def section_classes() -> dict[str, list[type]]:
    """Section -> the dataclasses of ms-swift that belong to it; everything else is `training`."""
    from swift.arguments.base_args import DataArguments, ModelArguments, QuantizeArguments, TemplateArguments
    from swift.arguments.tuner_args import TunerArguments

    return {
        "tuner": [TunerArguments],
        "template": [TemplateArguments],
        "data": [DataArguments],
        "model": [ModelArguments, QuantizeArguments],
    }


def collect() -> dict[str, Any]:
    """The content of the file, from the installed packages."""
    from swift.arguments import RLHFArguments, SftArguments

    sections = dict.fromkeys(("tuner_type", "tuner_backend", "adapters"), "tuner") | {
        field.name: section
        for section, classes in reversed(section_classes().items())
        for cls in classes
        for field in dataclasses.fields(cls)
    }
    sft, rlhf = (arguments_of(cls, sections) for cls in (SftArguments, RLHFArguments))
    if not sft.keys() <= rlhf.keys():
        raise SystemExit(f"swift rlhf lacks arguments of swift sft: {sorted(sft.keys() - rlhf.keys())}")
    versions = {package: version(package) for package in ("ms-swift", "transformers")}
    more = {name: entry for name, entry in rlhf.items() if entry != sft.get(name)}
    return {"versions": versions, "arguments": sft, "rlhf_arguments": more}


def arguments_of(cls: type, sections: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Name -> what the file says of every argument of a dataclass of ms-swift. sections: those other than training."""
    arguments: dict[str, dict[str, Any]] = {}
    for field in sorted(dataclasses.fields(cls), key=lambda field: field.name):
        if field.init:
            found, choices = describe(field.type)
            entry: dict[str, Any] = {"section": sections.get(field.name, "training"), "types": sorted(found)}
            arguments[field.name] = entry | ({"choices": choices} if choices else {})
            arguments[field.name]["default"] = json_default(field)
    return arguments


def json_default(field: dataclasses.Field[Any]) -> Any:
    """The default value, as it can be written in YAML."""
    value = field.default
    if value is dataclasses.MISSING:
        value = None if field.default_factory is dataclasses.MISSING else field.default_factory()
    if isinstance(value, enum.Enum):
        value = value.value
    return value if isinstance(value, str | bool | int | float | list | dict | None) else str(value)


def describe(hint: Any) -> tuple[set[str], list[str]]:
    """Type names among str, bool, int, float, null, list, dict, any, and choices, of a type hint."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return describe(typing.get_args(hint)[0])
    if origin in (typing.Union, types.UnionType):
        described = [describe(part) for part in typing.get_args(hint)]
        choices = [choice for _, part_choices in described for choice in part_choices]
        return set().union(*(found for found, _ in described)), choices
    if origin is typing.Literal:
        values = typing.get_args(hint)
        return {NAMES[type(value)] for value in values}, [value for value in values if isinstance(value, str)]
    if hint in NAMES:
        return {NAMES[hint]}, []
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"str"}, [member.value for member in hint]
    if (origin or hint) in (list, tuple):
        return {"list"}, []
    if (origin or hint) is dict:
        return {"dict"}, []
    return {"any"}, []


if __name__ == "__main__":
    OUTPUT.write_text(json.dumps(collect(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"wrote {OUTPUT}")
