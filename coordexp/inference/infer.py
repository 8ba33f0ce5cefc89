"""Inference over a JSONL file, shared by `coordexp infer` and `coordexp demo`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from coordexp.codec.coord_vocab import CoordVocab, has_coord_tokens
from coordexp.codec.forms.base import AnswerForm
from coordexp.codec.records import Record, read_jsonl
from coordexp.config.api_key import api_key_from
from coordexp.config.prompt import system_text
from coordexp.config.schema.rollout import Decoding, Readout, RolloutMatching
from coordexp.control.schedule import request_seed, rollout_seed_base
from coordexp.data.dataset import conversation
from coordexp.errors import ConfigError, RecordError
from coordexp.eval.predictions.answer_limit import LEAST_LIMIT, answer_limit
from coordexp.eval.predictions.artifacts import GT_VS_PRED
from coordexp.eval.predictions.image_result import ImageResult
from coordexp.eval.predictions.log import PredictionLog
from coordexp.eval.predictions.predict import predict
from coordexp.eval.predictions.scored import read_predictions
from coordexp.files import read_json
from coordexp.image_size import PixelLimits
from coordexp.inference.asking import Asking, asking
from coordexp.inference.bad_pictures import BAD_IMAGES, PictureCheck
from coordexp.inference.fingerprint import file_fingerprint, model_fingerprint
from coordexp.inference.picture_room import PictureRoom
from coordexp.rollout.backend import RolloutBackend
from coordexp.rollout.types import RolloutRequest

BACKENDS = ("hf", "vllm", "openai")
PROMPT_SETTINGS = {
    "user": ("prompt", "--prompt"),
    "system": ("system", "--system"),
    "media_order": ("media_order", "--media-order"),
    "answer_form": ("answer_form", "--answer-form"),
    "object_field_order": ("field_order", "--object-field-order"),
    "min_pixels": ("min_pixels", "--min-pixels"),
    "max_pixels": ("max_pixels", "--max-pixels"),
}
"""Name in `Prompt` -> name in `InferSettings` and flag of the command."""
_TEMPLATE_TOKENS = 64  # of a prompt beside the question and its images, at most
_CHUNK_OF_BATCHES = 4  # of backends that keep their batch filled: fewer waits for the slowest answer


@dataclass(frozen=True, kw_only=True)
class InferSettings:
    """How to answer.

    prompt, system, media_order, answer_form, field_order, min_pixels, max_pixels: as in
        `coordexp.config.schema.prompt`; None takes what the checkpoint was trained with, an empty `system` is none.
    max_new_tokens: None derives it from the longest ground truth.
    temperature: 0: greedy.  seed: of sampled answers.  repetition_penalty: 1: none.
    coord: argmax, median or expectation (`coordexp.rollout.decoding.readout`).
    guided: only whole answers in the checkpoint's form can be written (`coordexp.rollout.decoding.guided`), of at most
        `guided_max_objects` objects.
    max_model_len: of the vllm backend; None takes the model's own.
    trust_remote_code: run Python code that comes with the checkpoint; without it such a checkpoint is refused.
    bad_images: "skip" answers nothing for pictures that cannot be used, and records them.
    base_url, served_model, api_key_env: of the openai backend; the key is read from that environment variable.
    """

    backend: str = "hf"
    limit: int | None = None
    batch_size: int = 16
    max_new_tokens: int | None = None
    torch_dtype: str = "float32"
    prompt: str | None = None
    system: str | None = None
    media_order: str | None = None
    answer_form: str | None = None
    field_order: str | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    temperature: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    coord: Readout = "argmax"
    guided: bool = False
    guided_max_objects: int | None = None
    max_model_len: int | None = None
    base_url: str | None = None
    served_model: str | None = None
    api_key_env: str | None = None
    trust_remote_code: bool = False
    bad_images: str = "error"

    def __post_init__(self) -> None:
        if self.bad_images not in BAD_IMAGES:
            raise ConfigError(f"bad_images is {self.bad_images!r}: expected one of {', '.join(BAD_IMAGES)}")
        if self.backend not in BACKENDS:
            raise ConfigError(f"backend is {self.backend!r}: expected one of {', '.join(BACKENDS)}")
        if self.backend == "openai" and not (self.base_url and self.served_model):
            raise ConfigError(
                "--backend openai needs --base-url (http://host:port/v1) and --served-model, the name the server "
                "knows the model by."
            )
        if self.backend != "openai" and (self.base_url or self.served_model or self.api_key_env):
            raise ConfigError("--base-url, --served-model and --api-key-env belong to --backend openai.")
        if self.backend == "openai":
            self._check_server_decoding()
        most = 2.0 if self.backend == "vllm" else float("inf")
        if not 0 <= self.temperature <= most or self.repetition_penalty <= 0:
            raise ConfigError(
                f"--temperature {self.temperature:g} and --repetition-penalty {self.repetition_penalty:g}: expected a "
                "temperature of at least 0 (vllm: 2 at most) and a penalty above 0."
            )
        if self.guided_max_objects is not None and not self.guided:
            raise ConfigError("--guided-max-objects belongs to --guided.")
        if self.backend != "vllm" and self.max_model_len is not None:
            raise ConfigError("--max-model-len belongs to --backend vllm.")
        api_key_from("--api-key-env", self.api_key_env)  # before anything is loaded

    def _check_server_decoding(self) -> None:
        for flag, is_given in (
            (f"--coord {self.coord}", self.coord != "argmax"),
            ("--guided", self.guided),
            (f"--temperature {self.temperature:g}", self.temperature != 0),
            (f"--repetition-penalty {self.repetition_penalty:g}", self.repetition_penalty != 1),
        ):
            if is_given:
                raise ConfigError(
                    f"{flag} needs --backend hf or vllm: an OpenAI-compatible server writes the most likely token."
                )

    @property
    def decoding(self) -> RolloutMatching:
        """As the backends hf and vllm take it."""
        return RolloutMatching(
            backend="hf" if self.backend == "hf" else "vllm",
            max_new_tokens=self.longest_answer,
            decode_batch_size=self.batch_size,
            generate_timeout_s=None,
            repetition_penalty=self.repetition_penalty,
            decoding=Decoding(
                temperature=self.temperature,
                coord=self.coord,
                guided=self.guided,
                guided_max_objects=self.guided_max_objects,
            ),
        )

    @property
    def longest_answer(self) -> int:
        """Tokens; where nothing was said or derived, the least limit that is ever derived."""
        return self.max_new_tokens or LEAST_LIMIT

    @property
    def given(self) -> dict[str, Any]:
        """What is asked in another way than the model was trained, by names of `Prompt`."""
        values = {name: getattr(self, field) for name, (field, _) in PROMPT_SETTINGS.items()}
        given = {name: value for name, value in values.items() if value is not None}
        return {**given, "system": system_text(self.system)} if self.system is not None else given

    @property
    def chunk_size(self) -> int:
        """Images between two writes."""
        return self.batch_size * (1 if self.backend == "hf" else _CHUNK_OF_BATCHES)


@dataclass(frozen=True)
class Inference:
    """A checked job: everything that bad input can break has been looked at, the model is not loaded yet."""

    model: Path
    data: Path
    output: Path
    settings: InferSettings
    records: list[Record]
    asking: Asking
    max_new_tokens: int
    limits: PixelLimits
    pictures: PictureCheck

    @classmethod
    def prepare(cls, model: Path, data: Path, output: Path, settings: InferSettings) -> Inference:
        """Raises RecordError for bad data or pictures (all named), ConfigError for a folder that is no checkpoint."""
        check_checkpoint(model, settings.backend)
        records = read_jsonl(data)[: settings.limit]
        if not records:
            raise RecordError(f"{data}: holds no record; expected one JSON object per line.")
        flags = {name: flag for name, (_, flag) in PROMPT_SETTINGS.items()}
        tokenizer = load_tokenizer(model)
        asked = asking(model, settings.given, flags=flags, has_coord_tokens=has_coord_tokens(tokenizer))
        _check_form(asked.form, tokenizer, settings)
        length = settings.max_model_len or model_length(model)
        limit = settings.max_new_tokens or min(
            answer_limit(records, tokenizer, form=asked.form),
            length // 2,
        )
        folder = holder_of(model, "processor_config.json", "preprocessor_config.json")
        limits = PixelLimits.of_folder(folder).within(
            min_pixels=asked.prompt.min_pixels, max_pixels=asked.prompt.max_pixels
        )
        question = len((asked.prompt.system or "").encode()) + len(asked.prompt.user.encode())
        room = PictureRoom(
            limits,
            length - limit - question - _TEMPLATE_TOKENS,
            f"the model's length of {length} tokens, with {limit} for the answer,",
        )
        pictures = PictureCheck.of(records, room, skip=settings.bad_images == "skip")
        return cls(model, data, output, settings, records, asked, limit, limits, pictures)

    def opened(self, *, overwrite: bool) -> AbstractContextManager[PredictionLog]:
        """The log of this run, with what an earlier, stopped run has answered already.

        overwrite: start anew whatever `output` holds; otherwise predictions made with other settings are refused
        (ConfigError naming what differs).
        """
        return PredictionLog.open(
            self.output,
            self._decisive(),
            num_images=len(self.records),
            chunk_size=self.settings.chunk_size,
            overwrite=overwrite,
            notes=self._notes(),
        )

    def load_backend(self) -> tuple[RolloutBackend, Any]:
        """The backend with the model loaded, and its tokenizer."""
        settings = replace(self.settings, max_new_tokens=self.max_new_tokens)
        return load_backend(self.model, settings, self.asking)

    def answer(
        self,
        log: PredictionLog,
        backend: RolloutBackend,
        tokenizer: Any,
        on_images: Callable[[int, int], object] | None = None,
    ) -> None:
        """Answer what `log` does not hold yet.

        on_images: called with (images just done, images in all); at first with those that were done before.
        """
        total = len(self.records)
        if on_images is not None:
            on_images(log.num_done, total)
        predict(
            self.records,
            self.requests(),
            backend,
            tokenizer,
            log,
            form=self.asking.form,
            chunk_size=self.settings.chunk_size,
            picture_faults=self.pictures,
            on_images=None if on_images is None else lambda done: on_images(done, total),
        )

    def requests(self) -> list[RolloutRequest]:
        """What the backend is asked, one question per record."""
        questions = [conversation(record, self.asking.prompt) for record in self.records]
        base = rollout_seed_base(0, self.settings.seed)  # far from those of the next seed
        return [
            RolloutRequest(
                tuple(q["messages"]), tuple(q["images"]), request_seed(base, index), record.images[0]
            )
            for index, (q, record) in enumerate(zip(questions, self.records, strict=True))
        ]

    def _decisive(self) -> dict[str, Any]:
        """What decides the predictions, as `infer_run.json` keeps it."""
        settings = self.settings
        server = {"base_url": settings.base_url, "served_model": settings.served_model}
        return {
            "model_hash": model_fingerprint(self.model),
            "data_hash": file_fingerprint(self.data),
            "num_images": len(self.records),
            **self._question(),
            "backend": settings.backend,
            "decoding": {
                "temperature": settings.temperature,
                "seed": settings.seed if settings.temperature else None,
                "repetition_penalty": settings.repetition_penalty,
                "coord": settings.coord,
                "guided": settings.guided,
                "guided_max_objects": settings.guided_max_objects,
                "max_new_tokens": self.max_new_tokens,
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

    def _notes(self) -> dict[str, Any]:
        return {
            "model": str(self.model.resolve()),
            "data": str(self.data.resolve()),
            "batch_size": self.settings.batch_size,
            "bad_images": self.settings.bad_images,
        }


def infer_file(
    model: Path,
    data: Path,
    output: Path,
    *,
    overwrite: bool = True,
    on_images: Callable[[int, int], object] | None = None,
    **settings: Any,
) -> list[ImageResult]:
    """Greedy predictions of `model` on the records of `data`, as `gt_vs_pred.jsonl` holds them.

    settings: fields of `InferSettings`.  on_images, overwrite: see `Inference`.
    """
    job = Inference.prepare(model, data, output, InferSettings(**settings))
    with job.opened(overwrite=overwrite) as log:
        backend, tokenizer = job.load_backend()
        with closing(backend):
            job.answer(log, backend, tokenizer, on_images=on_images)
    return read_predictions(output / GT_VS_PRED, scored=False)


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


def _check_form(form: AnswerForm, tokenizer: Any, settings: InferSettings) -> None:
    """ConfigError unless tokenizer and settings go with the form of the answers."""
    if form.has_coord_tokens:
        CoordVocab.from_tokenizer(tokenizer)
    elif settings.coord != "argmax":
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


def load_backend(model: Path, settings: InferSettings, asking: Asking) -> tuple[RolloutBackend, Any]:
    """The backend with the model loaded, and its tokenizer.

    Raises ConfigError when the tokenizer lacks coordinate tokens that the answers need, or the template writes another
    prompt than trained.
    """
    if settings.backend == "hf":
        return _hf_backend(model, settings, asking)
    from coordexp.swift_bridge.checkpoint import load_template, quiet

    quiet()
    template = load_template(model, prompt=asking.prompt, trust_remote_code=settings.trust_remote_code)
    _check_template(template, asking)
    if settings.backend == "vllm":
        return _vllm_backend(model, template, settings, asking.form), template.tokenizer
    from coordexp.rollout.backends.openai_client import OpenAiBackend

    key = api_key_from("--api-key-env", settings.api_key_env) or "none"
    backend = OpenAiBackend(
        str(settings.base_url),
        str(settings.served_model),
        template.tokenizer,
        settings.longest_answer,
        settings.batch_size,
        key,
        limits=template.pixel_limits,
        template=template,
    )
    return backend, template.tokenizer


def _check_template(template: Any, asking: Asking) -> None:
    from coordexp.swift_bridge.prompts import check_rendering

    if asking.form.has_coord_tokens:
        CoordVocab.from_tokenizer(template.tokenizer)
    if asking.record is not None:
        check_rendering(template, asking.record)


def _hf_backend(model: Path, settings: InferSettings, asking: Asking) -> tuple[RolloutBackend, Any]:
    import torch

    from coordexp.models.merge_offset import base_model, is_adapter, with_adapter
    from coordexp.rollout.backends.hf import HfBackend
    from coordexp.swift_bridge.checkpoint import load_model, quiet

    quiet()
    loaded, template = load_model(
        base_model(model) if is_adapter(model) else model,
        prompt=asking.prompt,
        prepare_model=lambda plain: with_adapter(plain, model),
        torch_dtype=getattr(torch, settings.torch_dtype),
        trust_remote_code=settings.trust_remote_code,
    )
    _check_template(template, asking)
    backend = HfBackend(
        settings.decoding,
        loaded,
        template,
        form=asking.form,
        token_logprobs=True,
        coord_distributions=asking.form.has_coord_tokens,
    )
    return backend, template.tokenizer


def _vllm_backend(model: Path, template: Any, settings: InferSettings, form: AnswerForm) -> RolloutBackend:
    import torch

    from coordexp.rollout.backends.vllm_offline import VllmOfflineBackend

    return VllmOfflineBackend(
        settings.decoding,
        model,
        template,
        dtype=getattr(torch, settings.torch_dtype),
        form=form,
        max_model_len=settings.max_model_len,
    )
