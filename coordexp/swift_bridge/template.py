"""A Qwen3-VL template that takes its media-token ids from the model's config.

The stock template carries the ids of the released checkpoints as class attributes, so a model with another
tokenizer (a tiny test model, an expanded vocabulary) would look for the wrong image placeholder. Answers end with
`<|im_end|>`, the last token that is trained. Packed batches keep the text row of their position ids.

Pictures are read by `coordexp.pictures`, for training and for every engine that encodes with this template. The stock
template leaves a photograph on its side where one engine turns it and another does not, and drops transparency in one
engine and lays it on white in another. It also opens files that the text of a message names; this one opens none.

Pictures are scaled by the limits of the processor (`coordexp.image_size`), which `max_pixels` of a run narrows in the
processor itself: they are saved with it. The stock template scales by limits of its own, which no checkpoint holds, so
that a server, or inference without the same flag, sees other pixels.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from swift.model import get_model_processor
from swift.model.constant import MLLMModelType
from swift.model.model_meta import MODEL_MAPPING
from swift.template import StdTemplateInputs, load_file
from swift.template.register import register_template
from swift.template.templates.qwen import Qwen3VLTemplate, QwenTemplateMeta
from transformers.image_utils import SizeDict

from coordexp.config.prompt import PROMPT_FILE
from coordexp.errors import ConfigError
from coordexp.image_size import PixelLimits
from coordexp.pictures import open_picture, upright_rgb
from coordexp.swift_bridge.loading import use_safe_loader

NO_PATH = ("http://", "https://", "data:")
LONGEST_PATH = 4096  # what is longer is a picture in base64
OTHER_LIMITS = ("MAX_PIXELS", "MIN_PIXELS", "IMAGE_MAX_TOKEN_NUM", "IMAGE_MIN_TOKEN_NUM")
"""Variables by which the stock template is told other limits than the processor's."""


@dataclass
class CoordTemplateMeta(QwenTemplateMeta):
    """min_pixels, max_pixels: limits of the templates made from it; None leaves one to the processor."""

    min_pixels: int | None = None
    max_pixels: int | None = None


