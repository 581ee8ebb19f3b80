"""Count Python statements, docstrings excluded, of every package at two commits."""

from __future__ import annotations

import argparse
import ast
import io
import subprocess
import tarfile
from collections import Counter

PACKAGES = ("sim", "calibrate", "measure", "scenarios", "servecast")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before")
    parser.add_argument("after", nargs="?", default="HEAD")
    asked = parser.parse_args()
    before, after = counted(asked.before), counted(asked.after)
    print(f"{'statements':<12}{asked.before[:12]:>14}{asked.after[:12]:>14}{'change':>9}")
    for package in PACKAGES:
        print(f"{package:<12}{before[package]:>14,}{after[package]:>14,}{after[package] - before[package]:>+9,}")
    old, new = before.total(), after.total()
    print(f"{'together':<12}{old:>14,}{new:>14,}{new - old:>+9,}")


def counted(commit: str) -> Counter[str]:
    """The statements of each package at a commit."""
    packed = subprocess.run(["git", "archive", commit], check=True, capture_output=True).stdout
    found: Counter[str] = Counter()
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        for member in archive:
            package = member.name.split("/")[0]
            if package in PACKAGES and member.name.endswith(".py"):
                file = archive.extractfile(member)
                assert file is not None
                found[package] += statements(file.read().decode())
    return found


def statements(source: str) -> int:
    """The statements of a module, without docstrings."""
    nodes = list(ast.walk(ast.parse(source)))
    docstrings = sum(isinstance(node, DOCUMENTED) and ast.get_docstring(node, False) is not None for node in nodes)
    return sum(isinstance(node, ast.stmt) for node in nodes) - docstrings


if __name__ == "__main__":
    main()
