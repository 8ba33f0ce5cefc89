"""Asking with a latent prefix: the text of a question is read as a few vectors (`coordexp.models.latent_prefix`)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coordexp.codec.records import Record
from coordexp.config.prompt import find_prompt
from coordexp.config.schema.prompt import Prompt
from coordexp.errors import ConfigError, RecordError
from coordexp.inference.asking import Asking
from coordexp.inference.class_names import checked_classes, prompt_for
from coordexp.inference.fingerprint import file_fingerprint

if TYPE_CHECKING:
    import torch
    from torch import nn

    from coordexp.models.latent_prefix.folder import SavedPrefix
    from coordexp.models.latent_prefix.prompts import PromptVectors

logger = logging.getLogger(__name__)

NO_LATENTS = "none"
"""In place of a folder: a checkpoint that holds a prefix is asked in text all the same."""


@dataclass(frozen=True)
class Latents:
    """A prefix folder, and how its vectors are kept.

    keep_prob: in place of the one it was trained with; None: that one.
    """

    folder: Path
    saved: SavedPrefix
    keep_prob: float | None = None

    @classmethod
    def of(cls, model: Path, given: str | None, keep_prob: float | None) -> Latents | None:
        """Those of `given`, else of the checkpoint itself; None where there are none.

        given: a folder, or NO_LATENTS.  Raises ConfigError for a folder without a prefix, or a value without effect.
        """
        from coordexp.models.latent_prefix.folder import PREFIX_FILE, read_prefix

        saved = None
        folder = model if given is None else Path(given)
        if given != NO_LATENTS:
            saved = read_prefix(folder)
            if saved is None and given is not None:
                raise ConfigError(
                    f"--prompt-latents {given}: holds no {PREFIX_FILE}; give a checkpoint of variant latent_prefix, or "
                    "what `coordexp model export-prefix` wrote."
                )
        if saved is None:
            if keep_prob is not None:
                raise ConfigError("--keep-prob is of a latent prefix, and this model is asked in text.")
            return None
        if keep_prob is not None and saved.vectors_MH is not None:
            raise ConfigError(
                f"--keep-prob: {folder} holds the vectors of one prompt, as they were exported; give it to `coordexp "
                "model export-prefix`."
            )
        if keep_prob not in (None, saved.keep_prob):
            logger.warning(
                "%s: its vectors were trained with a keep probability of %g at last, and are used with %g.",
                folder, saved.keep_prob, keep_prob,
            )  # fmt: skip
        elif keep_prob is None and saved.keep_prob < 1:
            logger.warning(
                "%s: each vector is kept with probability %g, as in training; --keep-prob 1 keeps all.",
                folder, saved.keep_prob,
            )  # fmt: skip
        return cls(folder, saved, keep_prob)

    @property
    def of_one_prompt(self) -> str | None:
        """The text that exported vectors stand for; None for what makes them of any text."""
        return self.saved.prompt if self.saved.vectors_MH is not None else None

    @property
    def decisive(self) -> dict[str, Any]:
        """What decides an answer."""
        from coordexp.models.latent_prefix.folder import PREFIX_WEIGHTS

        keep_prob = self.saved.keep_prob if self.keep_prob is None else self.keep_prob
        weights = file_fingerprint(self.folder / PREFIX_WEIGHTS)
        return {"weights": weights, "num_latents": self.saved.settings.num_latents, "keep_prob": keep_prob}

    def asked(self, asking: Asking) -> Asking:
        """The question whose vectors were exported, for a model that is always asked the same."""
        text = self.of_one_prompt
        if text is None or asking.prompt.names_classes or text == asking.prompt.user:
            return asking
        return asking._replace(prompt=asking.prompt.model_copy(update={"user": text, "rendered": None}))

    def check_records(self, records: Sequence[Record], prompt: Prompt) -> None:
        """RecordError naming a record that asks for something else than the exported vectors stand for."""
        for record in records:
            text = prompt.user_text(record.classes)
            if self.of_one_prompt not in (None, text):
                raise RecordError(
                    f"{record.file}:{record.line}: asks {_cut(text)}, and the vectors of {self.folder} stand for "
                    f"{_cut(str(self.of_one_prompt))}. Export those of its prompt, or ask with the checkpoint that "
                    "has the encoder"
                )

    def vectors_for(self, model: Any, tok: Any) -> PromptVectors:
        """The vectors for a loaded model; ConfigError for another than they were trained with."""
        from coordexp.models.latent_prefix.prompts import PromptVectors

        return PromptVectors.of(self.saved, model, tok, source=self.folder, keep_prob=self.keep_prob)

    def beside_engine(
        self, model: Path, *, dtype: torch.dtype, trust_remote_code: bool
    ) -> tuple[PromptVectors, nn.Module]:
        """The vectors for an engine that loads a model itself, and the embedding of its tokens; both on the CPU.

        Raises ConfigError as `vectors_for`.
        """
        from transformers import AutoModelForImageTextToText, AutoTokenizer

        loaded = AutoModelForImageTextToText.from_pretrained(
            model, dtype=dtype, trust_remote_code=trust_remote_code
        )
        vectors = self.vectors_for(loaded, AutoTokenizer.from_pretrained(model))
        return vectors, loaded.get_input_embeddings()


def check_backend(latents: Latents | None, backend: str) -> None:
    """ConfigError unless the backend can read the vectors."""
    if latents is None or backend == "hf":
        return
    if latents.saved.settings.deep is not None:
        raise ConfigError(
            f"{latents.folder} holds a deep prefix, which --backend {backend} cannot read: it takes no key/value "
            "vectors of layers, and no rows of an embedding stand for them. Use --backend hf, or --prompt-latents none "
            "to ask in text."
        )
    if backend == "vllm":
        return
    raise ConfigError(
        f"{latents.folder} holds a latent prefix, which --backend openai cannot read: a server takes text and "
        "pictures, and no vectors beside a picture. Write the vectors of one prompt as rows of a checkpoint's "
        "embedding, which every server reads: `coordexp model export-prefix CHECKPOINT --classes NAME ... --out FOLDER "
        "--bake`; or use --backend hf or vllm, or --prompt-latents none to ask in text."
    )


def export_prefix(
    checkpoint: Path,
    output: Path,
    *,
    latents: Path | None = None,
    user: str | None = None,
    classes: Sequence[str] | None = None,
    keep_prob: float | None = None,
    bake: bool = False,
    base: str | None = None,
) -> str:
    """Write the vectors of one prompt, as a prefix folder or as rows of a whole checkpoint; returns the prompt's text.

    latents: where the prefix is; None: in `checkpoint`.
    user, classes: the user message, and the names for its `{classes}`; None: as the model was trained.
    bake: write a whole checkpoint.  base: model that a LoRA checkpoint belongs to; None: the one it names itself.

    Raises ConfigError for a folder without an encoder (or static vectors), and a prompt that needs classes without any.
    """
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    from coordexp.models.latent_prefix.bake import bake_prefix
    from coordexp.models.latent_prefix.folder import PREFIX_FILE, write_prefix
    from coordexp.models.latent_prefix.prompts import exported
    from coordexp.models.merge_offset import base_model, is_adapter, with_adapter
    from coordexp.models.staging import staged_directory

    found = Latents.of(checkpoint, None if latents is None else str(latents), keep_prob)
    if found is None:
        raise ConfigError(
            f"{checkpoint}: holds no {PREFIX_FILE}; expected a checkpoint of variant latent_prefix."
        )
    if found.of_one_prompt is not None:
        raise ConfigError(
            f"{found.folder}: holds the vectors of one prompt already, and nothing to make others."
        )
    source = base or (base_model(checkpoint) if is_adapter(checkpoint) else checkpoint)
    record = find_prompt([checkpoint, source])
    prompt = prompt_for(Prompt() if record is None else record.prompt, user, checked_classes(classes))
    model = with_adapter(AutoModelForImageTextToText.from_pretrained(source, dtype="auto"), checkpoint)
    vectors = found.vectors_for(model, AutoTokenizer.from_pretrained(source))
    embedding: Any = model.get_input_embeddings()
    saved = exported(found.saved, vectors, embedding, prompt.user)
    if bake:
        bake_prefix(checkpoint, saved, output, base=base)
    else:
        with staged_directory(output) as folder:
            write_prefix(folder, saved)
    return prompt.user


def _cut(text: str, limit: int = 60) -> str:
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")
