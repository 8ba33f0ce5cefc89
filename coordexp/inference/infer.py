"""Inference over a JSONL file, shared by `coordexp infer` and `coordexp demo`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from coordexp.codec.coord_vocab import CoordVocab
from coordexp.codec.forms.base import AnswerForm
from coordexp.codec.records import Record, read_jsonl
from coordexp.config.api_key import api_key_from
from coordexp.control.schedule import request_seed, rollout_seed_base
from coordexp.data.dataset import conversation
from coordexp.data.latent.spans import cut_prompt
from coordexp.errors import RecordError
from coordexp.eval.predictions.answer_limit import answer_limit
from coordexp.eval.predictions.artifacts import GT_VS_PRED
from coordexp.eval.predictions.image_result import ImageResult
from coordexp.eval.predictions.log import PredictionLog
from coordexp.eval.predictions.predict import predict
from coordexp.eval.predictions.scored import read_predictions
from coordexp.inference.asking import Asking
from coordexp.inference.bad_pictures import PictureCheck
from coordexp.inference.checked_model import CheckedModel, check_checkpoint, check_form
from coordexp.inference.fingerprint import file_fingerprint
from coordexp.inference.latents import Latents
from coordexp.inference.settings import InferSettings
from coordexp.models.model_files import PREFIX_FILES
from coordexp.rollout.backend import RolloutBackend
from coordexp.rollout.types import RolloutRequest

if TYPE_CHECKING:
    from coordexp.rollout.backends.vllm_offline import VllmOfflineBackend


@dataclass(frozen=True)
class Inference:
    """A checked job: everything that bad input can break has been looked at, the model is not loaded yet."""

    model: Path
    data: Path
    output: Path
    settings: InferSettings
    records: list[Record]
    checked: CheckedModel
    max_new_tokens: int
    pictures: PictureCheck

    @classmethod
    def prepare(cls, model: Path, data: Path, output: Path, settings: InferSettings) -> Inference:
        """Raises RecordError for bad data or pictures (all named), ConfigError for a folder that is no checkpoint."""
        check_checkpoint(model, settings.backend)
        records = read_jsonl(data)[: settings.limit]
        if not records:
            raise RecordError(f"{data}: holds no record; expected one JSON object per line.")
        checked = CheckedModel.of(model, settings)
        settings = replace(settings, coord=settings.readout_of(checked.asking.form))
        limit = settings.max_new_tokens or min(
            answer_limit(records, checked.tokenizer, form=checked.asking.form),
            checked.length // 2,
        )
        if checked.latents is not None:
            checked.latents.check_records(records, checked.asking.prompt)
        pictures = PictureCheck.of(records, checked.room(limit, records), skip=settings.bad_images == "skip")
        return cls(model, data, output, settings, records, checked, limit, pictures)

    @property
    def asking(self) -> Asking:
        """How the model is asked."""
        return self.checked.asking

    def decoded(self, settings: InferSettings, output: Path) -> Inference:
        """The same questions, to be answered into another folder.

        settings: with another way to decode, else the same; ConfigError for one that the answers' form does not have.
        """
        check_form(self.asking.form, self.checked.tokenizer, settings)
        return replace(self, settings=settings, output=output)

    def opened(self, *, overwrite: bool) -> AbstractContextManager[PredictionLog]:
        """The log of this run, with what an earlier, stopped run has answered already.

        overwrite: start anew whatever `output` holds; otherwise predictions made with other settings are refused
        (ConfigError naming what differs).
        """
        return PredictionLog.open(
            self.output,
            {
                "data_hash": file_fingerprint(self.data),
                "num_images": len(self.records),
                **self.checked.decisive(self.settings, self.max_new_tokens),
            },
            num_images=len(self.records),
            chunk_size=self.settings.chunk_size,
            overwrite=overwrite,
            notes=self._notes(),
        )

    def load_backend(self) -> tuple[RolloutBackend, Any]:
        """The backend with the model loaded, and its tokenizer."""
        settings = replace(self.settings, max_new_tokens=self.max_new_tokens)
        return load_backend(self.model, settings, self.asking, self.checked.latents)

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
        questions = [self._asked(record) for record in self.records]
        base = rollout_seed_base(0, self.settings.seed)  # far from those of the next seed
        return [
            RolloutRequest(
                tuple(q["messages"]), tuple(q["images"]), request_seed(base, index), record.images[0]
            )
            for index, (q, record) in enumerate(zip(questions, self.records, strict=True))
        ]

    def _asked(self, record: Record) -> dict[str, Any]:
        limit = self.settings.cut_prompt
        if limit is None:
            return conversation(record, self.asking.prompt)
        tokenizer, text = self.checked.tokenizer, self.asking.prompt.user_text(record.classes)
        kept = cut_prompt(tokenizer, tokenizer.encode(text, add_special_tokens=False), limit)
        return conversation(record, self.asking.prompt.model_copy(update={"user": kept, "rendered": None}))

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


def load_backend(
    model: Path, settings: InferSettings, asking: Asking, latents: Latents | None = None
) -> tuple[RolloutBackend, Any]:
    """The backend with the model loaded, and its tokenizer.

    latents: what it reads in the place of a question's text.

    Raises ConfigError when the tokenizer lacks coordinate tokens that the answers need, or the template writes another
    prompt than trained.
    """
    if settings.backend == "hf":
        return _hf_backend(model, settings, asking, latents)
    from coordexp.swift_bridge.checkpoint import load_template, quiet

    quiet()
    with ExitStack() as stack:
        folder = stack.enter_context(_without_prefix(model)) if settings.backend == "vllm" else model
        template = load_template(folder, prompt=asking.prompt, trust_remote_code=settings.trust_remote_code)
        _check_template(template, asking)
        if settings.backend == "vllm":
            engine = _vllm_backend(folder, template, settings, asking.form, latents)
            engine.when_closed = stack.pop_all().close
            return engine, template.tokenizer
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


@contextmanager
def _without_prefix(model: Path) -> Iterator[Path]:
    """The folder that an engine loads, which takes every safetensors file for weights of the model.

    Where a prefix lies beside them: one without it, until it is closed.
    """
    if not (model / PREFIX_FILES[0]).is_file():
        yield model
        return
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / model.name
        folder.mkdir()
        for path in model.iterdir():
            if path.name not in PREFIX_FILES:
                (folder / path.name).symlink_to(path.resolve())
        yield folder


def _hf_backend(
    model: Path, settings: InferSettings, asking: Asking, latents: Latents | None
) -> tuple[RolloutBackend, Any]:
    import torch

    from coordexp.models.merge_offset import base_model, is_adapter, with_adapter
    from coordexp.rollout.backends.hf import HfBackend
    from coordexp.rollout.backends.latent import LatentHfBackend
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
    made: dict[str, Any] = {
        "form": asking.form,
        "token_logprobs": True,
        "coord_distributions": asking.form.has_coord_tokens,
    }
    if latents is None:
        return HfBackend(settings.decoding, loaded, template, **made), template.tokenizer
    vectors = latents.vectors_for(loaded, template.tokenizer)
    return LatentHfBackend(settings.decoding, loaded, template, vectors=vectors, **made), template.tokenizer


def _vllm_backend(
    model: Path, template: Any, settings: InferSettings, form: AnswerForm, latents: Latents | None
) -> VllmOfflineBackend:
    import torch

    from coordexp.rollout.backends.vllm_latent import LatentVllmBackend
    from coordexp.rollout.backends.vllm_offline import VllmOfflineBackend

    dtype = getattr(torch, settings.torch_dtype)
    made: dict[str, Any] = {"dtype": dtype, "form": form, "max_model_len": settings.max_model_len}
    if latents is None:
        return VllmOfflineBackend(settings.decoding, model, template, **made)
    vectors, embedding = latents.beside_engine(
        model, dtype=dtype, trust_remote_code=settings.trust_remote_code
    )
    return LatentVllmBackend(settings.decoding, model, template, vectors=vectors, embedding=embedding, **made)
