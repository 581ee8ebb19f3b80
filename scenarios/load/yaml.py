"""YAML 1.2 as plain values and the place of each, for untrusted files: they are read in bounded time and memory, or
refused in one line.

Values are taken from the composed nodes, not from ruamel's own objects: those know nothing of where a key stands that
was merged in or has a tag, and fail on tags that do not fit. Aliases and merge keys (`<<`) are followed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import date
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from sim.model.errors import BadInput
from sim.model.files.shape import Fail, Key
from sim.model.text import printable

DEEPEST = 50  # maps and lists inside one another; a scenario has five
MOST = 100_000  # values, each alias counted as what it stands for: ten aliases of ten of ten ... are a billion
LARGEST = 2**63  # of a whole number: what does not fit into 64 bits counts nothing here
DIGITS = 40  # of a number, beyond which only how many it has is told

_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"


def parse_yaml(text: str, path: object) -> Node | None:
    """The nodes of one document, None for an empty one; `BadInput` names the line where it stops making sense."""
    yaml, depth = YAML(typ="rt"), 0
    try:
        for event in yaml.parse(text):  # before it is composed, which takes a recursion for every level
            depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
            if depth > DEEPEST:
                line = event.start_mark.line + 1
                raise BadInput(
                    f"expected at most {DEEPEST} maps and lists inside one another", path=str(path), line=line
                )
        composed: Node | None = yaml.compose(text)
    except MarkedYAMLError as e:
        last = len(text.splitlines())  # what a truncated file lacks is missed after its end
        at = min(e.problem_mark.line + 1, last) if e.problem_mark else None
        problem = (e.problem or str(e.context)).partition(" with value")[0]
        raise BadInput(f"not YAML: {problem}", path=str(path), line=at) from e
    except YAMLError as e:
        raise BadInput(f"not YAML: {str(e).splitlines()[0]}", path=str(path)) from e
    except (ValueError, OverflowError, LookupError, TypeError, AttributeError, AssertionError) as e:
        raise BadInput("not YAML", path=str(path)) from e  # where ruamel itself stumbles
    return composed


class Values:
    """Plain values of nodes; `place` gets the line of every key and entry, `fail` makes an error."""

    def __init__(self, place: Callable[[Key, int], None], fail: Fail):
        self._place, self._fail = place, fail
        self._count = 0

    def of(self, node: Node | None, key: Key = (), around: tuple[int, ...] = ()) -> Any:
        """The value of a node, which is that of `key`; raises `BadInput`."""
        if node is None:
            return None
        self._count += 1
        if self._count > MOST or len(around) > 2 * DEEPEST:
            raise self._fail(key, f"expected at most {MOST} values, those of aliases included")
        if id(node) in around:
            raise self._fail(key, "an alias that contains itself")
        inside = (*around, id(node))
        if isinstance(node, MappingNode):
            self._check_tag(node, "map", key)
            return {name: self.of(value, (*key, name), inside) for name, value in self._entries(node, key, inside)}
        if isinstance(node, SequenceNode):
            self._check_tag(node, "seq", key)
            for i, entry in enumerate(node.value):
                self._place((*key, i), entry.start_mark.line + 1)
            return [self.of(entry, (*key, i), inside) for i, entry in enumerate(node.value)]
        return self._scalar(node, key)

    def _entries(self, node: MappingNode, key: Key, around: tuple[int, ...]) -> list[tuple[str, Node]]:
        """The entries of a map: its own, and those that it merges in below them."""
        own: dict[str, Node] = {}
        merged: dict[str, tuple[Node, int]] = {}
        for name_node, value in node.value:
            line = name_node.start_mark.line + 1
            if name_node.tag == _MERGE:
                for each in value.value if isinstance(value, SequenceNode) else [value]:
                    if not isinstance(each, MappingNode) or id(each) in around:
                        raise self._fail(key, "expected << to merge in a map, or a list of maps")
                    for name, entry in self._entries(each, key, (*around, id(each))):
                        merged.setdefault(name, (entry, line))
                continue
            named = self._scalar(name_node, key) if isinstance(name_node, ScalarNode) else "a map or a list"
            if not (isinstance(named, str) and isinstance(name_node, ScalarNode)):
                raise self._fail(key, f"expected text as the name of a key, found {named!r}")
            name = named
            self._place((*key, name), line)
            if name in own:
                at = self._fail((*key, name), "")
                where = (at.path, at.line) if isinstance(at, BadInput) else (None, None)
                raise BadInput(f'not YAML: found duplicate key "{printable(name)}"', path=where[0], line=where[1])
            own[name] = value
        for name, (_, line) in merged.items():
            if name not in own:
                self._place((*key, name), line)
        return list(({name: entry for name, (entry, _) in merged.items()} | own).items())

    def _check_tag(self, node: Node, kind: str, key: Key) -> None:
        if node.tag != _TAG + kind:
            raise self._fail(key, f"expected a plain value, found the tag {_shown(node.tag)}")

    def _scalar(self, node: Node, key: Key) -> Any:
        kind, text = str(node.tag).removeprefix(_TAG), str(node.value)
        try:
            if kind == "timestamp":  # no key takes one: whoever means text puts it in quotes
                with suppress(ValueError):
                    return date.fromisoformat(text)
            if kind in ("str", "timestamp"):
                text.encode()  # half a character cannot be written anywhere
                return text
            if kind == "null":
                return None
            if kind == "bool":
                return {"true": True, "false": False}[text.lower()]
            if kind == "int":
                return self._whole(text, key)
            if kind == "float":
                return self._number(text)
        except (ValueError, KeyError) as e:
            raise self._fail(key, f"expected a value of the kind {kind}, found {printable(text, DIGITS)!r}") from e
        raise self._fail(key, f"expected a plain value, found the tag {_shown(node.tag)}")

    def _whole(self, text: str, key: Key) -> int:
        digits = text.replace("_", "").lower()
        bare = digits.lstrip("+-")
        base = {"0x": 16, "0o": 8, "0b": 2}.get(bare[:2], 10)
        if len(bare) > DIGITS or abs(number := int(digits, base)) >= LARGEST:
            raise self._fail(key, f"expected a whole number below 2^63, found one of {len(bare)} digits")
        return number if digits[0] != "-" else -abs(number)

    def _number(self, text: str) -> float | int:
        plain = text.replace("_", "").lower()
        number = float(plain.replace(".inf", "inf").replace(".nan", "nan"))
        # 1e5 is a whole number
        return int(number) if number.is_integer() and abs(number) < LARGEST else number


def _shown(tag: object) -> str:
    return printable(str(tag), 2 * DIGITS)
