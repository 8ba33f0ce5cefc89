"""What a run file asks of the machine it is checked on: packages that are installed, paths that exist."""

from __future__ import annotations

import ast
import glob
import importlib.util
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from coordexp.config.checks.problems import Problem, WrittenOf, closest
from coordexp.config.run.run_config import is_our_plugin
from coordexp.config.schema.sections import Sections

TRACKERS: dict[str, tuple[str, ...]] = {
    "azure_ml": ("azureml",),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "comet_ml": ("comet_ml",),
    "dagshub": ("dagshub",),
    "dvclive": ("dvclive",),
    "flyte": ("flytekit",),
    "kubeflow": ("kubeflow",),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
"""Name in `report_to` -> the packages that provide it, any of them."""

OPTIM_NEEDS: tuple[tuple[str, str], ...] = (
    ("galore_", "galore_torch"),
    ("apollo_", "apollo_torch"),
    ("adamw_torch_4bit", "torchao"),
    ("adamw_torch_8bit", "torchao"),
    ("schedule_free_", "schedulefree"),
    ("lomo", "lomo_optim"),
    ("adalomo", "lomo_optim"),
    ("grokadamw", "grokadamw"),
    ("stable_adamw", "optimi"),
    ("adamw_torch_npu_fused", "torch_npu"),
    ("adamw_torch_xla", "torch_xla"),
    ("adamw_anyprecision", "torchdistx"),
    *(
        (name, "bitsandbytes")
        for name in ("adamw_bnb_8bit", "adamw_8bit", "ademamix", "lion_", "paged_", "rmsprop_bnb")
    ),
)
"""Prefix of a name of `optim` -> the package it needs."""


def package_problems(
    _variant: str, sections: Sections, swift: Mapping[str, Any], written: WrittenOf
) -> list[Problem]:
    """Trackers and optimizers that no installed package provides, arguments that the installed vLLM does not know."""
    problems = []
    for name, text in (*_trackers(swift), *_optim(swift)):
        path, place = written(name)
        problems.append(Problem(path, text, value=swift[name], place=place))
    of_eval = sections.custom.rollout_eval
    asking = (sections.rollout_matching, of_eval.rollouts if of_eval.enabled else None)
    for rollout in (settings for settings in asking if settings is not None):
        problems += [
            Problem(f"{rollout.where}.vllm.engine_args.{name}", text)
            for name, text in unknown_engine_args(rollout.vllm.engine_args).items()
        ]
    return problems


def unknown_engine_args(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Name -> what to say, of those that the installed vLLM has no argument for; nothing where there is no vLLM."""
    known = _engine_argument_names() if arguments else None
    if known is None:
        return {}
    unknown = {}
    for name in arguments.keys() - known:
        near = closest(name, known)
        unknown[name] = "the installed vLLM has no such engine argument" + (
            f"; did you mean {near}?" if near else "."
        )
    return dict(sorted(unknown.items()))


@cache
def _engine_argument_names() -> frozenset[str] | None:
    """The fields of vLLM's EngineArgs, read from its source: importing vLLM takes seconds. None without vLLM."""
    found = importlib.util.find_spec("vllm")
    folders = None if found is None else found.submodule_search_locations
    source = None if not folders else Path(folders[0]) / "engine" / "arg_utils.py"
    if source is None or not source.is_file():
        return None
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == "EngineArgs":
            targets = [item.target for item in node.body if isinstance(item, ast.AnnAssign)]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            return frozenset(name for name in names if not name.startswith("_"))
    return None


def _trackers(swift: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in swift.get("report_to") or ():
        if name in ("none", "all"):
            continue
        if name not in TRACKERS:
            near = closest(str(name), TRACKERS)
            hint = (
                f"; did you mean {near}?" if near else f"; expected none, or some of {', '.join(TRACKERS)}."
            )
            yield "report_to", f"no tracker is called {name}{hint}"
        elif not any(_is_installed(package) for package in TRACKERS[name]):
            yield "report_to", f"{name} is not installed; install {TRACKERS[name][0]}, or leave it out."


def _optim(swift: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    name = str(swift.get("optim") or "")
    for prefix, package in OPTIM_NEEDS:
        if name.startswith(prefix) and not _is_installed(package):
            yield "optim", f"needs the package {package}, which is not installed."
            return


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def missing_paths(
    _variant: str, _sections: Sections, swift: Mapping[str, Any], written: WrittenOf
) -> list[Problem]:
    """Files and folders that the run reads and that are not there, relative to the working folder.

    A model may also be the id of a hub (`owner/name`); it is looked for only where it can be no such id.
    """
    problems = []
    for name, value in _paths(swift):
        if not Path(value).expanduser().exists():
            path, place = written(name)
            text = "matches no file." if glob.has_magic(value) else "does not exist."
            problems.append(Problem(path, text, value=value, place=place))
    return problems


def _paths(swift: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in ("dataset", "val_dataset", "external_plugins"):
        for value in _listed(swift.get(name)):
            if not is_our_plugin(value):  # found wherever coordexp is installed
                yield name, value
    for name in ("model", "adapters", "resume_from_checkpoint"):
        for value in _listed(swift.get(name)):
            if not _may_be_hub_id(value):
                yield name, value
    deepspeed = swift.get("deepspeed")
    if isinstance(deepspeed, str) and deepspeed.endswith(".json"):
        yield "deepspeed", deepspeed


def _listed(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [str(item) for item in values]


def _may_be_hub_id(value: str) -> bool:
    """Whether `owner/name`, and no folder of that owner's name lies here."""
    if value.startswith((".", "/", "~")) or value.count("/") > 1:
        return False
    return "/" not in value or not Path(value).parent.is_dir()
