"""What a model is asked, and the form it answers in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from coordexp.config.schema.section import Section

DEFAULT_PROMPT = "Detect all objects in the image."
IMAGE_TAG = "<image>"
CLASSES_PLACE = "{classes}"
"""Where a user message takes the names that are asked for."""

MediaOrder = Literal["media_first", "text_first"]
FieldOrder = Literal["desc_first", "geometry_first"]
Ordering = Literal["sorted", "random"]
AnswerFormName = Literal["coordjson", "coordjson_numbers", "qwen", "compact"]


class Prompt(Section):
    """One question and answer form for training, rollouts, evaluation, inference and servers."""

    user: str = Field(
        default=DEFAULT_PROMPT,
        min_length=1,
        description="User message; `{classes}` in it stands for the names of a record's `classes`.",
    )
    system: str | None = Field(default=None, min_length=1, description="System message; null: none.")
    template: str = Field(default="qwen3_vl", description="ms-swift's name of the template.")
    media_order: MediaOrder = Field(
        default="media_first", description="Images stand before the text or after it."
    )
    min_pixels: int | None = Field(
        default=None,
        gt=0,
        description="Pictures with fewer pixels are enlarged; null: as the processor does.",
    )
    max_pixels: int | None = Field(
        default=None,
        gt=0,
        description="Pictures with more pixels are made smaller; null: as the processor does.",
    )
    answer_form: AnswerFormName = Field(default="coordjson", description="How the answer is written.")
    object_field_order: FieldOrder = Field(default="desc_first", description="Order of an object's two keys.")
    object_ordering: Ordering = Field(default="sorted", description="Order of the objects in an answer.")
    rendered: str | None = Field(
        default=None,
        description="The whole prompt up to the answer as the template wrote it, with one image.",
    )

    @model_validator(mode="after")
    def _limits_are_in_order(self) -> Prompt:
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is more than max_pixels {self.max_pixels}")
        return self

    @property
    def names_classes(self) -> bool:
        """Whether the user message says which names are asked for."""
        return CLASSES_PLACE in self.user

    def user_text(self, classes: Sequence[str] | None = None) -> str:
        """The user message for these names; without any, the place for them stays as it is."""
        return self.user if classes is None else self.user.replace(CLASSES_PLACE, ", ".join(classes))

    def messages(self, num_images: int, classes: Sequence[str] | None = None) -> list[dict[str, str]]:
        """The conversation up to the answer; each image has one `<image>`.

        classes: names for the place of `{classes}`.
        """
        tags, text = IMAGE_TAG * num_images, self.user_text(classes)
        content = tags + text if self.media_order == "media_first" else text + tags
        user = {"role": "user", "content": content}
        return [user] if self.system is None else [{"role": "system", "content": self.system}, user]
