"""A docker image that holds this Python and the stand-in, made without pulling anything (`docker import` of a tree)."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterable
from pathlib import Path

import docker

NAME, TAG = "servecast-standin", f"test-{os.getpid()}"  # tests may run in several processes
SITE = "opt/servecast"
LOADED = """
import sys, measure.standin.server
print("\\n".join(sorted({m.__file__ for m in list(sys.modules.values()) if getattr(m, "__file__", None)})))
"""
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "tkinter", "ensurepip", "__pycache__"}


def third_party() -> list[Path]:
    """The packages the stand-in imports from outside the standard library."""
    stdlib = Path(sysconfig.get_path("stdlib")).resolve()
    out = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    roots = []
    for line in out.stdout.splitlines():
        file = Path(line).resolve()
        if stdlib in file.parents and not LEFT_OUT & set(file.parts):
            continue
        top = next((p for p in file.parents if p.parent.name in ("site-packages", "dist-packages")), None)
        top = top or (file if file.parent.name in ("site-packages", "dist-packages") else file.parent)
        roots += [top, top.with_name(f"{top.name}.libs")]
    return sorted({root for root in roots if root.exists()})


def shared_libraries(files: Iterable[Path]) -> set[Path]:
    """What the loader needs for these programs and extensions."""
    found = set()
    for file in files:
        said = subprocess.run(["ldd", str(file)], capture_output=True, text=True, check=False).stdout
        found |= {Path(word) for word in said.split() if word.startswith("/")}
    return {library for library in found if library.exists()}


def tree() -> bytes:
    """The image's file system as a tar."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    python = Path(sys.executable).resolve()
    packages = third_party()
    buffer = io.BytesIO()
    added: set[str] = set()

    with tarfile.open(fileobj=buffer, mode="w") as tar:

        def add(file: Path, name: str) -> None:
            if name not in added and file.is_file():
                added.add(name)
                tar.add(file.resolve(), name, recursive=False)

        def add_folder(folder: Path, name: str) -> list[Path]:
            files = [f for f in folder.rglob("*") if not LEFT_OUT & set(f.relative_to(folder).parts)]
            for file in files:
                add(file, f"{name}/{file.relative_to(folder)}")
            return [f for f in files if ".so" in f.suffixes]

        extensions = add_folder(stdlib, str(stdlib).lstrip("/"))
        for package in packages:
            if package.is_dir():
                extensions += add_folder(package, f"{SITE}/{package.name}")
            else:
                add(package, f"{SITE}/{package.name}")
        add(python, str(python).lstrip("/"))
        for library in shared_libraries([python, *extensions]):
            if not any(package in library.parents for package in packages):
                add(library, str(library).lstrip("/"))
        folder = tarfile.TarInfo("tmp")
        folder.type, folder.mode = tarfile.DIRTYPE, 0o1777
        tar.addfile(folder)
    return buffer.getvalue()


def build(client: docker.DockerClient) -> str:
    """Import the image; returns its name."""
    python = Path(sys.executable).resolve()
    changes = [
        f"ENV PYTHONPATH=/{SITE}",
        f"ENV PYTHONHOME={sys.base_prefix}",
        "ENV PYTHONUNBUFFERED=1",
        f'ENTRYPOINT ["{python}", "-m", "measure.standin.server"]',
    ]
    client.api.import_image_from_data(tree(), repository=NAME, tag=TAG, changes=changes)
    return f"{NAME}:{TAG}"
