"""A prefix on disk: `latent_prefix.json` beside `latent_prefix.safetensors`, in a checkpoint or in a folder of its own.

    write_prefix(folder, trained_state(prefix, keep_prob=0.85, base=base_hash(model, tok)))
    saved = read_prefix(folder)                    # None where there is none
    check_base(saved, model, tok, source=folder)   # ConfigError for another base
    prefix = build_prefix(saved)                   # the module that was trained
    saved.vectors_MH                               # of an exported prompt

The JSON file names version, M, source, settings, the prompt's text (of an exported prompt, or what static vectors were
started from), the keep probability it was last trained with, a hash of the base model's text embeddings, and what that
model, with its LoRA weights, answers to a fixed text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from coordexp.codec.coord_vocab import Tokenizer
from coordexp.errors import ConfigError
from coordexp.files import read_json, write_json
from coordexp.models import checkpoints
from coordexp.models.latent_prefix.deep import DeepPrefix, DeepSettings
from coordexp.models.latent_prefix.prefix import LatentPrefix, PrefixSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX_FILE, PREFIX_WEIGHTS = checkpoints.PREFIX_FILE, checkpoints.PREFIX_WEIGHTS
PREFIX_VERSION, DEEP_VERSION = 1, 2
"""Without a deep prefix, which releases that know none still read, and with one."""
VECTORS = "vectors_MH"
"""Tensor of an exported prompt; those of the module begin with WEIGHT."""
WEIGHT = "prefix."
DEEP = "deep."
PROBE_TOLERANCE = 0.1
"""Of logits, relative to their spread; another dtype moves them by a tenth of that."""
_HASHED_ROWS = 256
_PROBED_TOKENS = 32
_PROBE_TEXT = "Detect all objects in the image."


@dataclass(frozen=True)
class SavedPrefix:
    """What a prefix folder holds.

    base_hash: of the model it was trained with (`base_hash`).
    base_probe: what that model answered to a fixed text (`base_probe`), LoRA and offsets included; empty: not known.
    keep_prob: of latent dropout when it was saved.
    prompt: the text that `vectors_MH` stand for, or that static vectors were started from.
    weights: parameters of `LatentPrefix` by name; of an exported prompt alone, those of its deep prefix if any.
    vectors_MH: of an exported prompt, float32.
    """

    settings: PrefixSettings
    base_hash: str
    keep_prob: float = 1.0
    prompt: str | None = None
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    vectors_MH: Tensor | None = None
    base_probe: tuple[float, ...] = ()

    @property
    def deep_weights(self) -> dict[str, Tensor]:
        """Those of `weights` that belong to the deep prefix."""
        return {name: tensor for name, tensor in self.weights.items() if name.startswith(DEEP)}


def trained_state(
    prefix: LatentPrefix,
    *,
    keep_prob: float,
    base: str,
    probe: Sequence[float] = (),
    prompt: str | None = None,
    gathered: Mapping[str, Tensor] | None = None,
) -> SavedPrefix:
    """A module as it is saved.  gathered: its tensors by name, where they are partitioned."""
    state = prefix.state_dict() if gathered is None else gathered
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    return SavedPrefix(prefix.settings, base, keep_prob, prompt, weights, base_probe=tuple(probe))


def write_prefix(folder: str | Path, saved: SavedPrefix) -> None:
    """Write both files into `folder`, the JSON file last."""
    folder = Path(folder)
    tensors = {WEIGHT + name: tensor for name, tensor in saved.weights.items()}
    if saved.vectors_MH is not None:
        tensors[VECTORS] = saved.vectors_MH.detach().float().cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{PREFIX_WEIGHTS}.unfinished"
    save_file(tensors, unfinished, metadata={"format": "pt"})
    unfinished.replace(folder / PREFIX_WEIGHTS)
    settings = {name: value for name, value in asdict(saved.settings).items() if value is not None}
    content = {
        "version": PREFIX_VERSION if saved.settings.deep is None else DEEP_VERSION,
        "num_latents": settings.pop("num_latents"),
        "source": settings.pop("source"),
        "settings": settings,
        "prompt": saved.prompt,
        "keep_prob": saved.keep_prob,
        "base_hash": saved.base_hash,
        "base_probe": list(saved.base_probe),
    }
    write_json(folder / PREFIX_FILE, content, indent=1)


def read_prefix(folder: str | Path) -> SavedPrefix | None:
    """What a folder holds; None when it has no PREFIX_FILE. ConfigError for one of another version, or broken."""
    path = Path(folder) / PREFIX_FILE
    if not path.is_file():
        return None
    content = read_json(path, error=ConfigError)
    version = content.get("version") if isinstance(content, dict) else None
    if version not in (PREFIX_VERSION, DEEP_VERSION):
        raise ConfigError(
            f"{path}: version {version!r}; this release of coordexp reads versions {PREFIX_VERSION} and "
            f"{DEEP_VERSION}. Install the release that wrote it."
        )
    try:
        sizes = dict(content["settings"])
        deep = DeepSettings(**sizes.pop("deep")) if version == DEEP_VERSION else None
        settings = PrefixSettings(
            num_latents=content["num_latents"], source=content["source"], deep=deep, **sizes
        )
        tensors = load_file(Path(folder) / PREFIX_WEIGHTS)
        saved = SavedPrefix(
            settings,
            base_hash=content["base_hash"],
            keep_prob=float(content["keep_prob"]),
            prompt=content["prompt"],
            weights={
                name.removeprefix(WEIGHT): tensor
                for name, tensor in tensors.items()
                if name.startswith(WEIGHT)
            },
            vectors_MH=tensors.get(VECTORS),
            base_probe=tuple(map(float, content.get("base_probe", ()))),
        )
    except (KeyError, TypeError, OSError) as error:
        raise ConfigError(
            f"{path}: is no whole latent prefix ({type(error).__name__}: {error}); take a folder that training or "
            "`coordexp model export-prefix` wrote."
        ) from error
    _check_vectors(saved, path)
    return saved


def build_prefix(saved: SavedPrefix, *, source: str | Path = PREFIX_FILE) -> LatentPrefix:
    """The module with its weights; ConfigError for a folder that holds an exported prompt alone."""
    if len(saved.weights) == len(saved.deep_weights):
        raise ConfigError(
            f"{source}: holds the vectors of one prompt, and no encoder to make others; take the checkpoint they were "
            "exported from."
        )
    prefix = LatentPrefix(saved.settings)
    load_weights(prefix, saved, source=source)
    return prefix


def build_deep(saved: SavedPrefix) -> DeepPrefix | None:
    """The deep prefix of a folder, with its weights; None for a folder without."""
    if saved.settings.deep is None:
        return None
    deep = DeepPrefix(saved.settings.deep)
    deep.load_state_dict({name.removeprefix(DEEP): tensor for name, tensor in saved.deep_weights.items()})
    return deep


def load_weights(prefix: LatentPrefix, saved: SavedPrefix, *, source: str | Path) -> None:
    """Fill a module from a folder; ConfigError when it has other settings.

    A folder without a deep prefix leaves a new one as it is, which adds nothing at first.
    """
    ours, theirs = asdict(prefix.settings), asdict(saved.settings)
    weights = dict(saved.weights)
    if prefix.deep is not None and saved.settings.deep is None:
        del ours["deep"]
        weights |= {DEEP + name: tensor for name, tensor in prefix.deep.state_dict().items()}
    differing = [
        f"{name}: {theirs[name]} there, {ours[name]} here" for name in ours if ours[name] != theirs[name]
    ]
    if differing:
        raise ConfigError(
            f"{source}: holds a latent prefix of other settings ({'; '.join(differing)}). Set custom.latent_prefix to "
            "what it was trained with."
        )
    prefix.load_state_dict(weights)


def base_hash(model: nn.Module, tok: Tokenizer) -> str:
    """sha256 of a base model as a prefix meets it: sizes of its embedding and 256 rows of it, spread evenly.

    Rows of coordinate and latent tokens do not count, which training and baking change; numbers count in bfloat16, so
    that a model loaded in another dtype is the same.
    """
    embedding = cast("PreTrainedModel", model).get_input_embeddings()
    weight_VH = embedding.weight
    assert isinstance(weight_VH, Tensor)
    usable = min(len(tok), weight_VH.shape[0])
    step = max(usable // _HASHED_ROWS, 1)
    ids = list(range(0, usable, step))
    texts = tok.convert_ids_to_tokens(ids)
    ids = [
        i
        for i, text in zip(ids, texts, strict=True)
        if text is not None and not text.startswith(("<|coord_", "<|latent_"))
    ]
    rows_RH = weight_VH.detach()[torch.tensor(ids, device=weight_VH.device)]
    numbers = rows_RH.to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy().tobytes()
    return sha256(f"{ids} {weight_VH.shape[1]}".encode() + numbers).hexdigest()


def check_base(saved: SavedPrefix, model: nn.Module, tok: Tokenizer, *, source: str | Path) -> None:
    """ConfigError naming `source` unless `model` is the base that the prefix was trained with."""
    found = base_hash(model, tok)
    if found != saved.base_hash:
        raise ConfigError(
            f"{source}: its latent prefix was trained with another base model: the text embeddings of this one have "
            f"hash {found[:12]}, expected {saved.base_hash[:12]}. Use the model that the prefix was trained with."
        )
    if not saved.base_probe:
        return
    wanted = torch.tensor(saved.base_probe, dtype=torch.float64)
    answered = torch.tensor(base_probe(model, tok), dtype=torch.float64)
    distance = float((answered - wanted).norm() / (wanted - wanted.mean()).norm())
    if distance > PROBE_TOLERANCE:
        raise ConfigError(
            f"{source}: its latent prefix was trained with another model: this one answers a fixed text with other "
            f"logits (relative distance {distance:.2f}, allowed {PROBE_TOLERANCE:g}). Are the LoRA weights or offsets "
            "missing that were trained with it? Use the checkpoint that the prefix is in."
        )


@torch.no_grad()
def base_probe(model: nn.Module, tok: Tokenizer) -> tuple[float, ...]:
    """Logits of 32 tokens after a fixed text: what a model computes, whether its LoRA weights are merged or not."""
    weight = cast("PreTrainedModel", model).get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    ids_1T = torch.tensor([tok.encode(_PROBE_TEXT, add_special_tokens=False)], device=weight.device)
    was_training = model.training
    model.eval()
    try:
        # token types: under DeepSpeed ms-swift's forward makes positions of them, pictures or not
        given = {"input_ids": ids_1T, "mm_token_type_ids": torch.zeros_like(ids_1T)}
        logits_V = model(**given, use_cache=False).logits[0, -1].double()
    finally:
        model.train(was_training)
    chosen = torch.arange(_PROBED_TOKENS) * (_text_tokens(tok) // _PROBED_TOKENS)
    return tuple(round(value, 6) for value in logits_V.cpu()[chosen].tolist())


def _text_tokens(tok: Tokenizer) -> int:
    """How many tokens from id 0 on are no coordinate tokens, whose rows may be trained on their own."""
    first = tok.convert_tokens_to_ids("<|coord_0|>")
    return len(tok) if first is None else int(first)


def _check_vectors(saved: SavedPrefix, path: Path) -> None:
    wanted: Any = (saved.settings.num_latents, saved.settings.hidden)
    if saved.vectors_MH is not None and tuple(saved.vectors_MH.shape) != wanted:
        raise ConfigError(
            f"{path}: its vectors have shape {tuple(saved.vectors_MH.shape)}, expected {wanted} by its settings."
        )
