"""Rows as a template encodes them for training: whole samples, or prompts up to the answer with the image patches.

And what a template makes of a `Prompt`, as text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image
from swift.dataset import LazyLLMDataset
from swift.infer_engine import InferRequest
from swift.template import MaxLengthError
from torch import Tensor

from coordexp.config.prompt import PromptRecord
from coordexp.config.schema.prompt import Prompt
from coordexp.errors import ConfigError, RecordError
from coordexp.swift_bridge.generation_prompts import prompt_text, questions_template

_ENCODED_KEYS = ("messages", "images", "channel")
"""What a template reads of a row, or hands on with the encoded sample."""
_SHORT_ANSWER = {"role": "assistant", "content": "{"}
"""Marks where an answer begins: a template encodes prompt and answer each on their own."""


@dataclass(frozen=True)
class EncodedPrompt:
    """What the model sees before its answer, image placeholders expanded.

    pixel_values_PD, image_grid_thw_I3: patches and grids of all images, from the processor; None without images.
    """

    token_ids: tuple[int, ...]
    pixel_values_PD: Tensor | None
    image_grid_thw_I3: Tensor | None


def rows_of(dataset: Any) -> Any:
    """The rows that ms-swift was about to encode: a dataset of `messages`, `images` and the columns of the loader."""
    if dataset is None:
        return None
    if isinstance(dataset, LazyLLMDataset):
        return dataset.dataset
    raise ConfigError(
        f"ms-swift hands over a {type(dataset).__name__}; training on rollouts starts from plain rows. "
        "Remove packing, streaming and cached_dataset from the flags."
    )


def encode_sample(template: Any, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of user and assistant messages as `template` encodes it in train mode, with its `length`.

    Raises:
        RecordError: it is longer than max_length, or its pictures cannot be read; the row is not named.
    """
    try:
        known = {key: row[key] for key in _ENCODED_KEYS if key in row}
        encoded: dict[str, Any] = template.encode(known, return_length=True)
    except MaxLengthError as error:
        raise RecordError(_too_long(error)) from error
    except (OSError, ValueError) as error:
        raise RecordError(f"cannot be encoded ({error})") from error
    return encoded


def first_too_long(error: BaseException) -> RecordError | None:
    """What ms-swift raises about a first record that is too long, before ours are all looked at; None for the rest."""
    return RecordError(f"the first record {_too_long(error)}.") if isinstance(error, MaxLengthError) else None


def _too_long(error: MaxLengthError) -> str:
    return (
        f"is too long ({str(error).rstrip('.')}). Raise global_max_length (max_length in ms-swift's flat form), or "
        "give the record fewer objects or a smaller picture"
    )


def encode_prompt(template: Any, row: Mapping[str, Any]) -> EncodedPrompt:
    """The prompt of a row that begins with user messages, by the template in train mode; what it answers is left out.

    Raises:
        RecordError: as `encode_sample`, or the template supervises no token, so that no answer could begin.
    """
    question = [message for message in row["messages"] if message["role"] != "assistant"]
    short = {"messages": [*question, _SHORT_ANSWER], "images": row["images"]}
    encoded = encode_sample(template, short)
    labels = encoded["labels"]
    start = next((index for index, label in enumerate(labels) if label != -100), None)
    if not start:
        raise RecordError(
            f"cannot be asked: the template supervises none of its {len(labels)} tokens; expected a user message and "
            "an answer. Check the template"
        )
    return EncodedPrompt(
        tuple(encoded["input_ids"][:start]), encoded.get("pixel_values"), encoded.get("image_grid_thw")
    )


def complete_prompt(prompt: Prompt, template: Any) -> Prompt:
    """`prompt` as it is kept with a checkpoint: with the template's name, its pixel limits and the text it writes.

    Raises ConfigError when the template is another one, or writes another text than `prompt` says.
    """
    name = template.template_meta.template_type
    if name != prompt.template:
        raise ConfigError(
            f"template: the run uses {name}, but its prompt is that of {prompt.template}; set template: "
            f"{prompt.template}."
        )
    limits, found = template.pixel_limits, rendered(template, prompt)
    if prompt.rendered not in (None, found):
        raise ConfigError(_another_text("The model that the run starts from", prompt, found))
    return prompt.model_copy(
        update={"min_pixels": limits.min_pixels, "max_pixels": limits.max_pixels, "rendered": found}
    )


def rendered(template: Any, prompt: Prompt) -> str:
    """The whole prompt up to the answer, with one image, whose visual tokens are written as one."""
    request = InferRequest(messages=prompt.messages(1), images=[Image.new("RGB", (64, 64))])
    return prompt_text(template.tokenizer, questions_template(template, None).encode(request)["input_ids"])


def check_rendering(template: Any, record: PromptRecord) -> None:
    """ConfigError with both texts unless `template` still writes the prompt of a checkpoint as it was trained."""
    trained, found = record.prompt.rendered, rendered(template, record.prompt)
    if trained is not None and found != trained:
        raise ConfigError(_another_text(f"{record.path}: the model", record.prompt, found))


def _another_text(model: str, prompt: Prompt, found: str) -> str:
    return (
        f"{model} was trained with another text of its prompt than this template ({prompt.template}) writes. Trained: "
        f"{prompt.rendered!r}. Written here: {found!r}. Use the releases of coordexp and ms-swift that trained it, and "
        "the tokenizer that came with it."
    )
