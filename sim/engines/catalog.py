"""Every engine by its name in scenarios, and the engine of a server by what the server reports.

A new engine is a module with `Flags` and `Engine`, and a line in `ENGINES`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import msgspec

from sim.engines import tgi_0_9_4, vllm_v1
from sim.engines.engine import Engine
from sim.model.errors import BadInput
from sim.model.files.shape import Fail, Key, known
from sim.model.identity import Identity, is_engine
from sim.model.server import Declaration, EngineFlags
from sim.model.text import printable

ENGINES: tuple[tuple[type[EngineFlags], Callable[[Any], Engine]], ...] = (
    (tgi_0_9_4.Flags, tgi_0_9_4.Engine),
    (vllm_v1.Flags, vllm_v1.Engine),
)
FLAGS = {flags.declared.name: flags for flags, _ in ENGINES}
NAMES = tuple(FLAGS)
DEFAULT = NAMES[0]  # of scenarios and runs that name none: it was the only one
# what OpenAI-style servers write under `owned_by` of the models they offer, of engines that are not simulated
OTHERS = {"sglang": "sglang", "llamacpp": "llama.cpp"}
_LONGEST = 60  # characters of a name or a version: they go into warnings


def flags_of(engine: str) -> type[EngineFlags]:
    """The struct of an engine's flags; `BadInput` for an engine that is not simulated."""
    known(engine, NAMES, "engine", ("server", "engine"), lambda _, message: BadInput(message, key="server.engine"))
    return FLAGS[engine]


def declared(engine: str) -> Declaration:
    """The declaration of an engine; `BadInput` for one that is not simulated."""
    return flags_of(engine).declared


def scheduler(flags: EngineFlags) -> Engine:
    """A server's scheduler; all flags are known (`EngineFlags.settled`)."""
    return next(make for kind, make in ENGINES if isinstance(flags, kind))(flags)


def shape_of(hint: Any, value: Any, fail: Fail, key: Key) -> Any:
    """What stands for a type in a file: for `EngineFlags` the struct of the engine that the value names."""
    if hint is not EngineFlags or not isinstance(value, dict):
        return hint
    engine = value.get("engine", DEFAULT)
    if not isinstance(engine, str):
        raise fail((*key, "engine"), f"expected one of {', '.join(NAMES)}")
    known(engine, NAMES, "engine", (*key, "engine"), fail)
    for name, what in FLAGS[engine].declared.refused.items():
        asked = value.get(name)
        if asked is True or asked not in (None, False, 1):
            raise fail((*key, name), f"expected none: {what} is not simulated")
    return FLAGS[engine]


def convert(hint: type, value: Any) -> Any:
    """A value of a file as msgspec's `dec_hook` wants it."""
    if hint is not EngineFlags:
        raise NotImplementedError(hint)
    try:
        return msgspec.convert(value, flags_of(value.get("engine", DEFAULT)) if isinstance(value, dict) else dict)
    except msgspec.ValidationError as e:  # where in the whole file is not said by itself
        message, _, within = str(e).partition(" - at `$")
        raise msgspec.ValidationError(f"{message} - at `$.server{within.rstrip('`')}`") from e


def identity(text: str, source: str, version: object = None) -> Identity | None:
    """The identity that a text such as `tgi-0.9.4`, `vLLM 0.6.3` or `vllm` names; None for an empty one."""
    plain = printable(text.strip(), _LONGEST)
    if not plain:
        return None
    if version is None and (parts := re.fullmatch(r"(\D.*?)[-_ ]v?(\d+(?:\.\w+)+)", plain)):
        plain, version = parts[1], parts[2]
    said = None if version is None else printable(str(version).strip(), _LONGEST)
    return Identity(name=_family(plain.lower()) or plain, version=said or None, source=source)


def _family(name: str) -> str | None:
    kinds = (flags.declared for flags, _ in ENGINES)
    return next((kind.family for kind in kinds if name in (kind.family, *kind.aliases)), None)


def kind_of(found: Identity | None) -> type[EngineFlags] | None:
    """The struct of the flags of the engine that a server is known to be; None if it is not simulated."""
    return next((kind for kind in FLAGS.values() if is_engine(found, kind.declared)), None)


def of_family(name: object) -> str | None:
    """The name in scenarios of the engine of this software, whatever its version; None if it is not simulated."""
    return next((kind.declared.name for kind in FLAGS.values() if kind.declared.family == name), None)


def of_info(info: dict[str, Any] | None) -> Identity | None:
    """The engine by `GET /info`: text-generation-inference and its version, or None."""
    if not isinstance(info, dict) or not isinstance(info.get("version"), str):
        return None
    if info.get("model_id") is None and "waiting_served_ratio" not in info:  # recordings may leave out the model
        return None
    return identity(tgi_0_9_4.Flags.declared.family, "server", info["version"].removeprefix("v"))


def of_image(image: str) -> Identity | None:
    """The engine in a docker image, by the name of the image; None if that does not tell."""
    name, _, tag = image.partition("@")[0].rpartition("/")[2].partition(":")
    return identity(name, "launch", tag.removeprefix("v") or None)


def of_owner(owner: str) -> str | None:
    """The engine of a server that writes this under `owned_by` of the models it offers."""
    return _family(owner) or OTHERS.get(owner)


def json_schema(hint: type) -> dict[str, Any]:
    """The JSON schema of a type that msgspec does not know, as its `schema_hook` wants it."""
    if hint is not EngineFlags:
        raise NotImplementedError(hint)
    return {"anyOf": [msgspec.json.schema(flags) for flags, _ in ENGINES]}
