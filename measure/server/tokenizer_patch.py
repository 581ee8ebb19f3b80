"""The tokenizer patch: files of the model whose end token is replaced by one that is never generated.

TGI 0.9.4 has no parameter to ignore the end token; it takes that token from the tokenizer only
(server/text_generation_server/utils/tokens.py:122-135). In a launched container the files that name it are therefore
replaced by copies that name the unknown token. The model's own folder is not changed.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from sim.model.scenario import Launch

FILES = ("tokenizer_config.json", "special_tokens_map.json")


def host_folder(launch: Launch) -> Path | None:
    """The model's folder on this machine; None if the model is not in one of the volumes."""
    model = PurePosixPath(launch.model)
    for host, inside in launch.volumes.items():
        if model.is_absolute() and model.is_relative_to(inside):
            folder = Path(host).expanduser() / model.relative_to(inside)
            return folder if folder.is_dir() else None
    return None


def patched_tokenizer(launch: Launch, out: Path) -> dict[Path, str]:
    """Write the patched copies to `out/tokenizer`; returns {file on this machine: path in the container}."""
    folder = host_folder(launch)
    mounts: dict[Path, str] = {}
    for name in FILES if folder is not None else ():
        assert folder is not None
        try:
            config: dict[str, Any] = msgspec.json.decode((folder / name).read_bytes())
        except (OSError, msgspec.DecodeError):
            continue
        if not isinstance(config, dict) or not config.get("eos_token") or not config.get("unk_token"):
            continue
        copy = out.resolve() / "tokenizer" / name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(msgspec.json.encode(config | {"eos_token": config["unk_token"]}))
        mounts[copy] = str(PurePosixPath(launch.model) / name)
    return mounts
