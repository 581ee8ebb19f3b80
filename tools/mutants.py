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
}
OF_TGI, OF_VLLM = list(JUDGES)[:4], list(JUDGES)[4:]
JUDGES_OF = {  # a file that only one engine needs: any other is tried by all
    "sim/engines/tgi_0_9_4/engine.py": OF_TGI,
    "sim/engines/tgi_0_9_4/batch.py": OF_TGI,
    "sim/engines/vllm_v1/scheduler.py": OF_VLLM,
    "sim/engines/vllm_v1/engine.py": OF_VLLM,
    "sim/engines/vllm_v1/step.py": OF_VLLM,
    "sim/engines/kv_cache.py": OF_VLLM,
    "sim/engines/decoders.py": OF_VLLM,
}

MUTANTS = {  # file: what is wrong with it, the code, and what it becomes (the code must be there exactly once)
    "sim/engines/tgi_0_9_4/engine.py": [
        ("prefill budget not reached", "prompt > prefill_budget", "prompt >= prefill_budget"),
        ("prefill budget ignored", "prompt > prefill_budget or ", ""),
        ("token budget not reached", "prompt + new > token_budget", "prompt + new >= token_budget"),
        ("prompts not charged", "prompt + new > token_budget", "new > token_budget"),
        ("prompts not rounded to blocks", "prompt += e.prompt_blocks", "prompt += e.prompt_tokens"),
        ("new tokens not rounded to blocks", "new += e.new_blocks", "new += e.max_new_tokens"),
        ("charged what comes back, not what was asked", "new += e.new_blocks", "new += e.output_tokens"),
        ("padded rows: one too few", "prompt = (taken + 1) * longest", "prompt = taken * longest"),
        ("padded to the last, not the longest", "longest = max(longest, e.prompt_tokens)", "longest = e.prompt_tokens"),
        ("running batch not charged", "max(0, self._token_budget - self.batch.used)", "self._token_budget"),
        (
            "skips what does not fit",
            "                break\n            popped += 1\n",
            "                continue\n            popped += 1\n",
        ),
        (
            "forced one step late",
            "self._waiting_steps >= self.config.max_waiting",
            "self._waiting_steps > self.config.max_waiting",
        ),
        (
            "jumps past the forced step",
            "max_waiting_tokens - self._waiting_steps",
            "max_waiting_tokens - self._waiting_steps + 1",
        ),
        ("a forced step in the past", "if forced <= ahead:", "if forced < ahead - 1:"),
        ("waits from 0", "            self._waiting_steps = 1\n", "            self._waiting_steps = 0\n"),
        ("a prefill does not reset the wait", "            self._waiting_steps = 1\n", ""),
        ("a run counts as one step of waiting", "self._waiting_steps += steps", "self._waiting_steps += 1"),
        (
            "queue one short of the ratio",
            "len(self.queue) < min_size and self.decide",
            "len(self.queue) <= min_size and self.decide",
        ),
        (
            "what fits one short of the ratio",
            "if min_size is not None and taken < min_size:",
            "if min_size is not None and taken <= min_size:",
        ),
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
        ("reasons to join mixed up", "self.wait_exceeded += 1", "self.backpressure += 1"),
        ("who leaves while filtering stays", "1 if batch.leaving else", ""),
        ("no second look after the first prefill", "if not before:  # a prefill", "if before is None:  # a prefill"),
        (
            "runs past a forced admission",
            "if admission is not None and admission < steps:",
            "if False:",
        ),
        ("joining charged for all", "longest, size - before, 0, before)", "longest, size, 0, before)"),
        ("who leaves is noticed one step late", "            return done + 1\n", "            return done + 2\n"),
    ],
    "sim/engines/tgi_0_9_4/batch.py": [
        ("one-token answers decode", "e.output_tokens <= 1 or e.gone", "e.output_tokens < 1 or e.gone"),
        ("who left in the prefill stays", "e.output_tokens <= 1 or e.gone", "e.output_tokens <= 1"),
        ("one token too many", "last = now + e.output_tokens - 1", "last = now + e.output_tokens"),
        ("no early stop", "last = now + e.output_tokens - 1", "last = now + e.max_new_tokens - 1"),
        ("live use as reserved", "self.used += e.live_tokens", "self.used += e.prompt_blocks + e.new_blocks"),
        ("use never handed back", "                self.used -= e.live_tokens", "                pass"),
        ("first token not in the context", "length = e.prompt_tokens + 1 - now", "length = e.prompt_tokens - now"),
        ("leaves and ends at once", "if e.last_step > self.steps:", "if e.last_step >= self.steps:"),
        ("padded use: the sum counted once", "len(kept) * (longest - 1 + sum(", "(len(kept) * (longest - 1) + sum("),
        ("padded use: the joining part not padded", "(both - longest) * len(kept)", "0"),
        ("padded use: what remains forgotten", "return kept * longest + remaining", "return kept * longest"),
    ],
    "sim/engines/vllm_v1/scheduler.py": [
        (
            "the null block is used",
            "self.size, self.usable = flags.block_size, flags.blocks - 1",
            "self.size, self.usable = flags.block_size, flags.blocks",
        ),
        ("admits in a step that preempted", "elif self.waiting and not step.preempted:", "elif self.waiting:"),
        (
            "the victim is the first admitted",
            "next(reversed(self.running)) if self.fcfs",
            "next(iter(self.running)) if self.fcfs",
        ),
        ("the victim goes to the end", "self.waiting.appendleft(held)", "self.waiting.append(held)"),
        (
            "the victim keeps its blocks",
            "        self.cache.give_back(held, computed, findable)\n        held.preemptions",
            "        held.preemptions",
        ),
        ("only the first chunk must fit", "if self.reserves else need\n", "if False else need\n"),
        ("all seats and one more", "and len(self.running) < self.seats:", "and len(self.running) <= self.seats:"),
        (
            "one seat too few for a newcomer to be seen",
            "if len(self.running) >= self.seats:",
            "if len(self.running) >= self.seats - 1:",
        ),
        ("the cap binds a lone request", "if present == 1 and self.rules.spares_lone_prompt:", "if False:"),
        (
            "the adaptive cap is the smaller",
            "cap = max(cap, self.budget // present)",
            "cap = min(cap, self.budget // present)",
        ),
        ("the watermark holds on an idle server", "(self._watermark if self.running else 0)", "self._watermark"),
        ("no watermark", "(self._watermark if self.running else 0)", "0"),
        (
            "a whole prompt can be hit",
            "self.cache.hits(held, (known - 1) // size)",
            "self.cache.hits(held, known // size)",
        ),
        ("hits nobody uses cost nothing", "room = blocks.free - idle - ", "room = blocks.free - "),
        ("hits are computed again", "tokens = min(known - cached, cap)", "tokens = min(known, cap)"),
        (
            "a prompt is split though chunking is off",
            "if not forced and not self.flags.enable_chunked_prefill:",
            "if False:",
        ),
        (
            "a request admitted needs a block more",
            "whole > need else need) > room and",
            "whole > need else need) >= room and",
        ),
        (
            "admissions do not spend the budget",
            "                break\n            budget -= tokens\n",
            "                break\n",
        ),
        (
            "admits without budget",
            "while at < len(self.waiting) and budget > 0 and",
            "while at < len(self.waiting) and budget >= 0 and",
        ),
        (
            "running requests do not spend the budget",
            "            given[held] = tokens\n            budget -= tokens\n",
            "            given[held] = tokens\n",
        ),
        ("a victim's share of the budget is lost", "budget += tokens_back", "pass"),
        (
            "one block is kept from running requests",
            "while new and new > blocks.free and not forced:",
            "while new and new >= blocks.free and not forced:",
        ),
        (
            "who preempted itself does not end the turn",
            "if held.state == WAITING:  # it preempted itself\n                break",
            "if held.state == WAITING:  # it preempted itself\n                continue",
        ),
        ("asynchronous: a step too many", "if held.allowed == held.limit:", "if False:"),
        ("asynchronous: a stop token is foreseen", "if held.allowed == held.limit:", "if True:"),
        (
            "asynchronous: tokens under way are found",
            "min(held.line + self.scheduled, held.prompt + held.received(self.seen))",
            "held.line + self.scheduled",
        ),
        (
            "priority: the order of ids is that of numbers",
            "held.request.arrived, str(held.request.id)",
            "held.request.arrived, f'{held.request.id:9d}'",
        ),
        (
            "priority: the least urgent goes first",
            "return held.request.priority, held.request.arrived, str",
            "return -held.request.priority, held.request.arrived, str",
        ),
        (
            "priority: the victim is the most urgent",
            "max(self.running, key=_urgency_of_victim)",
            "min(self.running, key=_urgency_of_victim)",
        ),
        (
            "priority: the victim is the last admitted",
            "max(self.running, key=_urgency_of_victim)",
            "next(reversed(self.running))",
        ),
        ("old versions: the watermark is heeded", "if self.rules.has_watermark else 0", "if True else 0"),
        (
            "old versions: reserve the whole prompt",
            "flags.scheduler_reserve_full_isl and self.rules.reserves_whole_prompt",
            "flags.scheduler_reserve_full_isl",
        ),
        ("old versions: no long prompt is skipped", "if tokens < 0 and self.rules.skips_long_prompts:", "if False:"),
        (
            "old versions: a victim's token is delivered",
            "if held.pending and not self.rules.delivers_to_preempted:",
            "if False:",
        ),
    ],
    "sim/engines/vllm_v1/engine.py": [
        (
            "an answer is not cut at the model's length",
            "request.output_tokens = min(request.output_tokens, room)",
            "pass",
        ),
        ("a prompt as long as the model is taken", "if room <= 0:", "if room < 0:"),
        (
            "aborts act after the output",
            "                if not comes and boundary <= number and",
            "                if not comes and boundary < number and",
        ),
        ("asynchronous: not one step ahead", "self._depth = 2 if", "self._depth = 1 if"),
        (
            "asynchronous: a newcomer is seen one step late",
            "valid = min(valid, boundary + self._depth - 1)\n        return",
            "valid = min(valid, boundary + self._depth)\n        return",
        ),
        (
            "a plan goes on past a request's end",
            "its.decoders.next_end - first.number + 1)",
            "its.decoders.next_end - first.number + 2)",
        ),
        (
            "a plan goes on past the last chunk",
            "held.base - before - tokens - 1) // tokens",
            "held.base - before - 1) // tokens",
        ),
        (
            "a plan goes on though others may hit what is decoded",
            "ahead < self._depth - 1 or its.cache.shared or",
            "ahead < self._depth - 1 or",
        ),
    ],
    "sim/engines/vllm_v1/step.py": [
        ("attention within a chunk is forgotten", "tokens * before + tokens * (tokens + 1) // 2", "tokens * before"),
        (
            "the token fed is not in the context",
            "context, longest_context = self.lines + count * number, self.longest",
            "context, longest_context = self.lines + count * (number - 1), self.longest",
        ),
    ],
    "sim/engines/kv_cache.py": [
        (
            "blocks without an entry are used last",
            "        if self._blank_first:\n            self._blank += blank\n        else:\n",
            "        if True:\n",
        ),
        ("the head of a text goes first", "for block in reversed(blocks):", "for block in blocks:"),
        (
            "the newest of the same texts is hit",
            "oldest = found.setdefault(number, block)",
            "oldest = block; found[number] = block",
        ),
        ("an evicted block is still found", "                self._forget(run)\n", "                pass\n"),
        (
            "a used block counts as free",
            "if not block.users:\n                del self._list[block]\n                self.free -= 1",
            "if not block.users:\n                del self._list[block]",
        ),
        ("what is evicted leaves no heir", "        elif block.younger:", "        elif False:"),
        ("taken from the back", "run = next(iter(self._list))", "run = next(reversed(self._list))"),
        ("entries are used before blocks without one", "if blocks <= blank or not self._list:", "if not self._list:"),
    ],
    "sim/engines/decoders.py": [
        (
            "a block is taken one step late",
            "self._phases[(1 - line) % self._size] += 1",
            "self._phases[-line % self._size] += 1",
        ),
        ("a whole cycle of blocks is missed", "return cycles * self.count + partial", "return partial"),
        (
            "one step more than the blocks are enough for",
            "free - self._phases[(first + fit) % size]) >= 0",
            "free - self._phases[(first + fit) % size]) >= -1",
        ),
        ("the longest is never forgotten", "        self._lengths[line] -= 1\n", ""),
    ],
    "sim/cluster/replica.py": [
        (
            "an arrival misses its boundary",
            "steps_by(self.clock.now) - 1 - self._before",
            "steps_by(self.clock.now) - self._before",
        ),
        ("a stop one step ahead is missed", "if valid < self._target:", "if valid < self._target - 1:"),
        (
            "arrivals are seen at the plan's end",
            "elif self._plan is not None and done + 1 < self._target:",
            "elif False:",
        ),
        (
            "an idle router does not wait for the rest of an instant",
            "call(self.clock.now, self._serve, priority=ROUTER)",
            "call(self.clock.now, self._serve, priority=0)",
        ),
        ("an end that no longer holds is taken for one", " and self.clock.now == self._due", ""),
        ("noise by plan, not by step", "self.number += steps * work.passes", "self.number += work.passes"),
        ("dropping costs nothing", "        took = self._time_between(after)\n", "        took = 0.0\n"),
        ("joining costs nothing", "0.0 if once is None else self.step_time.line(once).first", "0.0"),
        ("goes on with a segment that is another's", "and not plan.admitted:", "and True:"),
    ],
    "sim/cluster/clock.py": [
        ("time passes over what is due", "self._queue[0][0] <= time", "self._queue[0][0] < time"),
    ],
    "sim/steptime/linear.py": [
        ("a growth that is not there", "0.0 if growth is NOTHING else", "0.0 if steps == 1 else"),
    ],
}


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
        return failing(tree, JUDGES_OF.get(file, list(JUDGES)))


def failing(tree: Path, judges: Iterable[str]) -> dict[str, bool]:
    """Which of the judges fail in the tree. All do on one that hangs; memory is limited."""
    tests = [f"tests/{JUDGES[judge]}.py" for judge in judges]
    options = ["-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", "--hypothesis-profile=mutants"]
    not_about_sim = ["test_sim_laws.py::test_the_worlds_drawn", "test_sim_schedules.py::test_pytest_schedules"]
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
    named = [(file, *mutant) for file, mutants in MUTANTS.items() for mutant in mutants]
    chosen = [mutant for mutant in named if args.k in f"{mutant[0]}: {mutant[1]}"]
    needed = {judge for file, *_ in chosen for judge in JUDGES_OF.get(file, JUDGES)}
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
