"""Replay recorded choices of real balancers, and print by software and policy how many ours makes."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from recorded_balancers import differences, read_balancer_recordings  # noqa: E402


def main() -> int:
    """Print the table; status 1 if a choice differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, default=[ROOT / "data" / "balancers.jsonl.gz"])
    requests, agreed = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for file in parser.parse_args().files:
        for recording in read_balancer_recordings(file):
            policy = recording.software, recording.policy
            requests[policy] += len(recording.events)
            agreed[policy] += len(recording.events) - len(differences(recording))
    print(f"{'software':<16}{'policy':<24}{'requests':>10}{'agree':>8}{'share':>9}")
    for policy, number in requests.items():
        print(f"{policy[0]:<16}{policy[1]:<24}{number:>10,}{agreed[policy]:>8,}{agreed[policy] / number:>9.1%}")
    print(f"{'all':<40}{requests.total():>10,}{agreed.total():>8,}{agreed.total() / requests.total():>9.1%}")
    return int(agreed != requests)


if __name__ == "__main__":
    sys.exit(main())
