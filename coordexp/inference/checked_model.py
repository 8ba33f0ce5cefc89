"""A checkpoint folder as far as it can be looked at without its weights: how it is asked, how long it may answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordexp.codec.coord_vocab import CoordVocab, has_coord_tokens
from coordexp.codec.forms.base import AnswerForm
from coordexp.codec.records import Record
from coordexp.errors import ConfigError
from coordexp.files import read_json
from coordexp.image_size import PixelLimits
from coordexp.inference.asking import Asking, asking
from coordexp.inference.fingerprint import model_fingerprint
from coordexp.inference.latents import Latents, check_backend
from coordexp.inference.picture_room import PictureRoom
from coordexp.inference.settings import PROMPT_SETTINGS, InferSettings

_TEMPLATE_TOKENS = 64  # of a prompt beside the question and its images, at most


@dataclass(frozen=True)
class CheckedModel:
    """What a model folder says of itself, without its weights.

    model: the folder.
    length: the most tokens of a question with its answer.  limits: of its pictures.
    latents: what is read in the place of a question's text; None: the text.
    """

    model: Path
    asking: Asking
    tokenizer: Any
    length: int
    limits: PixelLimits
    latents: Latents | None = None

    @classmethod
    def of(cls, model: Path, settings: InferSettings) -> CheckedModel:
        """Raises ConfigError for a folder that is no checkpoint, or does not go with the settings."""
        check_checkpoint(model, settings.backend)
        flags = {name: flag for name, (_, flag) in PROMPT_SETTINGS.items()}
        tokenizer = load_tokenizer(model)
        latents = Latents.of(model, settings.prompt_latents, settings.keep_prob)
        check_backend(latents, settings.backend)
        asked = asking(model, settings.given, flags=flags, has_coord_tokens=has_coord_tokens(tokenizer))
        if latents is not None and settings.prompt is None:
            asked = latents.asked(asked)
        check_form(asked.form, tokenizer, settings)
        folder = holder_of(model, "processor_config.json", "preprocessor_config.json")
        limits = PixelLimits.of_folder(folder).within(
            min_pixels=asked.prompt.min_pixels, max_pixels=asked.prompt.max_pixels
        )
        length = settings.max_model_len or model_length(model)
        return cls(model, asked, tokenizer, length, limits, latents)

    def room(self, max_new_tokens: int, records: Sequence[Record] = ()) -> PictureRoom:
        """What answers of that length leave to pictures.  records: whose classes the prompt may name."""
        prompt = self.asking.prompt
        lists = {record.classes for record in records if prompt.names_classes} | {None}
        longest = max(len(prompt.user_text(classes).encode()) for classes in lists)
        question = len((prompt.system or "").encode()) + longest
        return PictureRoom(
            self.limits,
            self.length - max_new_tokens - question - _TEMPLATE_TOKENS,
            f"the model's length of {self.length} tokens, with {max_new_tokens} for the answer,",
        )

    def decisive(self, settings: InferSettings, max_new_tokens: int) -> dict[str, Any]:
        """What decides an answer beside the picture, as `infer_run.json` keeps it."""
        server = {"base_url": settings.base_url, "served_model": settings.served_model}
        return {
            "model_hash": model_fingerprint(self.model),
            **self._question(),
            **({} if settings.cut_prompt is None else {"cut_prompt": settings.cut_prompt}),
            **({} if self.latents is None else {"latents": self.latents.decisive}),
            "backend": settings.backend,
            "decoding": {
                "temperature": settings.temperature,
                "seed": settings.seed if settings.temperature else None,
                "repetition_penalty": settings.repetition_penalty,
                "coord": settings.coord,
                "guided": settings.guided,
                "guided_max_objects": settings.guided_max_objects,
                "max_new_tokens": max_new_tokens,
                **(server if settings.backend == "openai" else {"torch_dtype": settings.torch_dtype}),
            },
        }

    def _question(self) -> dict[str, Any]:
        prompt = self.asking.prompt
        return {
            "prompt": prompt.user,
            "system": prompt.system,
            "media_order": prompt.media_order,
            "template": prompt.template,
            **({} if self.asking.form.name == "coordjson" else {"answer_form": self.asking.form.name}),
            "object_field_order": prompt.object_field_order,
            "pixels": {"min_pixels": self.limits.min_pixels, "max_pixels": self.limits.max_pixels},
        }


def check_checkpoint(model: Path, backend: str) -> None:
    """ConfigError unless the folder holds what the backend loads."""
    if not any((model / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ConfigError(
            f"{model} is not a model folder (no config.json). Give a checkpoint folder, for example "
            "runs/NAME/checkpoint-100, or make a tiny model with `coordexp model tiny --output DIR`."
        )
    from coordexp.models.coord_offset import OFFSET_FILE
    from coordexp.models.merge_offset import is_adapter

    has_offsets = (model / OFFSET_FILE).is_file()
    if backend != "hf" and (is_adapter(model) or has_offsets):
        raise ConfigError(
            f"{model} holds an adapter (LoRA weights or coordinate offsets), which --backend {backend} does not load; "
            "make a plain checkpoint with `coordexp model merge` or `swift export --merge_lora`, or use "
            "--backend hf."
        )


def load_tokenizer(model: Path) -> Any:
    """The tokenizer of a checkpoint (of an adapter without one: that of its base model)."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(holder_of(model, "tokenizer_config.json"))


def check_form(form: AnswerForm, tokenizer: Any, settings: InferSettings) -> None:
    """ConfigError unless tokenizer and settings go with the form of the answers."""
    if form.has_coord_tokens:
        CoordVocab.from_tokenizer(tokenizer)
    elif settings.coord not in (None, "argmax"):
        raise ConfigError(
            f"--coord {settings.coord} reads the distribution over coordinate tokens, and these answers ({form.name}) "
            "write numbers; leave it out."
        )
    elif settings.guided:
        raise ConfigError(
            f"--guided writes coordinate tokens, and these answers ({form.name}) are of numbers; leave it out."
        )


def holder_of(model: Path, *names: str) -> Path:
    """The folder that holds one of these files: that of the checkpoint, or of an adapter's base model."""
    if any((model / name).is_file() for name in names):
        return model
    from coordexp.models.merge_offset import base_model, is_adapter

    return Path(base_model(model)) if is_adapter(model) else model


def model_length(model: Path) -> int:
    """The most tokens that a checkpoint takes, by its configuration."""
    path = holder_of(model, "config.json") / "config.json"
    config = read_json(path, error=ConfigError)
    length = config.get("text_config", config).get("max_position_embeddings")
    if not isinstance(length, int):
        raise ConfigError(f"{path}: no text_config.max_position_embeddings; is this a Qwen3-VL model?")
    return length
