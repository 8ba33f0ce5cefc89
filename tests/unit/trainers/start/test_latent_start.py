"""The prefix that a run begins with: new, of the model's folder, of an earlier stage; what a saved model holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from coordexp.config.schema.custom import Custom
from coordexp.config.schema.prompt import Prompt
from coordexp.errors import ConfigError
from coordexp.models.latent_prefix.deep import ATTENTION
from coordexp.models.latent_prefix.folder import base_hash, trained_state, write_prefix
from coordexp.models.latent_prefix.prefix import LatentPrefix
from coordexp.models.latent_prefix.vocabulary import add_latent_tokens
from coordexp.trainers.start.latent import ATTRIBUTE, new_prefix, prefix_of, prefix_preparation

SETTINGS: dict[str, Any] = {
    "num_latents": 3,
    "encoder": {"width": 16, "heads": 2, "layers": 1, "mlp_width": 16},
    "objective": [{"name": "stage1", "weight": 1.0}],
}


@pytest.fixture(scope="module")
def folder(nano_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("start") / "model"
    add_latent_tokens(nano_model, path, 3)
    return path


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    return AutoModelForImageTextToText.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def custom(**more: Any) -> Custom:
    return Custom.model_validate({"latent_prefix": {**SETTINGS, **more.pop("prefix", {})}, **more})


def prepared(
    loaded: tuple[Any, Any],
    section: Custom,
    *checkpoints: Path,
    model_dir: Path = Path("nowhere"),
    with_optimizer: Path | None = None,
) -> LatentPrefix:
    given = [None, *map(str, checkpoints)]
    goes_on = None if with_optimizer is None else str(with_optimizer)
    prepare = prefix_preparation(
        section, Prompt(user="Find: red box."), given, seed=5, with_optimizer=goes_on
    )
    prepare(*loaded, model_dir)
    return prefix_of(loaded[0])


def kept(loaded: tuple[Any, Any], path: Path, seed: int, **more: Any) -> tuple[Path, LatentPrefix]:
    """A folder with a prefix of its own weights."""
    prefix = new_prefix(custom(**more).latent_prefix, 32, seed=seed)
    write_prefix(path, trained_state(prefix, keep_prob=1.0, base=base_hash(*loaded)))
    return path, prefix


def same(one: LatentPrefix, other: LatentPrefix) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


def test_a_new_prefix_depends_on_the_seed_alone(loaded: tuple[Any, Any]):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    found = prepared(loaded, custom())
    assert torch.equal(torch.get_rng_state(), before)
    assert same(found, new_prefix(custom().latent_prefix, 32, seed=5))
    assert not same(found, new_prefix(custom().latent_prefix, 32, seed=6))


def test_partitioned_weights_are_refused(loaded: tuple[Any, Any]):
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    alive = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    try:
        assert alive.is_zero3()
        with pytest.raises(ConfigError, match=r"does not train under DeepSpeed ZeRO-3.*use zero2"):
            prepared(loaded, custom())
    finally:
        unset_hf_deepspeed_config()


def test_what_is_gone_on_from_wins(loaded: tuple[Any, Any], tmp_path: Path):
    own, of_own = kept(loaded, tmp_path / "own", 1)
    stage_a, of_stage_a = kept(loaded, tmp_path / "a", 2)
    resumed, of_resumed = kept(loaded, tmp_path / "resumed", 3)
    from_a = custom(prefix={"start_from": str(stage_a)})
    assert same(prepared(loaded, custom(), model_dir=own), of_own)
    assert same(prepared(loaded, from_a, model_dir=own), of_stage_a)
    assert same(prepared(loaded, from_a, resumed, model_dir=own), of_resumed)
    # scored again, a checkpoint brings its own, wherever its run had started
    again = custom(prefix={"start_from": str(stage_a)}, evaluate_only=4)
    assert same(prepared(loaded, again, model_dir=own), of_own)


def test_a_stage_may_add_a_deep_prefix_to_that_of_an_earlier_one(loaded: tuple[Any, Any], tmp_path: Path):
    stage_a, of_stage_a = kept(loaded, tmp_path / "a", 2)
    wanted = {"start_from": str(stage_a), "deep": {"num": 2}}
    found = prepared(loaded, custom(prefix=wanted))
    assert found.deep is not None
    assert not found.deep.values_LKDE.any()
    assert same(of_stage_a, found)
    assert loaded[0].get_decoder().config._attn_implementation == ATTENTION
    found.deep.values_LKDE.data += 1
    write_prefix(tmp_path / "b", trained_state(found, keep_prob=1.0, base=base_hash(*loaded)))
    assert same(prepared(loaded, custom(prefix={"deep": {"num": 2}}), tmp_path / "b"), found)
    with pytest.raises(ConfigError, match=r"deep: \{'num': 2.*\} there, None here"):
        prepared(loaded, custom(), tmp_path / "b")


def test_a_run_that_goes_on_with_its_optimizer_gets_no_deep_prefix(loaded: tuple[Any, Any], tmp_path: Path):
    earlier, of_earlier = kept(loaded, tmp_path / "earlier", 2)
    deep = custom(prefix={"deep": {"num": 2}})
    with pytest.raises(ConfigError, match=r"deep: .*trained without one.*start_from: .*earlier"):
        prepared(loaded, deep, earlier, with_optimizer=earlier)
    assert same(of_earlier, prepared(loaded, deep, earlier))
    assert same(of_earlier, prepared(loaded, custom(), earlier, with_optimizer=earlier))


def test_prefixes_that_do_not_fit_are_refused(loaded: tuple[Any, Any], tmp_path: Path):
    wider, _ = kept(
        loaded, tmp_path / "wider", 1, prefix={"encoder": {**SETTINGS["encoder"], "mlp_width": 24}}
    )
    with pytest.raises(ConfigError, match="mlp_width: 24 there, 16 here"):
        prepared(loaded, custom(), model_dir=wider)
    with pytest.raises(ConfigError, match=r"holds no latent_prefix\.json"):
        prepared(loaded, custom(prefix={"start_from": str(tmp_path)}))
    prefix = new_prefix(custom().latent_prefix, 32, seed=1)
    write_prefix(tmp_path / "other", trained_state(prefix, keep_prob=1.0, base="0" * 64))
    with pytest.raises(ConfigError, match="another base model"):
        prepared(loaded, custom(prefix={"start_from": str(tmp_path / "other")}))
    with pytest.raises(ConfigError, match="lacks 1 of 4 latent tokens"):
        prepared(loaded, custom(prefix={"num_latents": 4}))


def test_static_vectors_start_from_the_text_of_the_prompt(loaded: tuple[Any, Any]):
    model, tok = loaded
    section = Custom.model_validate(
        {"latent_prefix": {**SETTINGS, "source": "static", "encoder": {}} | {"encoder": None}}
    )
    prefix = prepared(loaded, section)
    ids = tok.encode("Find: red box.", add_special_tokens=False)
    mean = model.get_input_embeddings()(torch.tensor(ids)).mean(0)
    assert prefix.vectors_MH is not None
    torch.testing.assert_close(prefix.vectors_MH.mean(0), mean)


def test_a_saved_model_is_as_plain_as_before(loaded: tuple[Any, Any], folder: Path, tmp_path: Path):
    prepared(loaded, custom())
    loaded[0].save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert names == load_file(folder / "model.safetensors").keys()
    assert not any(ATTRIBUTE in name for name in names)
