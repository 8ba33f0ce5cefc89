"""Seams in ms-swift's loading of Qwen3-VL: code that comes with a model, and a function that sees each loaded model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from swift.model.constant import MLLMModelType
from swift.model.model_meta import MODEL_MAPPING
from swift.model.models.qwen import Qwen3VLLoader

PrepareModel = Callable[[Any, Any, Path], None]
"""(model, tokenizer, model folder); before tuners, freezing and wrappers. Changes the model in place."""


class CoordQwen3VLLoader(Qwen3VLLoader):
    """ms-swift's loader, but it runs no Python code that comes with a model."""

    default_trust_remote_code = False


class TrustingLoader(CoordQwen3VLLoader):
    """Runs code that comes with a model; the user has allowed it (`coordexp.swift_bridge.remote_code`)."""

    default_trust_remote_code = True


class PreparingLoader(CoordQwen3VLLoader):
    """With `prepare` after loading. Of the module: templates, which go to workers, refer to it."""

    prepare: PrepareModel

    def load(self) -> Any:
        model, processor = super().load()
        if model is not None:
            type(self).prepare(model, self._get_tokenizer(processor), Path(self.model_info.model_dir))
        return model, processor


def in_turn(*preparations: PrepareModel) -> PrepareModel:
    """One function for several, called one after another."""

    def prepare(model: Any, tokenizer: Any, model_dir: Path) -> None:
        for preparation in preparations:
            preparation(model, tokenizer, model_dir)

    return prepare


def use_safe_loader() -> None:
    """From here on models of type `qwen3_vl` are loaded without their own code, unless something was chosen before."""
    if MODEL_MAPPING[MLLMModelType.qwen3_vl].loader is Qwen3VLLoader:
        _load_with(CoordQwen3VLLoader)


def prepare_loaded_models(prepare: PrepareModel, *, trust_remote_code: bool = False) -> None:
    """From here on ms-swift hands every model of type `qwen3_vl` that it loads in this process to `prepare`."""
    PreparingLoader.prepare = staticmethod(prepare)
    PreparingLoader.default_trust_remote_code = trust_remote_code
    _load_with(PreparingLoader)


@contextmanager
def models_as_saved(*, trust_remote_code: bool = False) -> Iterator[None]:
    """Within this context models of type `qwen3_vl` are loaded as ms-swift does, whatever a run has asked for."""
    before = MODEL_MAPPING[MLLMModelType.qwen3_vl].loader
    _load_with(TrustingLoader if trust_remote_code else CoordQwen3VLLoader)
    try:
        yield
    finally:
        _load_with(before)


def _load_with(loader: type[Any]) -> None:
    name = MLLMModelType.qwen3_vl
    MODEL_MAPPING[name] = replace(MODEL_MAPPING[name], loader=loader)
