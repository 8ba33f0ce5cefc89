"""runbooks/config.md, printed from the typed models."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from coordexp.config.checks.not_built import FEATURES_NOT_BUILT, SWIFT_NOT_BUILT
from coordexp.config.checks.removed import REMOVED, REMOVED_VARIANTS
from coordexp.config.checks.validation import models_in
from coordexp.config.run.load import LaunchSections
from coordexp.config.schema.augmentation import Augmentation
from coordexp.config.schema.pipeline import DIAGNOSTIC_MODULES, OBJECTIVE_MODULES, Pipeline
from coordexp.config.schema.training import SetpointController, SoftctxEconomy
from coordexp.config.stages import StagesFile

_INTRO = """\
# Run configuration

Every key of ours. Printed from the typed models by `coordexp config write-reference`; do not edit.

A run is one YAML file, in either of two forms.

Sections, for `coordexp train FILE`:

```yaml
# ms-swift's arguments, in five sections that only group them: model, template, data, tuner, training
model: {model: PATH, torch_dtype: bfloat16}
training: {max_steps: 1000, learning_rate: 1.0e-5, effective_batch_size: 32}
# ours
custom:
  train_jsonl: data/train.jsonl
  coord_soft_ce_w1: {ce_weight: 1.0}
```

ms-swift's flat form, for `coordexp train FILE` and for plain `swift sft FILE`:

```yaml
external_plugins: [coordexp/plugin.py]
ignore_args_error: true
custom_trainer_variant: stage1_coord
coordexp:
  custom: {coord_soft_ce_w1: {ce_weight: 1.0}}
model: PATH
dataset: [data/train.jsonl]
max_steps: 1000
```

- `extends: OTHER.yaml` (relative to the file) takes everything from another file and lays this one over it; that
  file may extend a third. Mappings merge, lists and values replace; null in place of a mapping takes it back.
- On the command line `--custom.object_ordering random` (or `--set custom.object_ordering=random`) overrides any key,
  and ms-swift's own flags work as they are (`--max_steps 3`). Dotted flags also work under plain `swift sft`, alone or
  over `--coordexp '{...}'` and `--coordexp_config FILE`, and as dotted keys of its flat YAML; there `ignore_args_error`
  must be true.
- `coordexp config migrate FILE` turns a run file of the research code into ours ([migrate.md](migrate.md)).
- `coordexp config check PATH...` validates files without loading torch. `coordexp config show FILE` prints
  every value and where it was written.