class CoordQwen3VLTemplate(Qwen3VLTemplate):
    """Qwen3-VL's template with `image_token_id` and `video_token_id` of the loaded model."""

    placeholder_tokens: Any = Qwen3VLTemplate.placeholder_tokens
    dummy_model: Any
    load_images = True  # pictures stay pictures from `_load_image` on; none is written to a cache on disk

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # The class-level list is extended in place by ms-swift: keep one per instance.
        self.placeholder_tokens = list(type(self).placeholder_tokens)
        super().__init__(*args, **kwargs)

    def init_processor(self, processor: Any) -> None:
        super().init_processor(processor)
        if processor is None:
            return
        where = f"model {self.model_info.model_dir}"
        for name, token in (("image_token_id", "<|image_pad|>"), ("video_token_id", "<|video_pad|>")):
            from_config = getattr(self.config, name, None)
            from_tokenizer = self.tokenizer.convert_tokens_to_ids(token)
            if from_config is None:
                raise ConfigError(f"{where}: config.json has no {name}; is this a Qwen3-VL model?")
            if from_config != from_tokenizer:
                raise ConfigError(
                    f"{where}: config.json says {name} = {from_config}, but its tokenizer maps {token} to "
                    f"{from_tokenizer}; save model and tokenizer together."
                )
            setattr(self, name, from_config)
        meta = self.template_meta
        low, high = (
            (meta.min_pixels, meta.max_pixels) if isinstance(meta, CoordTemplateMeta) else (None, None)
        )
        self.limit_pixels(min_pixels=low, max_pixels=self.max_pixels or high)

    @property
    def pixel_limits(self) -> PixelLimits:
        """By which pictures are scaled: those of the processor."""
        processor = self.processor.image_processor
        return PixelLimits(
            processor.size["shortest_edge"],
            processor.size["longest_edge"],
            processor.patch_size * processor.merge_size,
        )

    def limit_pixels(self, *, min_pixels: int | None = None, max_pixels: int | None = None) -> None:
        """Change the processor's limits; None keeps one. ConfigError for limits that contradict each other."""
        given = [name for name in OTHER_LIMITS if os.environ.get(name)]
        if given:
            raise ConfigError(
                f"the environment variable {given[0]} is set, but pictures are scaled by the limits that the "
                "checkpoint holds. Unset it; give max_pixels (of training: in the template section or as --max_pixels; "
                "of inference: --max-pixels), in pixels: a visual token of Qwen3-VL has 32 x 32"
            )
        limits = self.pixel_limits.within(min_pixels=min_pixels, max_pixels=max_pixels)
        self.processor.image_processor.size = SizeDict(
            shortest_edge=limits.min_pixels, longest_edge=limits.max_pixels
        )

    def _get_max_pixels(self, inputs: Any = None) -> None:
        """No scaling before the one by `pixel_limits`."""

    def replace_tag(self, media_type: str, index: int, inputs: StdTemplateInputs) -> list[Any]:
        """The placeholder of a picture; the picture itself in its final size."""
        if media_type != "image":
            replaced: list[Any] = super().replace_tag(media_type, index, inputs)
            return replaced
        inputs.images[index] = self.pixel_limits.fit(inputs.images[index])
        if self.mode == "vllm":
            inputs.mm_processor_kwargs["do_resize"] = False
        return ["<|vision_start|><|image_pad|><|vision_end|>"]

    @staticmethod
    def _load_image(image: Any, load_images: bool) -> Image.Image:
        """An upright RGB picture from what a row or request holds: path, bytes, address, base64, or a picture.

        Raises RecordError for a file that is missing, broken, or no picture.
        """
        if isinstance(image, dict):  # of the `datasets` library
            image = image["bytes"] or image["path"]
        if isinstance(image, Image.Image):
            return upright_rgb(image)
        if isinstance(image, str) and (image.startswith(NO_PATH) or len(image) > LONGEST_PATH):
            image = load_file(image).getvalue()
        return open_picture(image)

    @staticmethod
    def _replace_image_tags(inputs: StdTemplateInputs) -> None:
        """`<img>PATH</img>` in a text stays text."""

    def _get_model(self) -> Any:
        if self.model is None and self.dummy_model is None:
            # In a spawned worker; the stock template would guess the type of the model from its folder, and fail.
            with torch.device("meta"):
                loaded = get_model_processor(
                    self.model_info.model_dir, model_type=self.model_info.model_type, return_dummy_model=True
                )
            self.dummy_model = loaded[0]
        return super()._get_model()

    def _data_collator(self, batch: list[dict[str, Any]], *, padding_to: int | None = None) -> dict[str, Any]:
        collated: dict[str, Any] = super()._data_collator(batch, padding_to=padding_to)
        if self.padding_free and self.is_training:
            # The stock template leaves three rows and the cumulative lengths, which only flash attention reads;
            # under sdpa and eager attention samples would see each other. Four rows keep them apart everywhere.
            text_1T, mrope_31T = collated["text_position_ids"], collated["position_ids"]
            collated["position_ids"] = torch.cat([text_1T[None], mrope_31T])
        return collated


def register_coord_template(
    *, default_system: str | None = None, min_pixels: int | None = None, max_pixels: int | None = None
) -> None:
    """Make `CoordQwen3VLTemplate` the template of model type `qwen3_vl` in this process (idempotent).

    Models of that type are loaded without Python code of their own from here on, and what ms-swift saves of them
    keeps the prompt that the model folder, or LoRA folder, holds.

    default_system: system message of conversations that bring none.
    min_pixels, max_pixels: see `CoordTemplateMeta`; ms-swift's own flag `max_pixels` is stronger.
    """
    use_safe_loader()
    _keep_prompt_file()
    register_template(
        CoordTemplateMeta(
            "qwen3_vl",
            template_cls=CoordQwen3VLTemplate,
            default_system=default_system,
            thinking_prefix="<think>\n",
            # A training target ends with the token that ends a generation; the stock suffix also teaches a newline.
            suffix=["<|im_end|>"],
            min_pixels=min_pixels,
            max_pixels=max_pixels,
        ),
        exist_ok=True,
    )


def _keep_prompt_file() -> None:
    name = MLLMModelType.qwen3_vl
    kept = MODEL_MAPPING[name].additional_saved_files
    if PROMPT_FILE not in kept:
        MODEL_MAPPING[name] = replace(MODEL_MAPPING[name], additional_saved_files=[*kept, PROMPT_FILE])
