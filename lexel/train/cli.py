"""``lexel-train``: compose a configuration, check it, run the stages that the task names."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lexel.errors import LexelError
from lexel.train.settings import LMStage, Run

USER_ERRORS = (LexelError, ValueError, OSError, HydraException, OmegaConfBaseException)
"""What a wrong input raises: printed as one sentence, exit code 2."""

FULL_ERROR = "HYDRA_FULL_ERROR"
_WANTS_TRACEBACKS = bool(os.environ.get(FULL_ERROR))

NEEDED = {
    "tokenizer": ("data", "tokenizer", "objective"),
    "lm": ("data", "lm", "objective"),
    "curriculum": ("data", "lm", "objective"),
    "self_assess": ("data", "objective"),
    "detokenizer": ("data", "detokenizer"),
    "drafter": ("data", "drafter", "objective"),
    "evaluate": ("data",),
}
"""Which config groups each stage reads; the others are not even instantiated."""

ConfigStore.instance().store(name="schema", node=Run)


def settings_of(*overrides: str) -> Run:
    """The settings of ``lexel-train OVERRIDES``, for Python; `lexel.train.chain.run_chain` runs them.
    Raises as `resolve` does, and HydraException for what does not compose."""
    with hydra.initialize_config_module("lexel.conf", version_base="1.3"):
        return resolve(hydra.compose("train", overrides=list(overrides)))


def resolve(cfg: DictConfig) -> Run:
    """The composed configuration as plain objects: settings as their dataclasses, every needed group's
    `_target_` instantiated. Raises ValueError or LexelError, naming the key, on what makes no sense."""
    settings = ["task", "stages", "parts", "curriculum", "codes", "evaluation", "any_to_any"]
    settings += ["trainer", "logger"]
    objects: dict[str, Any] = {name: OmegaConf.to_object(cfg[name]) for name in settings}
    run = Run(
        output=cfg.output,
        seed=cfg.seed,
        threads=cfg.threads,
        examples=cfg.examples,
        memory_mb=cfg.memory_mb,
        bundle=cfg.bundle,
        **objects,
    )
    run.check()
    for name in {group: None for stage in run.task.stages for group in NEEDED[stage]}:
        setattr(run, name, _instantiate(cfg[name], name))
    if {"lm", "curriculum", "self_assess", "drafter"} & set(run.task.stages):
        run.sources = {name: _instantiate(node, f"sources.{name}") for name, node in cfg.sources.items()}
    if "curriculum" in run.task.stages:
        run.curriculum.stages = {name: _lm_stage(cfg, name) for name in cfg.curriculum.stages}
    for name in run.task.stages:
        if hasattr(run.stages, name):
            stage = getattr(run.stages, name)
            stage.optimizer = _instantiate(stage.optimizer, f"stages.{name}.optimizer")
    return run


def _lm_stage(cfg: DictConfig, name: str) -> LMStage:
    """One stage of a curriculum: ``stages.lm``, then its own settings, then those of every stage."""
    settings, where = cfg.curriculum, f"curriculum.stages.{name}"
    layers = (cfg.stages.lm, settings.stages[name] or {}, settings.every)
    try:
        plain = [OmegaConf.to_container(cfg.stages.lm, resolve=True)]
        plain += [OmegaConf.to_container(OmegaConf.create(layer), resolve=True) for layer in layers[1:]]
        stage: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(LMStage), *plain))
    except OmegaConfBaseException as error:
        raise LexelError(f"{where}: {sentence(error)}") from error
    stage.check(where)
    stage.optimizer = _instantiate(stage.optimizer, f"{where}.optimizer")
    return stage


def _instantiate(node: Any, name: str) -> Any:
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        built = instantiate(node, _convert_="all")
        for item in built.values() if isinstance(built, dict) else [built]:
            if isinstance(item, partial):  # called later: a typo should be found now
                inspect.signature(item.func).bind_partial(*item.args, **item.keywords)
        return built
    except (InstantiationException, TypeError) as error:
        cause = error.__cause__ or error
        raise LexelError(f"the settings of {name!r} do not work: {cause}") from error


@hydra.main(version_base="1.3", config_path="pkg://lexel.conf", config_name="train")
def _compose_and_run(cfg: DictConfig) -> None:
    if not _WANTS_TRACEBACKS:  # composing is over; from here on, and in child processes, errors are ours
        os.environ.pop(FULL_ERROR, None)
    with _user_errors():
        from lexel.train.chain import run_chain

        run = resolve(cfg)
        # In a multirun each job has its own folder below `output`.
        run.output = HydraConfig.get().runtime.output_dir
        run_chain(run)


def main() -> None:
    """Entry point of the ``lexel-train`` command. A user's mistake is one sentence on the standard error
    stream and exit code 2; with HYDRA_FULL_ERROR=1 it is a traceback."""
    # Batches of ever new lengths make oneDNN keep up to 1024 kernels, gigabytes; read when torch is imported.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    os.environ[FULL_ERROR] = "1"  # else Hydra prints its own, longer version of an error and exits with 1
    with _user_errors():
        _compose_and_run()


@contextmanager
def _user_errors() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        _fail("interrupted; the same command continues from the last checkpoint.", code=130)
    except USER_ERRORS as error:
        if _WANTS_TRACEBACKS:
            raise
        _fail(f"{sentence(error)} ({FULL_ERROR}=1 shows where)", code=2)


def sentence(error: BaseException) -> str:
    """The message of an error in one line, without the hints that Hydra and data loading processes add."""
    text = str(error).strip() or type(error).__name__
    if "Traceback (most recent call last)" in text:  # from a data loading process: its last line is the error
        return text.splitlines()[-1].split(": ", 1)[-1]
    if isinstance(error, HydraException) and error.__cause__ is not None:
        text = f"{text.splitlines()[0].rstrip('.')}: {error.__cause__}"
    noise = ("full_key:", "object_type=", "reference_type=", "Config search path", "provider=")
    lines = [line.strip() for line in text.splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(noise))


def _fail(text: str, code: int) -> NoReturn:
    print(f"lexel-train: {text}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
