"""One prompt's vectors as rows of the embedding: a plain checkpoint whose prompt is its latent tokens.

coordexp model export-prefix runs/NAME/checkpoint-100 --classes cat dog --out runs/models/pets --bake

transformers, vLLM and servers read it as any other model, with pictures and prefix caching. Embedding and output head
become two matrices where they were one, so that no output changes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from coordexp.codec.latent_vocab import LatentVocab, latent_text
from coordexp.config.prompt import find_prompt, write_prompt
from coordexp.config.schema.prompt import Prompt
from coordexp.errors import ConfigError
from coordexp.models.latent_prefix.folder import SavedPrefix
from coordexp.models.merge_offset import base_model, is_adapter, is_tied, write_merged
from coordexp.models.staging import staged_directory


def bake_prefix(
    checkpoint: str | Path, saved: SavedPrefix, output_dir: str | Path, *, base: str | Path | None = None
) -> None:
    """Write `checkpoint` with the exported vectors of `saved` as rows of its embedding, LoRA and offsets folded in.

    base: model that a LoRA checkpoint belongs to; by default the one it names itself.

    Raises:
        ConfigError: `saved` holds no vectors, or a deep prefix, the tokenizer no latent tokens, or `output_dir` is not
            empty.
    """
    checkpoint = Path(checkpoint)
    if saved.vectors_MH is None:
        raise ConfigError("only the vectors of one prompt can be rows of an embedding; export them first.")
    if saved.settings.deep is not None:
        raise ConfigError(
            "a deep prefix cannot be baked: its keys and values are no rows of an embedding, and no plain checkpoint "
            "holds them. Ask through the prefix by --backend hf, or train one without custom.latent_prefix.deep."
        )
    source = base or (base_model(checkpoint) if is_adapter(checkpoint) else checkpoint)
    tok: Any = AutoTokenizer.from_pretrained(source)
    num_latents = saved.settings.num_latents
    latent_ids = LatentVocab.from_tokenizer(tok, num_latents).ids
    vectors_MH = saved.vectors_MH

    def put_rows(model: PreTrainedModel) -> None:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert isinstance(embedding, nn.Embedding)
        if is_tied(model):
            head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
        with torch.no_grad():
            embedding.weight[torch.tensor(latent_ids)] = vectors_MH.to(embedding.weight.dtype)

    record = find_prompt([checkpoint, source])
    prompt = Prompt() if record is None else record.prompt
    with staged_directory(Path(output_dir)) as folder:
        write_merged(checkpoint, source, folder, change=put_rows)
        asked = {"user": latent_text(num_latents), "rendered": None}
        write_prompt(folder, prompt.model_copy(update=asked))