- A key that nobody knows, a value of the wrong type, and a key whose feature is not built yet are errors.
- ms-swift's arguments are listed by `swift sft --help`. `truncation_strategy` takes `raise` too: a sample longer than
  `max_length` stops the run (ms-swift's `delete` with `strict: true`).
- A run directory holds `resolved_config.json`: all of this resolved, a `derived` section, and `config_hash`,
  which stays the same when only the run's name, seed, output paths, reporting or notes change.
"""


_NAME = r"\1"  # in a replacement text: the matched part of the removed name


def render_reference() -> str:
    """The whole page, as Markdown."""
    parts = [_INTRO]
    for name, field in LaunchSections.model_fields.items():
        models = models_in(field.annotation)
        if not models:
            parts.append(f"\n## `{name}`\n\n{_table([_row(name, field)])}")
            continue
        (model,) = models
        parts.append(f"\n## `{name}`\n\n{_first_line(model)}\n")
        for path, inner in _nested(name, model):
            rows = [
                _row(f"{path}.{key}", item)
                for key, item in inner.model_fields.items()
                if not models_in(item.annotation)
            ]
            if rows:
                parts.append(
                    ("\n" if path == name else f"\n### `{path}`\n\n{_first_line(inner)}\n\n") + _table(rows)
                )
    return "".join([*parts, _operations(), _controllers(), _pipeline(), _stages(), _removed(), _not_built()])


def _nested(path: str, model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """A model and the models inside it, each with its dotted path; pipeline and operations are printed elsewhere."""
    yield path, model
    for key, field in model.model_fields.items():
        inner_models = models_in(field.annotation)
        for inner in (
            inner_models if len(inner_models) == 1 else ()
        ):  # several: chosen by name, see _operations
            if inner is not Pipeline:
                is_list = "list[" in str(field.annotation)
                yield from _nested(f"{path}.{key}".removeprefix(".") + ("[i]" if is_list else ""), inner)


def _operations() -> str:
    rows = []
    for model in models_in(Augmentation.model_fields["ops"].annotation):
        (name,) = typing.get_args(model.model_fields["name"].annotation)
        rows.append(f"| `{name}` |  |  | {_first_line(model)} |\n")
        (params,) = models_in(model.model_fields["params"].annotation)
        rows += [
            _row(f"{name}.params.{key}", field) for key, field in params.model_fields.items() if key != "prob"
        ]
    return (
        "\n## `custom.augmentation.ops`\n\nMade one after another. Every entry is `{name: ..., params: {...}}`; all "
        "take `params.prob`, how often the operation is made (1 when left out).\n\n" + _table(rows)
    )


def _controllers() -> str:
    parts = ["\n## `control.controllers`\n\nA list; the `kind` of an entry says which keys it has.\n"]
    for model in (SetpointController, SoftctxEconomy):
        (kind,) = typing.get_args(model.model_fields["kind"].annotation)
        rows = [
            _row(key, field)
            for key, field in model.model_fields.items()
            if key != "kind" and not models_in(field.annotation)
        ]
        inner = [
            _row(f"{key}.{name}", item)
            for key, field in model.model_fields.items()
            for price in models_in(field.annotation)
            for name, item in price.model_fields.items()
        ]
        parts.append(f"\n### `kind: {kind}`\n\n{_first_line(model)}\n\n" + _table(rows + inner))
    return "".join(parts)


def _pipeline() -> str:
    parts = [
        "\n## `stage2_ab.pipeline`, `rollout_matching.pipeline`\n\n"
        "`objective` and `diagnostics` are ordered lists. Every entry states `name`, `enabled`, `weight`, "
        "`channels` (A, B or both) and exactly the keys of `config` listed here, none of which has a "
        "default unless it is said. "
        "`bbox_geo` stands before `coord_reg`. An entry of `objective` may also have `warmup`, factors on its weights: "
        "`{weight: [[0, 0.0], [200, 1.0]]}` brings the whole module in over 200 steps, `{w1_weight: ...}` one weight "
        "of its `config` (points [[step, factor], ...], linear between them and constant outside).\n"
    ]
    for name, module in {**OBJECTIVE_MODULES, **DIAGNOSTIC_MODULES}.items():
        (config,) = models_in(module.model_fields["config"].annotation)
        parts.append(f"\n### `{name}`\n\n{_first_line(module)}\n")
        rows = [_row(f"config.{key}", field) for key, field in config.model_fields.items()]
        parts.append("\n" + (_table(rows) if rows else "`config: {}`\n"))
    return "".join(parts)


def _stages() -> str:
    rows = [
        _row(f"{path}.{key}".removeprefix("."), field)
        for path, model in _nested("", StagesFile)
        for key, field in model.model_fields.items()
        if not models_in(field.annotation)
    ]
    text = "A file of its own, which names run files ([stages.md](stages.md))."
    return f"\n## Stages file\n\n{_first_line(StagesFile)} {text}\n\n{_table(rows)}"


def _removed() -> str:
    rows = [f"| `{_plain(pattern)}` | {_escape(text.replace(_NAME, '...'))} |\n" for pattern, text in REMOVED]
    rows += [f"| `custom.trainer_variant: {old}` | use {new} |\n" for old, new in REMOVED_VARIANTS.items()]
    return "\n## Removed keys\n\n| key | now |\n|---|---|\n" + "".join(rows)


def _not_built() -> str:
    features = [(f"`{feature.shown}`", feature.what) for feature in FEATURES_NOT_BUILT]
    features += [(f"ms-swift's `{feature.shown}`", feature.what) for feature in SWIFT_NOT_BUILT]
    rows = "".join(f"| {shown} | {what} |\n" for shown, what in features)
    intro = (
        "\n## Not built yet\n\nValid keys that are refused in this version when they ask for the feature.\n"
    )
    return f"{intro}\n| key | feature |\n|---|---|\n{rows}" if features else ""


def _table(rows: list[str]) -> str:
    return "| key | takes | default | meaning |\n|---|---|---|---|\n" + "".join(rows)


def _row(path: str, field: FieldInfo) -> str:
    default = (
        "required" if field.is_required() else f"`{_value(field.get_default(call_default_factory=True))}`"
    )
    cells = (f"`{path}`", _takes(field), default, field.description or "")
    return "| " + " | ".join(map(_escape, cells)) + " |\n"


def _takes(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(item, name):g}"
        for item in field.metadata
        for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
        if hasattr(item, name)
    ]
    return ", ".join([_type_name(field.annotation), *bounds])


def _type_name(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return " or ".join(str(choice) for choice in typing.get_args(annotation))
    if origin in (typing.Union, UnionType):
        return " or ".join(_type_name(part) for part in typing.get_args(annotation))
    if origin is typing.Annotated:
        return _type_name(typing.get_args(annotation)[0])
    if origin is tuple:
        return "[" + ", ".join(map(_type_name, typing.get_args(annotation))) + "]"
    if origin is list:
        return f"list of {_type_name(typing.get_args(annotation)[0])}"
    names = {bool: "true or false", int: "integer", float: "number", str: "text", NoneType: "null"}
    return names.get(annotation, "mapping")


def _value(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _first_line(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().splitlines()[0]


def _plain(pattern: str) -> str:
    """A removed-key pattern as people read it."""
    for old, new in ((r"(\..*)?", ".*"), (r"\.", "."), (r"\w+", "*"), ("(", "{"), (")", "}"), ("|", ",")):
        pattern = pattern.replace(old, new)
    return pattern


def _escape(cell: str) -> str:
    """Text that stays as it is inside a Markdown table."""
    return cell.replace("<|", "&lt;|").replace("|", "\\|")
