"""No module needs itself to be imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGES = ("sim", "calibrate", "measure", "scenarios", "servecast")


def imported(body: list[ast.stmt], modules: set[str]) -> Iterator[str]:
    """What is imported when a module is: not in functions, nor for type checkers only."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules else str(node.module)
        elif isinstance(node, ast.If) and ast.unparse(node.test) != "TYPE_CHECKING":
            yield from imported(node.body + node.orelse, modules)
        elif isinstance(node, ast.Try | ast.ClassDef):
            yield from imported(node.body, modules)


def graph(root: Path) -> dict[str, set[str]]:
    files = {}
    for package in PACKAGES:
        for file in (root / package).rglob("*.py"):
            name = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            files[name] = file
    found = {name: set(imported(ast.parse(file.read_text()).body, set(files))) for name, file in files.items()}
    return {name: {other for other in others if other in files} for name, others in found.items()}


def test_no_module_imports_itself_through_others() -> None:
    modules = graph(Path(__file__).parent.parent)
    assert len(modules) > 150 and "sim.engines.engine" in modules["sim.cluster.replica"]
    TopologicalSorter(modules).prepare()


def test_a_cycle_is_found(tmp_path: Path) -> None:
    (tmp_path / "sim").mkdir()
    (tmp_path / "sim/one.py").write_text("from sim.two import x\n")
    (tmp_path / "sim/two.py").write_text("def f():\n    from sim.one import y\n")
    TopologicalSorter(graph(tmp_path)).prepare()
    (tmp_path / "sim/two.py").write_text("import sim.one\n")
    with pytest.raises(CycleError):
        TopologicalSorter(graph(tmp_path)).prepare()
