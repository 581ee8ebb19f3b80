"""Count Python statements, docstrings excluded, of every package at two commits, and numbers other than −1, 0, 1, 2."""

from __future__ import annotations

import argparse
import ast
import io
import subprocess
import tarfile
from collections import Counter
from collections.abc import Callable

PACKAGES = ("sim", "calibrate", "measure", "scenarios", "servecast")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before")
    parser.add_argument("after", nargs="?", default="HEAD")
    asked = parser.parse_args()
    for what, count in (("statements", statements), ("numbers", numbers)):
        before, after = counted(asked.before, count), counted(asked.after, count)
        print(f"{what:<12}{asked.before[:12]:>14}{asked.after[:12]:>14}{'change':>9}")
        for package in PACKAGES:
            print(f"{package:<12}{before[package]:>14,}{after[package]:>14,}{after[package] - before[package]:>+9,}")
        old, new = before.total(), after.total()
        print(f"{'together':<12}{old:>14,}{new:>14,}{new - old:>+9,}")


def counted(commit: str, count: Callable[[str], int]) -> Counter[str]:
    """What `count` finds in each package at a commit."""
    packed = subprocess.run(["git", "archive", commit], check=True, capture_output=True).stdout
    found: Counter[str] = Counter()
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        for member in archive:
            package = member.name.split("/")[0]
            if package in PACKAGES and member.name.endswith(".py"):
                file = archive.extractfile(member)
                assert file is not None
                found[package] += count(file.read().decode())
    return found


def statements(source: str) -> int:
    """The statements of a module, without docstrings."""
    nodes = list(ast.walk(ast.parse(source)))
    docstrings = sum(isinstance(node, DOCUMENTED) and ast.get_docstring(node, False) is not None for node in nodes)
    return sum(isinstance(node, ast.stmt) for node in nodes) - docstrings


def numbers(source: str) -> int:
    """The numeric literals of a module other than 0, 1 and 2 (and so −1)."""
    found = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return sum(type(value) in (int, float) and value not in (0, 1, 2) for value in found)


if __name__ == "__main__":
    main()
