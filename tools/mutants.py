"""Plant one small mistake after the other in the simulator and see which test catches it (`make mutants`).

A law that kills no mutant is no law. Each mutant is one substitution in a copy of the tree; the laws, the cases worked
by hand, the reference and the recorded schedules are run against it. Status 1 if one survives them all, or cannot be
planted.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
JUDGES = ("laws", "batcher", "reference", "schedules")

MUTANTS = {  # file: what is wrong with it, the code, and what it becomes (the code must be there exactly once)
    "sim/batcher.py": [
        ("one permit too many", "self.in_use < self.config.max_conc", "self.in_use <= self.config.max_conc"),
        ("prefill budget not reached", "prompt > prefill_budget", "prompt >= prefill_budget"),
        ("prefill budget ignored", "prompt > prefill_budget or ", ""),
        ("token budget not reached", "prompt + new > token_budget", "prompt + new >= token_budget"),
        ("prompts not charged", "prompt + new > token_budget", "new > token_budget"),
        ("prompts not rounded to blocks", "prompt += r.prompt_blocks", "prompt += r.prompt_tokens"),
        ("new tokens not rounded to blocks", "new += r.new_blocks", "new += r.max_new_tokens"),
        ("charged what comes back, not what was asked", "new += r.new_blocks", "new += r.output_tokens"),
        ("padded rows: one too few", "prompt = (taken + 1) * longest", "prompt = taken * longest"),
        ("padded to the last, not the longest", "longest = max(longest, r.prompt_tokens)", "longest = r.prompt_tokens"),
        ("running batch not charged", "max(0, self._token_budget - self.batch.used)", "self._token_budget"),
        (
            "skips what does not fit",
            "                break\n            popped += 1\n",
            "                continue\n            popped += 1\n",
        ),
        ("forced one step late", "self.waiting >= self.config.max_waiting", "self.waiting > self.config.max_waiting"),
        ("jumps past the forced step", "max_waiting_tokens - self.waiting", "max_waiting_tokens - self.waiting + 1"),
        ("a forced step in the past", "if forced <= ahead:", "if forced < ahead - 1:"),
        ("waits from 0", "        self.waiting = 1\n        ended", "        self.waiting = 0\n        ended"),
        ("a prefill does not reset the wait", "        self.waiting = 1\n        ended", "        ended"),
        ("a run counts as one step of waiting", "self.waiting += steps", "self.waiting += 1"),
        ("queue one short of the ratio", "len(self.queue) < min_size", "len(self.queue) <= min_size"),
        ("what fits one short of the ratio", "taken < min_size:", "taken <= min_size:"),
        ("nothing is put back", "if min_size is not None and taken < min_size:", "if False:"),
        ("put back in reverse", "extendleft(reversed(front))", "extendleft(front)"),
        ("put back at the end", "extendleft(reversed(front))", "extend(front)"),
        ("ratio rounded up", "int(np.floor(", "int(np.ceil("),
        (
            "ratio in float64",
            "np.float32(len(self._min_sizes)) * self._ratio",
            "len(self._min_sizes) * self.config.waiting_served_ratio",
        ),
        ("looks ahead with another ratio", ">= min_size and self._fitting", "> min_size and self._fitting"),
        (
            "looks ahead for one more than fits",
            "self._fitting(min_size)[1] >= min_size",
            "self._fitting(min_size)[1] > min_size",
        ),
        ("a blocked head that leaves still blocks", "self.blocked = False  # it may", "pass  # it may"),
        (
            "an answer of one token keeps its permit",
            "                self.in_use -= 1\n        return ended\n\n    def decoded",
            "                pass\n        return ended\n\n    def decoded",
        ),
        (
            "who leaves keeps the permit",
            "        request.gone = True\n        self.in_use -= 1",
            "        request.gone = True",
        ),
        ("reasons to join mixed up", "self.wait_exceeded += 1", "self.backpressure += 1"),
    ],
    "sim/batch.py": [
        ("one-token answers decode", "r.output_tokens <= 1 or r.gone", "r.output_tokens < 1 or r.gone"),
        ("who left in the prefill stays", "r.output_tokens <= 1 or r.gone", "r.output_tokens <= 1"),
        ("one token too many", "last = now + r.output_tokens - 1", "last = now + r.output_tokens"),
        ("no early stop", "last = now + r.output_tokens - 1", "last = now + r.max_new_tokens - 1"),
        ("live use as reserved", "self.used += r.live_tokens", "self.used += r.prompt_blocks + r.new_blocks"),
        ("use never handed back", "                self.used -= r.live_tokens", "                pass"),
        ("first token not in the context", "length = r.prompt_tokens + 1 - now", "length = r.prompt_tokens - now"),
        ("leaves and ends at once", "if r.last_step > self.steps:", "if r.last_step >= self.steps:"),
        ("padded use: the sum counted once", "len(kept) * (longest - 1 + sum(", "(len(kept) * (longest - 1) + sum("),
        ("padded use: the joining part not padded", "(both - longest) * len(kept)", "0"),
        ("padded use: what remains forgotten", "return kept * longest + remaining", "return kept * longest"),
    ],
    "sim/replica.py": [
        (
            "an arrival misses its boundary",
            "max(self._run.steps_by(self.clock.now), self._done + 1)",
            "self._run.steps_by(self.clock.now) + 1",
        ),
        (
            "looks twice at a boundary",
            "max(self._run.steps_by(self.clock.now), self._done + 1)",
            "self._run.steps_by(self.clock.now)",
        ),
        ("a stop one step ahead is missed", "if step < self._target:", "if step < self._target - 1:"),
        ("who leaves while filtering stays", "1 if batch.leaving else", ""),
        ("arrivals are seen at the run's end", "elif self._decoding and not self.batcher.blocked:", "elif False:"),
        ("no second look after the first prefill", "continue  # the router looks", "pass  # the router looks"),
        ("runs past a forced admission", "min(end, before + look)", "end"),
        ("an idle router does not wait for the rest of an instant", "EventPriority(ROUTER)", "EventPriority(0)"),
        ("noise by run, not by step", "self.number += count", "self.number += 1"),
        (
            "joining charged for all",
            "joined = size - old if 0 < old < size else 0",
            "joined = size if 0 < old < size else 0",
        ),
        ("filtering costs nothing", "    yield from self._filter(batch.members", "    self._filter(batch.members"),
    ],
}


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
        return failing(tree)


def failing(tree: Path) -> dict[str, bool]:
    """Which of `JUDGES` fail in the tree. All do on one that hangs; memory is limited."""
    tests = [f"tests/test_sim_{judge}.py" for judge in JUDGES]
    options = ["-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", "--hypothesis-profile=mutants"]
    not_about_sim = ["test_sim_laws.py::test_the_worlds_drawn", "test_sim_schedules.py::test_pytest_schedules"]
    options += [f"--deselect=tests/{test}" for test in not_about_sim]
    command = ["sh", "-c", 'ulimit -v 6000000; exec nice "$@"', "sh", sys.executable, "-m", "pytest", *options, *tests]
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(tree)}
    try:
        done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=90)
    except subprocess.TimeoutExpired:
        return dict.fromkeys(JUDGES, True)
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stdout + done.stderr)
    failed = re.findall(r"^(?:FAILED|ERROR) tests/test_sim_(\w+)\.py", done.stdout, re.MULTILINE)
    return {judge: judge in failed for judge in JUDGES}


def main() -> int:
    """Judge all mutants and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("-k", metavar="TEXT", default="", help="only mutants with TEXT in their description")
    args = parser.parse_args()
    chosen = [(file, *mutant) for file, mutants in MUTANTS.items() for mutant in mutants if args.k in mutant[0]]
    if any(failing(ROOT).values()):
        print("the tests fail without any mutant: mend that first")
        return 1
    print(f"{'':<62}" + "".join(f"{judge:>11}" for judge in JUDGES))
    survivors, only = 0, dict.fromkeys(JUDGES, 0)
    with ThreadPoolExecutor(args.jobs) as pool:
        verdicts = pool.map(lambda mutant: judge(mutant[0], mutant[2], mutant[3]), chosen)
        for (file, what, _, _), found in zip(chosen, verdicts, strict=True):
            name = f"{Path(file).stem}: {what}"
            if found is None:
                survivors += 1
                print(f"{name:<62}  cannot be planted: the code has changed", flush=True)
                continue
            killers = [judge for judge, failed in found.items() if failed]
            survivors += not killers
            if len(killers) == 1:
                only[killers[0]] += 1
            marks = "".join(f"{'killed' if found[judge] else '.':>11}" for judge in JUDGES)
            print(f"{name:<62}{marks}{'' if killers else '  SURVIVED'}", flush=True)
    alone = ", ".join(f"{n} by the {judge} alone" for judge, n in only.items())
    print(f"{len(chosen) - survivors} of {len(chosen)} killed; {alone}")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
