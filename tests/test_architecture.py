"""Imports point one way: read from the source by ast, without running anything."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lexel

ROOT = Path(lexel.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py"))

BASE = {"types", "errors", "hub", "machine", "nn"}
# part → the other parts of lexel it may import
ALLOWED = {
    "types": {"errors"},
    "errors": set(),
    "hub": {"errors"},
    "machine": {"errors", "hub"},
    "nn": {"types", "errors", "machine"},
    "checkpoints": {"errors", "hub"},
    "catalog": {"errors", "hub", "checkpoints"},
    "tokenizers": BASE | {"checkpoints", "catalog"},
    "models": BASE | {"checkpoints", "catalog"},
    "vocabulary": BASE | {"tokenizers.layout"},
    "document": BASE | {"tokenizers.layout", "vocabulary"},
    "prompts": BASE | {"tokenizers.layout", "vocabulary", "document"},
    "data": BASE | {"tokenizers", "vocabulary", "document", "prompts"},
}
ALLOWED["sample"] = ALLOWED["data"] | {"models", "data"}
ALLOWED["evaluate"] = ALLOWED["sample"] | {"sample"}
ALLOWED["train"] = ALLOWED["evaluate"] | {"evaluate"}
ALLOWED["verify"] = ALLOWED["train"] | {"train", "checkpoints", "catalog"}
ALLOWED["cli"] = ALLOWED["verify"] | {"verify"}
ALLOWED["conf"] = set()
ALLOWED["__init__"] = ALLOWED["cli"]

ONLY_IN = {"lightning": "train", "wandb": "train", "hydra": "train", "gradio": "sample/demo.py"}


def _module_parts(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts if parts == ("__init__",) or parts[-1] != "__init__" else parts[:-1]


def _typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """Every node except those that only a type checker reads."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not _typing_only(child):
            yield from _walk(child)


def imported(source: str) -> set[str]:
    """Absolute names of the modules (and `module.name`s) a source file imports at run time."""
    names: set[str] = set()
    for node in _walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute in this project"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def wrong_imports(part: str, names: set[str]) -> list[str]:
    """The imports of `names` that `part` may not make."""
    wrong = []
    for name in sorted(names):
        pieces = name.split(".")
        if pieces[0] != "lexel" or len(pieces) == 1 or pieces[1] in (part, "__version__"):
            continue
        allowed = ALLOWED[part]
        if pieces[1] not in allowed and ".".join(pieces[1:3]) not in allowed:
            wrong.append(name)
    return wrong


def test_a_wrong_import_is_found():
    source = "def f():\n    from lexel.sample.pipeline import Pipeline\n"
    assert wrong_imports("data", imported(source)) == ["lexel.sample.pipeline.Pipeline"]
    assert wrong_imports("document", imported("from lexel.tokenizers.vq import VQTokenizer"))
    assert not wrong_imports("document", imported("from lexel.tokenizers.layout import CodeLayout"))
    assert wrong_imports("models", imported("import lexel.tokenizers.base"))
    assert not imported("if TYPE_CHECKING:\n    import lexel.cli\n")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path):
    part = _module_parts(path)[0]
    assert part in ALLOWED, f"{path.name}: say in this test what the new part may import"
    assert wrong_imports(part, imported(path.read_text())) == []


@pytest.mark.parametrize("library", sorted(ONLY_IN))
def test_heavy_libraries_stay_in_their_part(library: str):
    home = ONLY_IN[library]
    for path in FILES:
        relative = path.relative_to(ROOT).as_posix()
        tops = {name.split(".")[0] for name in imported(path.read_text())}
        assert library not in tops or relative == home or relative.startswith(f"{home}/"), relative


@pytest.mark.parametrize("module", ["lexel", "lexel.cli"])
def test_import_is_light(module: str):
    code = (
        f"import sys, {module}\n"
        "heavy = {'torch', 'lightning', 'transformers', 'diffusers', 'gradio', 'wandb'} & set(sys.modules)\n"
        "sys.exit(' '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names_exist_and_have_docstrings():
    assert set(lexel.__all__) - {"__version__"} == set(lexel._HOMES)
    for name in lexel.__all__:
        assert getattr(lexel, name).__doc__, name
    with pytest.raises(AttributeError, match="Pipeline"):
        _ = lexel.Pipelin  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_definitions_have_docstrings(path: Path):
    tree = ast.parse(path.read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    bare = [
        node.name
        for node in tree.body
        if isinstance(node, kinds) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    assert bare == []
