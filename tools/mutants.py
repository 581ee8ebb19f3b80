"""Plant one small mistake after the other in the simulator and see which test catches it (`make mutants`).

A law that kills no mutant is no law. Each mutant (`mutants.toml`) is one substitution in a copy of the tree; the laws,
the cases worked by hand, the reference and the recorded schedules are run against it. Status 1 if one survives
them all, or cannot be planted.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
JUDGES = {
    "laws": "test_sim_laws",
    "by hand": "test_engines_tgi",
    "reference": "test_sim_reference",
    "schedules": "test_sim_schedules",
    "vllm": "test_engines_vllm",
    "vllm worlds": "test_engines_vllm_worlds",
    "vllm plans": "test_engines_vllm_plans",
    "choices": "test_balancers_recorded",
    "cases": "test_balancers_by_hand",
    "balancers": "test_balancers_laws",
}
OF_TGI, OF_VLLM, OF_BALANCERS = list(JUDGES)[:4], list(JUDGES)[4:7], list(JUDGES)[7:]
JUDGES_OF = {  # a file that only one engine needs, or no engine: any other is tried by those of all engines
    "sim/engines/tgi_0_9_4/engine.py": OF_TGI,
    "sim/engines/tgi_0_9_4/batch.py": OF_TGI,
    "sim/engines/vllm_v1/scheduler.py": OF_VLLM,
    "sim/engines/vllm_v1/engine.py": OF_VLLM,
    "sim/engines/vllm_v1/step.py": OF_VLLM,
    "sim/engines/kv_cache.py": OF_VLLM,
    "sim/engines/decoders.py": OF_VLLM,
    "sim/cluster/balancers/balancer.py": OF_BALANCERS,
    "sim/cluster/balancers/nginx.py": OF_BALANCERS,
    "sim/cluster/balancers/haproxy.py": OF_BALANCERS,
    "sim/cluster/balancers/routers.py": OF_BALANCERS,
    "sim/cluster/balancers/policies.py": OF_BALANCERS,
}

# file: {what is wrong: [code, what it becomes]}
MUTANTS: dict[str, dict[str, list[str]]] = tomllib.loads((ROOT / "tools" / "mutants.toml").read_text())
MARKS = {True: "killed", False: ".", None: ""}  # None: not asked


def judge(file: str, old: str, new: str) -> dict[str, bool] | None:
    """Which of `JUDGES` fail on the mutant; None if it cannot be planted."""
    source = (ROOT / file).read_text()
    if source.count(old) != 1:
        return None
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for part in ("sim", "tests", "data", "pyproject.toml"):
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, tree / part)
        (tree / file).write_text(source.replace(old, new))
        return failing(tree, JUDGES_OF.get(file, OF_TGI + OF_VLLM))


def failing(tree: Path, judges: Iterable[str]) -> dict[str, bool]:
    """Which of the judges fail in the tree. All do on one that hangs; memory is limited."""
    tests = [f"tests/{JUDGES[judge]}.py" for judge in judges]
    options = ["-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", "--hypothesis-profile=mutants"]
    not_about_sim = [
        "test_sim_laws.py::test_the_worlds_drawn",
        "test_sim_schedules.py::test_pytest_schedules",
        "test_balancers_recorded.py::test_pytest_balancers",
    ]
    options += [f"--deselect=tests/{test}" for test in not_about_sim]
    command = ["sh", "-c", 'ulimit -v 6000000; exec nice "$@"', "sh", sys.executable, "-m", "pytest", *options, *tests]
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(tree)}
    try:
        done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=90)
    except subprocess.TimeoutExpired:
        return dict.fromkeys(judges, True)
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stdout + done.stderr)
    failed = re.findall(r"^(?:FAILED|ERROR) tests/(\w+)\.py", done.stdout, re.MULTILINE)
    return {judge: JUDGES[judge] in failed for judge in judges}


def main() -> int:
    """Judge all mutants and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("-k", metavar="TEXT", default="", help="only mutants with TEXT in their description or file")
    args = parser.parse_args()
    named = [(file, what, *code) for file, mutants in MUTANTS.items() for what, code in mutants.items()]
    chosen = [mutant for mutant in named if args.k in f"{mutant[0]}: {mutant[1]}"]
    needed = {judge for file, *_ in chosen for judge in JUDGES_OF.get(file, OF_TGI + OF_VLLM)}
    if any(failing(ROOT, sorted(needed)).values()):
        print("The tests fail without any mutant: fix that first.")
        return 1
    print(f"{'':<76}" + "".join(f"{judge:>12}" for judge in JUDGES))
    survivors, only = 0, dict.fromkeys(JUDGES, 0)
    with ThreadPoolExecutor(args.jobs) as pool:
        verdicts = pool.map(lambda mutant: judge(mutant[0], mutant[2], mutant[3]), chosen)
        for (file, what, _, _), found in zip(chosen, verdicts, strict=True):
            name = f"{'/'.join(Path(file).with_suffix('').parts[-2:])}: {what}"
            if found is None:
                survivors += 1
                print(f"{name:<76}  ERROR: the code to replace is not there exactly once", flush=True)
                continue
            killers = [judge for judge, failed in found.items() if failed]
            survivors += not killers
            if len(killers) == 1:
                only[killers[0]] += 1
            marks = "".join(f"{MARKS[found.get(judge)]:>12}" for judge in JUDGES)
            print(f"{name:<76}{marks}{'' if killers else '  SURVIVED'}", flush=True)
    alone = ", ".join(f"{n} by the {judge} alone" for judge, n in only.items())
    print(f"{len(chosen) - survivors} of {len(chosen)} killed; {alone}")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
