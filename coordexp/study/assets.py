"""What the cells of a study train on and start from: scenes and tiny models, made once below the study's folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from coordexp.errors import ConfigError
from coordexp.study.plan import Cell, Study
from coordexp.study.schema import StudyData, StudyModel, StudyShapes

ASSETS = "assets"
_NOT_SCENES = ("preset", "train", "val", "seed")


@dataclass(frozen=True)
class DataFiles:
    """The two files of a data set. made_from: what decides their content."""

    train: Path
    val: Path
    made_from: dict[str, Any]


@dataclass(frozen=True)
class StartModel:
    """A model folder. made_from: what decides its weights."""

    path: Path
    made_from: dict[str, Any]


def data_files(study: Study, name: str) -> DataFiles:
    """Where a data set stands or will stand; RecordError or ConfigError for files that are not there."""
    data = study.file.data[name]
    if data.shapes is not None:
        folder = study.folder / ASSETS / "data" / name
        sizes = {"train": data.shapes.train, "val": data.shapes.val, "seed": data.shapes.seed}
        made_from = {**sizes, **_scenes(data.shapes)}
        return DataFiles(folder / "train.jsonl", folder / "val.jsonl", {"shapes": made_from})
    return _given_files(study, name, data)


def make_data(study: Study, names: Iterable[str], *, say: Callable[[str], object]) -> None:
    """Draw the scenes that are not there yet; those of other settings make way."""
    from coordexp.data.shapes import STAMP_NAME, generate_shapes

    for name in names:
        shapes = study.file.data[name].shapes
        if shapes is None:
            continue
        folder = data_files(study, name).train.parent

        def draw(*, force: bool, shapes: StudyShapes = shapes, folder: Path = folder) -> bool:
            return generate_shapes(
                folder, _config(shapes), num_train=shapes.train, num_val=shapes.val, seed=shapes.seed, force=force
            )  # fmt: skip

        try:
            written = draw(force=False)
        except ConfigError:
            if not (folder / STAMP_NAME).is_file():
                raise
            written = draw(force=True)
        if written:
            say(f"data {name}: drew {shapes.train} training and {shapes.val} validation scenes in {folder}")


def start_model(study: Study, cell: Cell) -> StartModel:
    """What a cell starts from where its recipe names no other recipe."""
    model = study.recipe_of(cell).model or study.file.model
    if model.path is not None:
        from coordexp.inference.fingerprint import model_fingerprint

        path = Path(model.path)
        if not (path / "config.json").is_file():
            raise ConfigError(f"{study.path}: model {path} is not a model folder (no config.json).")
        return StartModel(path, {"fingerprint": model_fingerprint(path)})
    made_from = {"preset": model.preset, "coord_tokens": model.coord_tokens, "seed": cell.seed}
    if model.latent_tokens:
        made_from["latent_tokens"] = model.latent_tokens
    return StartModel(study.folder / ASSETS / "models" / _name(model, cell.seed), made_from)


def make_models(study: Study, cells: Iterable[Cell], *, say: Callable[[str], object]) -> None:
    """Make the tiny models that these cells start from and that are not there yet."""
    from coordexp.models.latent_prefix.vocabulary import add_latent_tokens
    from coordexp.models.tiny import build_tiny_model

    for cell in cells:
        recipe = study.recipe_of(cell)
        model = recipe.model or study.file.model
        if study.start_of(cell) is not None or model.path is not None:
            continue
        folder = start_model(study, cell).path
        plain = folder if not model.latent_tokens else folder.with_name(f"{folder.name}_plain")
        made = build_tiny_model(plain, preset=model.preset, seed=cell.seed, coord_tokens=model.coord_tokens)
        if model.latent_tokens:
            made = add_latent_tokens(plain, folder, model.latent_tokens).written
        if made:
            say(f"model {folder.name}: made in {folder.parent}")


def check_assets(study: Study) -> None:
    """ConfigError naming a data set whose scenes cannot be drawn or whose files are missing, or a model that is."""
    for cell in study.cells:
        if study.start_of(cell) is None:
            start_model(study, cell)
    for name, data in study.file.data.items():
        if data.shapes is None:
            data_files(study, name)
    for name, data in study.file.data.items():
        if data.shapes is not None:
            try:
                _config(data.shapes)
            except ConfigError as error:
                raise ConfigError(f"{study.path}: data.{name}.{error}") from None


def _name(model: StudyModel, seed: int) -> str:
    latents = f"_latents{model.latent_tokens}" if model.latent_tokens else ""
    return f"{model.preset}{'' if model.coord_tokens else '_digits'}{latents}_seed{seed}"


def _config(shapes: StudyShapes) -> Any:
    from coordexp.data.scene_config import PRESETS, with_overrides

    if shapes.preset not in PRESETS:
        raise ConfigError(f"shapes.preset = {shapes.preset}: expected one of {', '.join(PRESETS)}.")
    given = shapes.model_dump(exclude=set(_NOT_SCENES), exclude_none=True)
    names = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    return with_overrides(PRESETS[shapes.preset], names)


def _scenes(shapes: StudyShapes) -> dict[str, Any]:
    """What the preset stands for, so that a change of it is a change of the data; settings as usual are left out."""
    from coordexp.data.scene_config import ShapesConfig

    usual = asdict(ShapesConfig())
    changed = {name: v for name, v in asdict(_config(shapes)).items() if v != usual[name]}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in changed.items()}


def _given_files(study: Study, name: str, data: StudyData) -> DataFiles:
    from coordexp.inference.fingerprint import file_fingerprint

    files = {"train_jsonl": Path(str(data.train_jsonl)), "val_jsonl": Path(str(data.val_jsonl))}
    for key, path in files.items():
        if not path.is_file():
            raise ConfigError(f"{study.path}: data.{name}.{key}: {path} does not exist.")
    made_from = {key: file_fingerprint(path) for key, path in files.items()}
    return DataFiles(files["train_jsonl"], files["val_jsonl"], made_from)
