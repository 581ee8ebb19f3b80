"""Which engine a server is: its name and version, and who says so.

Only an engine whose scheduler `sim` has can be forecast; a run of any other server, or of one that nobody named, is
forecast only where the user says for which engine it is to be taken.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec

from sim.model.errors import BadInput
from sim.model.text import printable

SIMULATED = ("tgi-0.9.4",)  # engines whose rules `sim` has
SOURCES = ("server", "launch", "file", "scenario")
# what images and tables call an engine, and what we do
NAMES = {"text-generation-inference": "tgi", "tgi": "tgi", "vllm-openai": "vllm", "vllm": "vllm"}
# what OpenAI-style servers write under `owned_by` of the models they offer
OWNERS = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llama.cpp"}
_LONGEST = 60  # characters of a name or a version: they go into warnings


class NotTheEngine(BadInput):
    """A run or a calibration of another engine than the one that would be simulated, or of one that is not known."""


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """An engine. `source` says who told: the server, the command that launched it, the file of another tool, or the
    scenario (of a simulated run, and where a run's own scenario names an engine that is not simulated)."""

    name: str
    version: str | None = None
    source: str = "server"

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name} {self.version}"

    def runs(self, engine: str) -> bool:
        """Whether it is the engine that scenarios call so, such as `tgi-0.9.4`."""
        return engine in (self.name.lower(), f"{self.name.lower()}-{self.version}")


def named(identity: Identity | None) -> str:
    """It in words."""
    return "an unknown engine" if identity is None else str(identity)


def is_engine(identity: Identity | None, engine: str) -> bool:
    """Whether it is known to be that engine."""
    return identity is not None and identity.runs(engine)


def identity(text: str, source: str, version: object = None) -> Identity | None:
    """The identity that a text such as `tgi-0.9.4`, `vLLM 0.6.3` or `vllm` names; None for an empty one."""
    plain = printable(text.strip(), _LONGEST)
    if not plain:
        return None
    if version is None and (parts := re.fullmatch(r"(\D.*?)[-_ ]v?(\d+(?:\.\w+)+)", plain)):
        plain, version = parts[1], parts[2]
    said = None if version is None else printable(str(version).strip(), _LONGEST)
    return Identity(name=NAMES.get(plain.lower(), plain), version=said or None, source=source)


def of_info(info: dict[str, Any] | None) -> Identity | None:
    """The engine that a `GET /info` tells of: text-generation-inference and its version, or None."""
    if not isinstance(info, dict) or not isinstance(info.get("version"), str):
        return None
    if info.get("model_id") is None and "waiting_served_ratio" not in info:  # recordings may leave out the model
        return None
    return identity("tgi", "server", info["version"].removeprefix("v"))


def of_image(image: str) -> Identity | None:
    """The engine that is in a docker image of this name, as far as the name tells."""
    name, _, tag = image.partition("@")[0].rpartition("/")[2].partition(":")
    return identity(name, "launch", tag.removeprefix("v") or None)


def check_engine(found: Identity | None, engine: str, taken_as: str | None, what: str, path: str | Path | None) -> None:
    """Raise `NotTheEngine` where `what` is not known to be of the engine that would be simulated, unless the user takes
    it for that engine."""
    if is_engine(found, engine) or taken_as == engine:
        return
    if found is None:
        reason = f"nothing says that {what} is of {engine}, whose scheduler would be simulated"
    else:
        reason = f"{what} is of {found}, and the simulated scheduler is that of {engine}"
    raise NotTheEngine(f"{reason}; expected --as {engine} to forecast it all the same, with a warning", path=path)
