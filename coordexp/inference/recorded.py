"""What an inference run was asked, as it recorded it, for those who ask the same again."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from coordexp.errors import ConfigError, RecordError
from coordexp.eval.predictions.artifacts import RUN_META
from coordexp.files import read_json


class RecordedRun(NamedTuple):
    """model, data: where they were.  question: by names of `InferSettings`."""

    model: Path
    data: Path
    question: dict[str, Any]


def recorded_run(run: Path) -> RecordedRun:
    """Raises ConfigError for a folder that says nothing, or names files that are gone."""
    path = run / RUN_META
    if not path.is_file():
        raise ConfigError(f"{run} holds no {RUN_META}: expected a folder of `coordexp infer`.")
    meta = read_json(path)
    try:
        found = RecordedRun(Path(meta["model"]), Path(meta["data"]), question_of(meta))
    except (KeyError, TypeError) as error:
        raise RecordError(f"{path}: lacks {error}; is it of `coordexp infer`?") from error
    for name, place in (("model", found.model), ("data", found.data)):
        if not place.exists():
            raise ConfigError(
                f"{place}, the {name} that {path} names, does not exist; give --model and --data."
            )
    return found


def question_of(meta: dict[str, Any]) -> dict[str, Any]:
    """The settings of the question, from the content of infer_run.json."""
    return {
        "limit": meta["num_images"],
        "max_new_tokens": meta["decoding"]["max_new_tokens"],
        "prompt": meta["prompt"],
        "system": meta["system"] or "",
        "media_order": meta["media_order"],
        "answer_form": meta.get("answer_form", "coordjson"),
        "field_order": meta["object_field_order"],
        **meta["pixels"],
    }
