"""What is installed is what is in the repository, dependencies are honest, and the docs' commands parse."""

from __future__ import annotations

import argparse
import ast
import email
import itertools
import re
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import fields
from importlib import metadata
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from packaging.requirements import Requirement

import lexel
from lexel.cli import build_parser
from lexel.data import ShapesConfig
from lexel.train.cli import resolve

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
LARGEST_BUNDLE = 12 * 2**20

# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as file:
        yield file


@pytest.fixture(scope="module")
def described(wheel: zipfile.ZipFile) -> email.message.Message:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_string(wheel.read(name).decode())


def test_the_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    package = {p.relative_to(ROOT).as_posix() for p in (ROOT / "lexel").rglob("*") if p.is_file()}
    assert inside == {name for name in package if "__pycache__" not in name}
    assert {"lexel/py.typed", "lexel/conf/train.yaml", "lexel/conf/hydra/help/lexel.yaml"} <= inside


def test_the_shipped_bundle_is_small(wheel: zipfile.ZipFile) -> None:
    weights = [i for i in wheel.infolist() if i.filename.endswith(".safetensors")]
    assert sum(info.file_size for info in weights) <= LARGEST_BUNDLE
    assert all(info.filename.startswith("lexel/bundles/") for info in weights)


def test_the_wheel_says_who_it_is(wheel: zipfile.ZipFile, described: email.message.Message) -> None:
    assert described["Version"] == lexel.__version__
    assert described["License-Expression"] == "Apache-2.0"
    assert set(described.get_all("Provides-Extra") or ()) == {"demo", "eval", "media", "dev"}
    scripts = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    text = wheel.read(scripts).decode()
    assert "lexel = lexel.cli:main" in text
    assert "lexel-train = lexel.train.cli:main" in text


# Dependencies


def _required(names: Iterator[Requirement], extra: str = "") -> set[str]:
    """Normal names of the requirements that apply with `extra` (empty: those of the plain installation)."""
    wanted = [r for r in names if r.marker is None or r.marker.evaluate({"extra": extra})]
    return {re.sub(r"[-_.]+", "-", r.name).lower() for r in wanted}


def _requirements(lines: list[str] | None) -> Iterator[Requirement]:
    return map(Requirement, lines or [])


def test_nothing_needs_torchvision(described: email.message.Message) -> None:
    todo = _required(_requirements(described.get_all("Requires-Dist")))
    seen: set[str] = set()
    while todo:
        name = todo.pop()
        seen.add(name)
        try:
            todo |= _required(_requirements(metadata.requires(name))) - seen
        except metadata.PackageNotFoundError:  # of another platform or Python version
            continue
    assert {"torch", "lightning"} <= seen
    assert not seen & {"torchvision", "timm", "lpips", "torch-fidelity"}


def _imported() -> set[str]:
    """Top-level modules that lexel imports, wherever."""
    found = set()
    for path in (ROOT / "lexel").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found |= {name.split(".")[0] for name in names}
    return found - set(sys.stdlib_module_names) - {"lexel"}


def test_every_import_is_a_declared_dependency(described: email.message.Message) -> None:
    lines = described.get_all("Requires-Dist")
    declared = set().union(
        *(_required(_requirements(lines), extra) for extra in ("", "demo", "eval", "media"))
    )
    owners = metadata.packages_distributions()
    for module in sorted(_imported()):
        names = {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners.get(module, [module])}
        assert names & declared, f"{module} is imported but not among the dependencies"


# The docs


def test_the_docs_name_every_option() -> None:
    training, data = ((ROOT / "docs" / f"{page}.md").read_text() for page in ("training", "data"))
    conf = ROOT / "lexel" / "conf"
    for path in conf.rglob("*.yaml"):
        group = path.parent.relative_to(conf).as_posix()
        if group not in (".", "hydra/help"):
            assert f"`{group}`" in training or group == "task", group
            assert re.search(rf"\b{path.stem}\b", training), f"docs/training.md lacks {group}={path.stem}"
    for field in fields(ShapesConfig):
        assert f"`{field.name}`" in data, f"docs/data.md lacks {field.name}"


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in one of the languages."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [text for language, text in fences if language in languages]


def commands(page: Path) -> Iterator[list[str]]:
    """Words of every `lexel` and `lexel-train` call in the page's shell blocks; ``torchrun … -m
    lexel.train.cli`` is one too."""
    for text in blocks(page, "bash", "sh", "console", ""):
        for line in text.replace("\\\n", " ").splitlines():
            if "lexel" not in line:
                continue
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if "lexel.train.cli" in words:
                words[: words.index("lexel.train.cli") + 1] = ["lexel-train"]
            while words and (words[0] == "srun" or "=" in words[0]):  # a launcher, an environment variable
                words.pop(0)
            if words and words[0] in ("lexel", "lexel-train"):
                yield words


COMMANDS = sorted({shlex.join(words) for page in PAGES for words in commands(page)})
LEXEL = [text for text in COMMANDS if text.startswith("lexel ")]
TRAIN = [text for text in COMMANDS if text.startswith("lexel-train ")]


def test_the_docs_show_every_command() -> None:
    shown = {shlex.split(text)[1] for text in LEXEL}
    assert {"sample", "describe", "reconstruct", "tokenize", "evaluate", "demo"} <= shown
    assert len(TRAIN) > 10


@pytest.mark.parametrize("command", LEXEL)
def test_documented_lexel_commands_parse(command: str) -> None:
    build_parser().parse_args(shlex.split(command)[1:])


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML files that the docs tell a user to write: blocks that begin with a path in a comment (after
    Hydra's own, which must come first)."""
    folder = tmp_path_factory.mktemp("configs")
    for page in PAGES:
        for text in blocks(page, "yaml"):
            if named := re.match(r"(?:# @package \S+\n)?# (\S+\.yaml)\n", text):
                path = folder / named[1]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
    return folder


def _jobs(overrides: list[str]) -> Iterator[list[str]]:
    """The jobs of a multirun: every combination of the comma-separated values."""
    choices = []
    for override in OverridesParser.create().parse_overrides(overrides):
        key, text = override.get_key_element(), override.input_line
        sweep = override.is_sweep_override()
        choices.append([f"{key}={v}" for v in override.sweep_string_iterator()] if sweep else [text])
    yield from (list(job) for job in itertools.product(*choices))


@pytest.mark.parametrize("command", TRAIN)
def test_documented_training_commands_compose(
    command: str, configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))  # the docs put it on PYTHONPATH
    parser = argparse.ArgumentParser()
    parser.add_argument("--config-dir")
    parser.add_argument("--multirun", action="store_true")
    parser.add_argument("--cfg", choices=["job", "hydra", "all"])
    parser.add_argument("overrides", nargs="*")
    words = shlex.split(command)[1:]
    if words == ["--help"]:
        return
    arguments = parser.parse_intermixed_args(words)
    search = [f"hydra.searchpath=[file://{configs / arguments.config_dir}]"] if arguments.config_dir else []
    jobs = list(_jobs(arguments.overrides))
    assert (len(jobs) > 1) == arguments.multirun
    with initialize_config_module("lexel.conf", version_base="1.3"):
        for job in jobs:
            resolve(compose("train", overrides=[*search, *job]))
