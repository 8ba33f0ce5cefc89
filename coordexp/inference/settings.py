"""How a checkpoint answers: what `coordexp infer` and the Detector take, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from coordexp.codec.forms.base import AnswerForm
from coordexp.config.api_key import api_key_from
from coordexp.config.prompt import system_text
from coordexp.config.schema.rollout import Decoding, Readout, RolloutMatching
from coordexp.errors import ConfigError
from coordexp.eval.predictions.answer_limit import LEAST_LIMIT
from coordexp.inference.bad_pictures import BAD_IMAGES

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
_CHUNK_OF_BATCHES = 4  # of backends that keep their batch filled: fewer waits for the slowest answer


@dataclass(frozen=True, kw_only=True)
class InferSettings:
    """How to answer.

    prompt, system, media_order, answer_form, field_order, min_pixels, max_pixels: as in
        `coordexp.config.schema.prompt`; None takes what the checkpoint was trained with, an empty `system` is none.
    max_new_tokens: None derives it from the longest ground truth.
    temperature: 0: greedy.  seed: of sampled answers.  repetition_penalty: 1: none.
    coord: argmax, median or expectation (`coordexp.rollout.decoding.readout`); None: `readout_of` the answers.
    guided: only whole answers in the checkpoint's form can be written (`coordexp.rollout.decoding.guided`), of at most
        `guided_max_objects` objects.
    max_model_len: of the vllm backend; None takes the model's own.
    trust_remote_code: run Python code that comes with the checkpoint; without it such a checkpoint is refused.
    cut_prompt: ask with the first so many tokens of the user message alone, to see what the rest of it is worth.
    prompt_latents: folder with a latent prefix that is read in the place of the prompt's text; None takes that of the
        checkpoint where it holds one, "none" asks in text.
    keep_prob: of its vectors, in place of the one it was trained with.
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
    coord: Readout | None = "argmax"
    guided: bool = False
    guided_max_objects: int | None = None
    max_model_len: int | None = None
    base_url: str | None = None
    served_model: str | None = None
    api_key_env: str | None = None
    trust_remote_code: bool = False
    bad_images: str = "error"
    cut_prompt: int | None = None
    prompt_latents: str | None = None
    keep_prob: float | None = None

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
        if self.keep_prob is not None and not 0 < self.keep_prob <= 1:
            raise ConfigError(f"--keep-prob {self.keep_prob:g}: expected a probability above 0, at most 1.")
        if self.backend != "vllm" and self.max_model_len is not None:
            raise ConfigError("--max-model-len belongs to --backend vllm.")
        api_key_from("--api-key-env", self.api_key_env)  # before anything is loaded

    def _check_server_decoding(self) -> None:
        for flag, is_given in (
            (f"--coord {self.coord}", self.coord not in (None, "argmax")),
            ("--guided", self.guided),
            (f"--temperature {self.temperature:g}", self.temperature != 0),
            (f"--repetition-penalty {self.repetition_penalty:g}", self.repetition_penalty != 1),
        ):
            if is_given:
                raise ConfigError(
                    f"{flag} needs --backend hf or vllm: an OpenAI-compatible server writes the most likely token."
                )

    def readout_of(self, form: AnswerForm) -> Readout:
        """How coordinates are read where nothing was said: the median, or argmax for numbers and from a server.

        The better one in configs/study/readout.yaml, with few and with many training scenes.
        """
        if self.coord is not None:
            return self.coord
        return "median" if form.has_coord_tokens and self.backend != "openai" else "argmax"

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
                coord=self.coord or "argmax",
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
