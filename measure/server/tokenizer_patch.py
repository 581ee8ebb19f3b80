"""A model that does not end its answers by itself: its tokenizer's end token replaced by one that never comes.

TGI 0.9.4 cannot be told over HTTP to ignore the end of an answer; it asks only the tokenizer which token that is
(server/text_generation_server/utils/tokens.py:122-135). So in a launched container the files that say it are covered by
copies that name the unknown token instead. The model's own folder is not touched.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from sim.model.scenario import Launch

FILES = ("tokenizer_config.json", "special_tokens_map.json")


def host_folder(launch: Launch) -> Path | None:
    """Where the model's folder lies on this machine; None for a model that is not in one of the volumes."""
    model = PurePosixPath(launch.model)
    for host, inside in launch.volumes.items():
        if model.is_absolute() and model.is_relative_to(inside):
            folder = Path(host).expanduser() / model.relative_to(inside)
            return folder if folder.is_dir() else None
    return None


def endless(launch: Launch, out: Path) -> dict[Path, str]:
    """Write the copies into `out/overlay`; returns {file here: path in the container}, to cover the model's."""
    folder = host_folder(launch)
    mounts: dict[Path, str] = {}
    for name in FILES if folder is not None else ():
        assert folder is not None
        try:
            said: dict[str, Any] = msgspec.json.decode((folder / name).read_bytes())
        except (OSError, msgspec.DecodeError):
            continue
        if not isinstance(said, dict) or not said.get("eos_token") or not said.get("unk_token"):
            continue
        copy = out.resolve() / "overlay" / name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(msgspec.json.encode(said | {"eos_token": said["unk_token"]}))
        mounts[copy] = str(PurePosixPath(launch.model) / name)
    return mounts
