"""A Qwen3-VL template that takes its media-token ids from the model's config.

The stock template carries the ids of the released checkpoints as class attributes, so a model with another
tokenizer (a tiny test model, an expanded vocabulary) would look for the wrong image placeholder. Answers end with
`<|im_end|>`, the last token that is trained. Packed batches keep the text row of their position ids.

Pictures are read by `coordexp.pictures`, for training and for every engine that encodes with this template. The stock
template leaves a photograph on its side where one engine turns it and another does not, and drops transparency in one
engine and lays it on white in another. It also opens files that the text of a message names; this one opens none.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from swift.model import get_model_processor
from swift.template import StdTemplateInputs, load_file
from swift.template.register import register_template
from swift.template.templates.qwen import Qwen3VLTemplate, QwenTemplateMeta

from coordexp.errors import ConfigError
from coordexp.pictures import open_picture, upright_rgb
from coordexp.swift_bridge.loading import use_safe_loader

NO_PATH = ("http://", "https://", "data:")
LONGEST_PATH = 4096  # what is longer is a picture in base64


class CoordQwen3VLTemplate(Qwen3VLTemplate):
    """Qwen3-VL's template with `image_token_id` and `video_token_id` of the loaded model."""

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
        collated = super()._data_collator(batch, padding_to=padding_to)
        if self.padding_free and self.is_training:
            # The stock template leaves three rows and the cumulative lengths, which only flash attention reads;
            # under sdpa and eager attention samples would see each other. Four rows keep them apart everywhere.
            text_1T, mrope_31T = collated["text_position_ids"], collated["position_ids"]
            collated["position_ids"] = torch.cat([text_1T[None], mrope_31T])
        return collated


def register_coord_template() -> None:
    """Make `CoordQwen3VLTemplate` the template of model type `qwen3_vl` in this process (idempotent).

    Models of that type are loaded without Python code of their own from here on.
    """
    use_safe_loader()
    register_template(
        QwenTemplateMeta(
            "qwen3_vl",
            template_cls=CoordQwen3VLTemplate,
            default_system=None,
            thinking_prefix="<think>\n",
            # A training target ends with the token that ends a generation; the stock suffix also teaches a newline.
            suffix=["<|im_end|>"],
        ),
        exist_ok=True,
    )
