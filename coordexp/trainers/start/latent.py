"""The latent prefix of a run: attached where ms-swift loads the model, filled from where the run starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from coordexp.codec.latent_vocab import LatentVocab
from coordexp.config.schema.custom import Custom
from coordexp.config.schema.latent_prefix import LatentPrefixSettings
from coordexp.config.schema.prompt import IMAGE_TAG, Prompt
from coordexp.errors import ConfigError
from coordexp.models.latent_prefix.deep import DeepSettings, read_deep
from coordexp.models.latent_prefix.folder import PREFIX_FILE, check_base, load_weights, read_prefix
from coordexp.models.latent_prefix.prefix import LatentPrefix, PrefixSettings
from coordexp.swift_bridge.loading import PrepareModel

ATTRIBUTE = "latent_prefix"
"""Name of the module in the model."""
NO_ZERO3 = (
    "custom.latent_prefix: does not train under DeepSpeed ZeRO-3, whose weights are not there where the prefix is "
    "made; use zero2."
)


def prefix_preparation(
    custom: Custom,
    prompt: Prompt,
    checkpoints: Sequence[str | None],
    *,
    seed: int,
    with_optimizer: str | None = None,
) -> PrepareModel:
    """What a run does to a model when it is loaded; nothing without `custom.latent_prefix`.

    checkpoints: folders the run goes on from (to resume, a LoRA checkpoint), those that come first win; None stands
        for one that is not given.
    seed: of the weights of a new prefix.  with_optimizer: the one of `checkpoints` whose optimizer goes on as well.

    Raises (the function does):
        ConfigError: the tokenizer lacks latent tokens, a folder holds another prefix, or one of another base, or the
            weights are partitioned (ZeRO-3), or a deep prefix is new to an optimizer that goes on.
    """
    settings = custom.latent_prefix

    def prepare(model: Any, tokenizer: Any, model_dir: Path) -> None:
        if settings is None:
            return
        if is_deepspeed_zero3_enabled():
            raise ConfigError(NO_ZERO3)
        LatentVocab.from_tokenizer(tokenizer, settings.num_latents)
        text_config = model.config.get_text_config()
        deep = None if settings.deep is None else DeepSettings.of(settings.deep.num, text_config)
        prefix = new_prefix(settings, text_config.hidden_size, deep, seed=seed)
        folders = [Path(folder) for folder in checkpoints if folder is not None]
        given = None if settings.start_from is None else Path(settings.start_from)
        if given is not None and custom.evaluate_only is None:
            folders.append(given)
        folders.append(model_dir)
        source = next((folder for folder in folders if (folder / PREFIX_FILE).is_file()), None)
        if given is not None and source is None:
            raise ConfigError(
                f"custom.latent_prefix.start_from: {given} holds no {PREFIX_FILE}; give a checkpoint of variant "
                "latent_prefix."
            )
        saved = None if source is None else read_prefix(source)
        if saved is not None and source is not None:
            if deep is not None and saved.settings.deep is None and source == Path(with_optimizer or ""):
                raise ConfigError(
                    f"custom.latent_prefix.deep: {source} was trained without one, and its optimizer cannot go on with "
                    f"one. Begin another run, with custom.latent_prefix.start_from: {source}."
                )
            load_weights(prefix, saved, source=source)
            if source == given:
                check_base(saved, model, tokenizer, source=source)
        else:
            text_ids = tokenizer.encode(prompt.user.replace(IMAGE_TAG, ""), add_special_tokens=False)
            embedding = model.get_input_embeddings()
            with torch.no_grad():
                text_1LH = embedding(torch.tensor([text_ids], device=embedding.weight.device)).float().cpu()
            prefix.start_from(text_1LH, torch.ones(1, len(text_ids), dtype=torch.bool))
        attach_prefix(model, prefix)

    return prepare


def new_prefix(
    settings: LatentPrefixSettings, hidden: int, deep: DeepSettings | None = None, *, seed: int
) -> LatentPrefix:
    """A module with fresh weights; the random state of the process is left alone."""
    encoder = {} if settings.source == "static" else settings.encoder.model_dump()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LatentPrefix(
            PrefixSettings(settings.num_latents, hidden, settings.source, deep=deep, **encoder)
        )


def attach_prefix(model: Any, prefix: LatentPrefix) -> None:
    """Make `prefix` a module of `model`, on its device, trained with it, but no part of its saved weights.

    Raises ConfigError for a deep prefix and a model whose attention reads none.
    """
    prefix.to(model.get_input_embeddings().weight.device)
    if prefix.deep is not None:
        read_deep(model)
    setattr(model, ATTRIBUTE, prefix)
    names = [f"{ATTRIBUTE}.{name}" for name in prefix.state_dict()]
    model._keys_to_ignore_on_save = {*(model._keys_to_ignore_on_save or ()), *names}


def prefix_of(model: torch.nn.Module) -> LatentPrefix:
    """The prefix of a model, under LoRA or a wrapper; ConfigError without one."""
    found = [module for module in model.modules() if isinstance(module, LatentPrefix)]
    if len(found) != 1:
        raise ConfigError(
            f"custom.latent_prefix: the loaded model has {len(found)} latent prefixes, expected one; it is attached to "
            "models that ms-swift loads as model_type qwen3_vl."
        )
    return found[0]
