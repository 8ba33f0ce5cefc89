"""A trained model as a function of pictures.

    with Detector.from_pretrained("runs/NAME/checkpoint-100") as detector:
        found = detector("street.jpg", classes=["car", "bicycle"])
        found.xyxy, found.labels, found.scores

Questions, answers, parsing and scores are those of `coordexp infer` and `coordexp score`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args, overload

import numpy as np
from PIL import Image

from coordexp.codec.forms.base import AnswerForm
from coordexp.config.schema.prompt import Prompt
from coordexp.config.schema.rollout import Readout
from coordexp.errors import ConfigError, RecordError
from coordexp.eval.predictions.answer_limit import LEAST_LIMIT
from coordexp.eval.predictions.predict import answer
from coordexp.inference.asked_pictures import AskedPicture, Picture, asked_pictures
from coordexp.inference.checked_model import CheckedModel
from coordexp.inference.class_names import checked_classes, prompt_for
from coordexp.inference.detections import Detections, detections_of
from coordexp.inference.infer import load_backend
from coordexp.inference.picture_room import PictureRoom
from coordexp.inference.settings import InferSettings
from coordexp.rollout.backend import RolloutBackend

Backend = Literal["hf", "vllm", "openai"]
Answer = tuple[dict[str, Any], dict[str, Any]]
"""A line of `gt_vs_pred.jsonl` and one of the token trace."""


class Detector:
    """A loaded model, asked about one picture or many.

    Use it as a context, or `close` it, to give back what the backend holds.

    Attributes:
        model: The folder it was loaded from.
        prompt: What it is asked where a call says nothing else: as it was trained.
        settings: How it answers.
    """

    def __init__(
        self,
        model: Path,
        settings: InferSettings,
        checked: CheckedModel,
        backend: RolloutBackend,
        tokenizer: Any,
    ) -> None:
        """Users call `from_pretrained`."""
        self.model = model
        self.settings = settings
        self.prompt = checked.asking.prompt
        self._checked = checked
        self._backend = backend
        self._tokenizer = tokenizer

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | os.PathLike[str],
        *,
        backend: Backend = "hf",
        batch_size: int = 16,
        max_new_tokens: int | None = None,
        torch_dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        system: str | None = None,
        answer_form: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_model_len: int | None = None,
        trust_remote_code: bool = False,
        base_url: str | None = None,
        served_model: str | None = None,
        api_key_env: str | None = None,
    ) -> Self:
        """Load a model.

        Args:
            path_or_hub_id: A model folder, a checkpoint, a folder of LoRA weights or coordinate offsets (backend
                hf), or the id of a model on the Hugging Face hub, which is downloaded once.
            backend: "hf" (transformers), "vllm" (an engine in this process), or "openai" (a server that speaks
                OpenAI's format; the path is then where its tokenizer is).
            batch_size: Answers at a time.
            max_new_tokens: Longest answer; None: 1024, or half of what the model takes where that is less.
            torch_dtype: Of the weights.
            system: System message; None: as the model was trained, "" for none.
            answer_form: How answers are read (`coordjson`, `coordjson_numbers`, `qwen`, `compact`); None: as trained.
            min_pixels: Smaller pictures are enlarged; None: as trained.
            max_pixels: Larger pictures are made smaller; None: as trained.
            max_model_len: Of vllm, the longest prompt with its answer; None: what the model takes.
            trust_remote_code: Run Python code that comes with the checkpoint.
            base_url: Of openai, the server's address, such as "http://127.0.0.1:8000/v1".
            served_model: Of openai, the name the server knows the model by.
            api_key_env: Of openai, the environment variable that holds the key.

        Raises:
            ConfigError: The folder is no model, a hub id cannot be fetched, or settings do not go together.
        """
        model = model_folder(path_or_hub_id)
        settings = InferSettings(
            backend=backend,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            torch_dtype=torch_dtype,
            system=system,
            answer_form=answer_form,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            max_model_len=max_model_len,
            trust_remote_code=trust_remote_code,
            base_url=base_url,
            served_model=served_model,
            api_key_env=api_key_env,
        )
        return cls.load(model, settings)

    @classmethod
    def load(cls, model: Path, settings: InferSettings, checked: CheckedModel | None = None) -> Self:
        """As `from_pretrained`, from settings; `checked` where the folder has been looked at already."""
        checked = checked or CheckedModel.of(model, settings)
        settings = settled(settings, checked)
        loaded, tokenizer = load_backend(model, settings, checked.asking, checked.latents)
        return cls(model, settings, checked, loaded, tokenizer)

    @property
    def form(self) -> AnswerForm:
        """How the model answers."""
        return self._checked.asking.form

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a text is a path, not a sequence of them
        self,
        images: Picture,
        *,
        prompt: str | None = None,
        classes: Sequence[str] | None = None,
        readout: Readout | None = None,
        guided: bool | None = None,
    ) -> Detections: ...
    @overload
    def __call__(
        self,
        images: Sequence[Picture],
        *,
        prompt: str | None = None,
        classes: Sequence[str] | None = None,
        readout: Readout | None = None,
        guided: bool | None = None,
    ) -> list[Detections]: ...
    def __call__(
        self,
        images: Picture | Sequence[Picture],
        *,
        prompt: str | None = None,
        classes: Sequence[str] | None = None,
        readout: Readout | None = None,
        guided: bool | None = None,
    ) -> Detections | list[Detections]:
        """Find the objects of one picture, or of many.

        Args:
            images: A path, a PIL picture or an array (uint8, [H, W, 3] RGB or [H, W] gray), or a sequence of them.
                Files are read as everywhere in this package: upright, in RGB. Addresses are refused.
            prompt: User message; None: the one the model was trained with. `{classes}` in it is where the names go.
            classes: Ask for these names, and drop objects of others (counted under `not_in_classes`); names are
                compared without case. None: any.
            readout: How a coordinate is read from its distribution: "argmax" (the most likely bin), "median" or
                "expectation". None: median, but argmax where the backend or the answers show no distribution.
            guided: Let the model write whole answers in its form only, corners of boxes in their order. None: yes,
                where the backend and the answers can be guided.

        Returns:
            Detections of one picture, or a list in the order of `images`.

        Raises:
            RecordError: Pictures cannot be used; all are named, and none is asked about.
            ConfigError: Settings do not go with the model or its backend.
            RolloutError: The backend fails.
        """
        single = _is_one(images)
        given: list[Picture] = [images] if single else list(images)  # type: ignore[list-item, arg-type]
        question = prompt_for(self.prompt, prompt, names := checked_classes(classes))
        named = [
            (None if _is_path(one) else _number_name(index, single), one) for index, one in enumerate(given)
        ]
        found = asked_pictures(named, self.room(question))
        refuse_bad(found)
        pictures = [one for one in found if isinstance(one, AskedPicture)]
        results = [
            detections_of(picture, line, trace, names)
            for start in range(0, len(pictures), self.settings.chunk_size)
            for chunk in [pictures[start : start + self.settings.chunk_size]]
            for picture, (line, trace) in zip(
                chunk, self.answers(chunk, question, readout=readout, guided=guided), strict=True
            )
        ]
        return results[0] if single else results

    def room(self, prompt: Prompt) -> PictureRoom:
        """How large pictures may be with this question."""
        return replace(self._checked, asking=self._checked.asking._replace(prompt=prompt)).room(
            self.settings.longest_answer
        )

    def answers(
        self,
        pictures: Sequence[AskedPicture],
        prompt: Prompt,
        *,
        readout: Readout | None = None,
        guided: bool | None = None,
    ) -> list[Answer]:
        """The answers to one question about some pictures, as `coordexp infer` writes them.

        Raises as a call does.
        """
        self._decode(decoding_for(self.settings, self.form, readout=readout, guided=guided))
        requests = [picture.request(prompt) for picture in pictures]
        records = [picture.record for picture in pictures]
        lines, traces = answer(records, requests, self._backend, self._tokenizer, self.form)
        return list(zip(lines, traces, strict=True))

    def close(self) -> None:
        """Give back what the backend holds; a second call does nothing."""
        self._backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _decode(self, settings: InferSettings) -> None:
        """From here on decode so."""
        if settings == self.settings:
            return
        self.settings = settings
        backend: Any = self._backend
        if settings.backend != "openai":
            backend.settings = settings.decoding


def settled(settings: InferSettings, checked: CheckedModel) -> InferSettings:
    """With the limit that was left open, decoding as `decoding_for` has it by default."""
    limit = settings.max_new_tokens or min(LEAST_LIMIT, checked.length // 2)
    return decoding_for(replace(settings, max_new_tokens=limit), checked.asking.form)


def decoding_for(
    settings: InferSettings, form: AnswerForm, *, readout: Readout | None = None, guided: bool | None = None
) -> InferSettings:
    """With coordinates read and answers guided as asked; None: by the median and guided, where that can be.

    Raises ConfigError for a readout that does not exist, and for what the backend or the form cannot do.
    """
    why_not = _why_plain(settings.backend, form)
    if readout not in (None, *get_args(Readout)):
        raise ConfigError(f"readout is {readout!r}: expected one of {', '.join(get_args(Readout))}")
    if why_not and readout not in (None, "argmax"):
        raise ConfigError(f"readout is {readout!r}, but {why_not}; use argmax, or leave it out.")
    if why_not and guided:
        raise ConfigError(f"guided is asked for, but {why_not}; leave it out.")
    return replace(
        settings,
        coord=readout or replace(settings, coord=None).readout_of(form),
        guided=not why_not if guided is None else guided,
    )


def _why_plain(backend: str, form: AnswerForm) -> str | None:
    """Why answers can only be the most likely tokens; None where they need not be."""
    if backend == "openai":
        return "an OpenAI-compatible server writes the most likely token"
    if not form.has_coord_tokens:
        return f"these answers ({form.name}) write numbers, not coordinate tokens"
    return None


def model_folder(path_or_hub_id: str | os.PathLike[str]) -> Path:
    """A folder as it is, or the snapshot of a hub model; ConfigError where it is neither."""
    text = os.fspath(path_or_hub_id)
    path = Path(text)
    looks_like_id = text.count("/") <= 1 and not text.startswith((".", "/", "~")) and not path.exists()
    if path.is_dir() or not looks_like_id:
        return path  # what is no model folder is refused by name where it is looked at
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{text} is neither a folder nor a model that the Hugging Face hub gives ({type(error).__name__}: {reason})"
        ) from error


def refuse_bad(found: Sequence[AskedPicture | RecordError]) -> None:
    """RecordError that names every picture that cannot be used."""
    faults = [str(one) for one in found if isinstance(one, RecordError)]
    if len(faults) == 1:
        raise RecordError(faults[0])
    if faults:
        listed = "\n".join(f"  {fault}" for fault in faults)
        raise RecordError(f"{len(faults)} of {len(found)} pictures cannot be used:\n{listed}")


def _is_path(picture: object) -> bool:
    return isinstance(picture, (str, os.PathLike))


def _is_one(images: object) -> bool:
    if isinstance(images, np.ndarray) and images.ndim == 4:
        raise RecordError(
            f"images is one array of the shape {list(images.shape)}: give a list of arrays [H, W, 3], such as "
            "list(images)."
        )
    return _is_path(images) or isinstance(images, (Image.Image, np.ndarray))


def _number_name(index: int, single: bool) -> str:
    return "picture" if single else f"picture {index}"
