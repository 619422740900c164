"""Which file imports which: scripts -> common -> model -> common.cpu, everything -> configurator, and no circles.

Read from the source, so imports inside functions count.
"""

import ast
import sys
from pathlib import Path

from conftest import ROOT

import pytest

FILES = [p for pattern in ("*.py", "common/*.py", "research/*.py") for p in sorted(ROOT.glob(pattern))]
NAMES = {p: ".".join(p.relative_to(ROOT).with_suffix("").parts) for p in FILES}
SCRIPTS = {name for name in NAMES.values() if "." not in name} - {"model", "configurator"}
COMMON = {name for name in NAMES.values() if name.startswith("common.")}
RESEARCH = {name for name in NAMES.values() if name.startswith("research.")}


def imports_of(path: Path) -> set[str]:
    """The files of ours that a file imports, anywhere in it. Those of research/ import each other without the folder."""
    known, found = set(NAMES.values()), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            candidates = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            candidates = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        if path.parent.name == "research":
            candidates += [f"research.{name}" for name in candidates]
        found |= known & set(candidates)
    return found


IMPORTS = {NAMES[p]: imports_of(p) for p in FILES}


def allowed(name: str) -> set[str]:
    if name == "configurator":
        return set()
    if name == "model":
        return {"common.cpu", "common.rope"}
    if name in RESEARCH:
        return {"configurator", "common.files"} | RESEARCH
    if name in COMMON:
        return {"configurator", "model"} | COMMON
    scripts = {
        "train": {"eval_hellaswag", "prepare_tinystories"},
        "bench": {"train", "eval_hellaswag", "prepare_tinystories"},
    }
    return {"configurator", "model"} | COMMON | scripts.get(name, set())


def test_the_imports_are_found():
    assert {"train", "sample", "bench"} < SCRIPTS and "common.shards" in COMMON and "research.sweep" in RESEARCH
    assert "common.cpu" in IMPORTS["model"] and "model" in IMPORTS["common.checkpoint"]
    assert "research.laws" in IMPORTS["research.scaling"] and "train" in IMPORTS["bench"]


@pytest.mark.parametrize("name", IMPORTS)
def test_a_file_imports_only_what_its_place_allows(name):
    assert IMPORTS[name] <= allowed(name)


def test_no_files_import_each_other_in_a_circle():
    remaining = {name: set(imported) for name, imported in IMPORTS.items()}
    while free := {name for name, imported in remaining.items() if not imported & remaining.keys()}:
        for name in free:
            del remaining[name]
    assert not remaining, f"among {', '.join(sorted(remaining))} there is a circle"


def test_common_is_a_flat_folder_and_no_module_shadows_the_standard_library():
    assert not {name.rpartition(".")[2] for name in NAMES.values()} & set(sys.stdlib_module_names)
    assert not (ROOT / "common" / "__init__.py").exists()
    assert {p.name for p in (ROOT / "common").iterdir() if p.is_dir()} <= {"__pycache__"}
