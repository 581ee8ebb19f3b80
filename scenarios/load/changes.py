"""Changes of a scenario on the command line: `--set` and its short forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sim.model.errors import BadInput

OPTIONS = {
    "users": "load.users",
    "rate": "load.rate",
    "prompt_tokens": "workload.prompt_tokens",
    "output_tokens": "workload.output_tokens",
}
LISTS = ("users", "rate")
EXCLUSIVE = (  # a change of a key in one of a row's sets drops the keys in the others
    ({"load.users"}, {"load.rate"}, {"load.trace"}, {"load.profile"}),
    ({"workload.prompt_tokens", "workload.output_tokens"}, {"workload.empirical"}, {"workload.trace"}),
)


class Change(str):
    """`key=value`, as `--set` takes it; errors name the `option` in which it was written."""

    option: str
    __slots__ = ("option",)

    def __new__(cls, text: str, option: str) -> Change:
        """A change that was written in this option."""
        made = super().__new__(cls, text)
        made.option = option
        return made

    def __reduce__(self) -> tuple[type[Change], tuple[str, str]]:
        """For pickle: it is sent to other processes."""
        return Change, (str(self), self.option)


def changes(sets: Sequence[str], given: Mapping[str, Any]) -> tuple[str, ...]:
    """`--set` options and short forms (by parameter: texts as written) together.

    Raises `BadInput` where a short form and another option change the same key.
    """
    made: list[Change] = []
    for name, key in OPTIONS.items():
        for text in given.get(name) or ():
            value = f"[{text}]" if name in LISTS and not text.strip().startswith("[") else text
            made.append(Change(f"{key}={value}", f"--{name.replace('_', '-')} {text}"))
    for text in given.get("slo") or ():
        metric, equals, limit = text.partition("=")
        if not (metric.strip() and equals and limit.strip()) or "." in metric:
            raise BadInput("expected METRIC=LIMIT, such as e2e_p95=20", path=f"--slo {text}")
        made.append(Change(f"slo.{metric.strip()}={limit}", f"--slo {text}"))
    for i, change in enumerate(made):
        for other in (*made[:i], *sets):
            if same_key(change, other):
                where = other.option if isinstance(other, Change) else f"--set {other}"
                raise BadInput(f"changes the same as {where}; expected one of them", path=change.option)
    return (*sets, *made)


def same_key(one: str, other: str) -> bool:
    """Whether two changes are of one key, of a key and one inside it, or of two keys that exclude each other."""
    first, second = (text.partition("=")[0].split(".") for text in (one, other))
    shorter = min(len(first), len(second))
    if first[:shorter] == second[:shorter]:
        return True
    both = [".".join(parts[:2]) for parts in (first, second)]
    for row in EXCLUSIVE:
        groups = [next((i for i, keys in enumerate(row) if key in keys), None) for key in both]
        if None not in groups and groups[0] != groups[1]:
            return True
    return False
