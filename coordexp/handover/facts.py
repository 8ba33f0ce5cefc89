"""What a run folder says about the model that it holds: settings, data, weights, evaluations."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from coordexp.config.prompt import read_prompt
from coordexp.config.run.resolved import RESOLVED_FILE
from coordexp.config.schema.prompt import Prompt
from coordexp.errors import ConfigError, RecordError
from coordexp.files import read_json, read_jsonl
from coordexp.models.checkpoints import best_of, last_whole
from coordexp.models.coord_offset import OFFSET_FILE
from coordexp.models.merge_offset import is_adapter

METRICS_FILE, INFER_RUN = "metrics.json", "infer_run.json"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", OFFSET_FILE)
_NUM_CLASSES = 20
"""Classes that are named; of more the number is said."""

Fingerprint = Callable[[Path], str]


class DataFile(NamedTuple):
    """A JSONL file of the run. The counts are None where the file is not there any more."""

    path: str
    use: str
    records: int | None = None
    objects: int | None = None
    classes: int | None = None
    names: tuple[str, ...] = ()


class WeightFile(NamedTuple):
    """One file of weights. sha256: of all its bytes."""

    name: str
    size: int
    sha256: str


class CardEvaluation(NamedTuple):
    """What `coordexp eval` has written. dataset: folder and name of its data file."""

    folder: Path
    dataset: str
    num_images: int
    metrics: Mapping[str, Any]
    decoding: Mapping[str, Any]


@dataclass(frozen=True)
class CardFacts:
    """checkpoint: the folder of the weights. resolved: resolved_config.json of its run, None where there is none.

    is_plain: whether it is a whole model rather than an adapter or one with offsets beside it.
    """

    name: str
    checkpoint: Path
    is_plain: bool
    resolved: Mapping[str, Any] | None
    prompt: Prompt | None
    data: tuple[DataFile, ...]
    weights: tuple[WeightFile, ...]
    evaluations: tuple[CardEvaluation, ...]


def gather(
    source: Path,
    *,
    fingerprint: Fingerprint | None = None,
    evaluations: tuple[Path, ...] = (),
    weights_in: Path | None = None,
    name: str | None = None,
) -> CardFacts:
    """The facts about a run folder (its best checkpoint, or the last whole one) or about one checkpoint.

    fingerprint: of a model folder, as evaluations record it. None: only evaluations that are named are taken.
    evaluations: their folders; none: those in the run folder that are of this checkpoint.
    weights_in: the folder whose weights are described, where they are not those of the checkpoint as it is.

    Raises ConfigError where there is no checkpoint, or for an evaluation that is named and is of another model.
    """
    run, checkpoint = locate(source)
    return facts_of(
        checkpoint,
        resolved=None if run is None else read_json(run / RESOLVED_FILE, error=ConfigError),
        name=name or (checkpoint if run is None else run).resolve().name,
        weights_in=weights_in,
        evaluations=tuple(_evaluations(run, checkpoint, evaluations, fingerprint)),
    )


def facts_of(
    checkpoint: Path,
    *,
    resolved: Mapping[str, Any] | None,
    name: str,
    weights_in: Path | None = None,
    evaluations: tuple[CardEvaluation, ...] = (),
) -> CardFacts:
    """The facts about a checkpoint whose run and evaluations are known. See `gather`."""
    described = weights_in or checkpoint
    record = read_prompt(checkpoint)
    return CardFacts(
        name=name,
        checkpoint=checkpoint,
        is_plain=not is_adapter(described) and not (described / OFFSET_FILE).is_file(),
        resolved=resolved,
        prompt=None if record is None else record.prompt,
        data=tuple(_data_files(resolved)) if resolved else (),
        weights=tuple(_weight_files(described)),
        evaluations=evaluations,
    )


def locate(source: Path) -> tuple[Path | None, Path]:
    """(run folder or None, checkpoint) of a run folder, or of a checkpoint in or outside of one.

    Raises ConfigError for a folder that is neither.
    """
    if not source.is_dir():
        raise ConfigError(f"{source}: no such folder; expected a run folder or a checkpoint.")
    if not (source / RESOLVED_FILE).is_file():
        if not any((source / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise ConfigError(
                f"{source}: holds neither {RESOLVED_FILE}, as a run folder does, nor config.json or "
                "adapter_config.json, as a checkpoint does."
            )
        folder = source if source.is_symlink() else source.resolve()
        run = folder.parent if (folder.parent / RESOLVED_FILE).is_file() else None
        return run, source
    checkpoint = best_of(source) or last_whole(source)
    if checkpoint is None and (source / "model.safetensors").is_file():
        checkpoint = source  # the final model, saved beside the checkpoints
    if checkpoint is None:
        raise ConfigError(f"{source}: holds no whole checkpoint; see `coordexp doctor {source}`.")
    return source, checkpoint


def _data_files(resolved: Mapping[str, Any]) -> Iterator[DataFile]:
    for key, use in (("dataset", "training"), ("val_dataset", "validation")):
        for written in resolved["swift"].get(key) or ():
            path = Path(str(written))
            yield _counted(path, use) if path.is_file() else DataFile(str(written), use)


def _counted(path: Path, use: str) -> DataFile:
    records, names = 0, Counter[str]()
    for _, record in read_jsonl(path):
        records += 1
        for entry in record.get("objects") or ():
            names[str(entry.get("desc"))] += 1
    most = tuple(name for name, _ in names.most_common(_NUM_CLASSES))
    return DataFile(str(path), use, records, names.total(), len(names), most)


def _weight_files(folder: Path) -> Iterator[WeightFile]:
    for path in sorted({path for pattern in _WEIGHTS for path in folder.glob(pattern)}):
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        yield WeightFile(path.name, path.stat().st_size, digest)


def _evaluations(
    run: Path | None, checkpoint: Path, named: tuple[Path, ...], fingerprint: Fingerprint | None
) -> Iterator[CardEvaluation]:
    found = named
    if not named and run is not None and fingerprint is not None:
        found = tuple(sorted(path.parent for path in run.glob(f"*/{METRICS_FILE}")))
    ours = fingerprint(checkpoint) if fingerprint and found else None
    for folder in found:
        metrics = read_json(folder / METRICS_FILE, error=ConfigError)
        if not isinstance(metrics, dict) or "num_images" not in metrics:
            raise RecordError(f"{folder / METRICS_FILE}: is not what `coordexp eval` writes.")
        asked = read_json(folder / INFER_RUN) if (folder / INFER_RUN).is_file() else {}
        theirs = asked.get("model_hash")
        if ours is not None and ours != theirs and (theirs is not None or not named):
            if named:
                raise ConfigError(
                    f"{folder}: was made with {asked.get('model')}, whose files are not those of {checkpoint} now; "
                    "evaluate this checkpoint, or name the other one."
                )
            continue
        data = Path(str(asked.get("data", folder.name)))
        dataset = f"{data.parent.name}/{data.stem}" if "data" in asked else folder.name
        decoding = {name: value for name, value in asked.get("decoding", {}).items() if value is not None}
        yield CardEvaluation(folder, dataset, int(metrics["num_images"]), metrics, decoding)
