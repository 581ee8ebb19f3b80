"""A server as a scenario describes it: the flags of its engine, and what an engine declares of itself.

Which flags there are is the engine's matter: each module of `sim.engines` defines its own struct, derived from
`EngineFlags`, under the server's own names. Everything else asks for what is declared here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self, TypeVar

import msgspec
from numpy.typing import NDArray

from sim.model.errors import BadInput
from sim.model.files.shape import Fail
from sim.model.quantity import Size
from sim.model.warning import Notice

if TYPE_CHECKING:
    from sim.model.scenario import Hardware

Uniform = Callable[[int, int], int]
"""Draws a whole number between two, both included."""


class Bounds(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A value only known to lie between `low` and `high`."""

    low: Size
    high: Size


class Limit(NamedTuple):
    """Something that can keep requests waiting: its `name`, what `EngineFlags.full` calls it, and how a forecast says
    that requests wait for it."""

    name: str
    full: str
    words: str


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """What an engine says of itself.

    `name` is what scenarios call it, `family` what the software is called, `aliases` what images, tables and lists of
    models call that, `versions` (a regular expression) those whose scheduler it is. `flags_from` says where the flags
    and their defaults are documented. `told` are the flags that the server tells (where `told_at` says), `decisive`
    those from which it follows who waits; `capacity` is the flag for the size of the KV cache that a calibration can
    hold. `forms` are the step-time forms that suit its steps, the usual one first. `limits` can keep requests
    waiting, in the order in which a forecast looks at them, and `turn` is what else does. `counters` are the series
    of its `/metrics` that `Engine.counters` has. `arguments` and the `*_argument`s are how its command line names
    things.
    """

    name: str
    title: str
    family: str
    versions: str
    flags_from: str
    aliases: tuple[str, ...] = ()
    told: tuple[str, ...] = ()
    told_at: str = ""
    decisive: tuple[str, ...] = ()
    capacity: str
    forms: tuple[str, ...]
    limits: tuple[Limit, ...] = ()
    turn: str = ""
    refused: Mapping[str, str] = field(default_factory=dict)  # flags whose effect is not simulated, and what that is
    counters: tuple[str, ...] = ()
    by_device: tuple[str, ...] = ()  # decisive flags whose defaults depend on the device
    arguments: Mapping[str, str] = field(default_factory=dict)  # of the command line, by flags that it calls otherwise
    launched: tuple[str, ...] = ()  # flags that a launch always names
    not_arguments: tuple[str, ...] = ()  # flags that its command line does not have
    model_argument: str = "--model"
    host_argument: str = "--host"
    shards_argument: str = "--tensor-parallel-size"
    refused_status: int = 400  # of a request that is too long
    overloaded_status: int = 503
    image: str = ""
    tokenizer_workers: int = 1


class EngineFlags:
    """The flags of a server. A frozen struct of an engine's own derives from this; its tag is the engine's name."""

    __slots__ = ()
    declared: ClassVar[Declaration]

    @property
    def engine(self) -> str:
        """What scenarios call the engine."""
        return self.declared.name

    @property
    def permits(self) -> int | None:
        """How many requests are let in at once; None for no such limit."""
        return None

    @property
    def pads(self) -> bool:
        """Whether every sequence of a batch costs as much as its longest."""
        return False

    @property
    def warnings(self) -> list[Notice]:
        """What to know of every forecast with these flags."""
        return []

    @property
    def kv_tokens(self) -> int | None:
        """Tokens for which the KV cache has room; None where that is not settled yet."""
        raise NotImplementedError

    @property
    def longest(self) -> str:
        """The longest requests that the server takes, in words."""
        raise NotImplementedError

    def on(self, machine: Hardware, written: Collection[str]) -> Self:
        """The flags with the defaults that depend on the machine, where none was `written`."""
        return self

    def as_told(self, told: Mapping[str, Any]) -> Self:
        """The flags of a server that says these of itself; what that leaves no meaning is unset."""
        return msgspec.structs.replace(self, **told)  # type: ignore[type-var]

    def allowed(self, prompt_tokens: int, max_new_tokens: int) -> int:
        """How many tokens a request may get: servers may cut it to what there is room for. 0 if the server refuses it
        before its engine sees it."""
        return max_new_tokens

    def refuses(self, prompt_tokens: int, max_new_tokens: int) -> bool:
        """Whether the server refuses a request because of its lengths."""
        raise NotImplementedError

    def check_fits(self, prompt_tokens: int, max_new_tokens: int) -> None:
        """Raise `CannotFit` for a request that is accepted but can never be scheduled, so that all behind it starve;
        a capacity that is not settled counts at its largest."""

    def check(self, fail: Fail) -> None:
        """Complain about the first flag that the server would not start with."""
        raise NotImplementedError

    def settled(self, capacity: float | None, uniform: Uniform, machine: Hardware) -> Self:
        """The flags with every one known: what they do not say of the KV cache is the `capacity` of a
        calibration, tokens, or what fits on the machine; what is known within bounds only is drawn. Raises `BadInput`
        where nothing tells."""
        raise NotImplementedError

    def widened(self, prompt_tokens: int, total_tokens: int, users: int, given: set[str]) -> Self:
        """The flags with limits that are not `given` wide enough for what the server was seen to accept."""
        raise NotImplementedError

    def full(self, steps: Mapping[str, NDArray[Any]], prompt_tokens: int, max_new_tokens: int) -> dict[str, float]:
        """Of a window's `steps` (columns of a run's, with `held`: KV tokens before each, and `inside`: whether it began
        within the window), how much of what was admitted, or of the time, met each limit; by `Limit.full`. The lengths
        are those of a usual request."""
        raise NotImplementedError


F = TypeVar("F", bound=EngineFlags)


def expect(server: EngineFlags, kind: type[F], what: str) -> F:
    """The flags, if they are of that engine; `BadInput` says that `what` is for no other."""
    if not isinstance(server, kind):
        raise BadInput(f"expected a server of {kind.declared.name}, found {server.engine}: {what} for no other yet")
    return server
