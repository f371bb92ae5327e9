"""Interventions: one rule object that says which calls (or recorded events) are changed, and how. Pure: no I/O.

What: `Rule` is a predicate and effects; `RuleSet` counts matches and answers which effects apply. The same rules drive the
replay of programs (F2-F4) and of the event stream (F0). Text form, one rule:

    call=fsync path=/var/lib/* nth=2 -> errno=EIO
    call=recv* peer=tcp:10.0.0.7:* payload=/35=8/ from=1.5s to=2s -> delay=+50ms corrupt=17
    call=fdatasync -> delay=-800ms          task=batch-recon -> remove

Predicate: `call` (glob, several with commas), `path` (glob over the file or descriptor label), `peer` (the same for sockets),
`thread` (index in the recording), `task` (glob over the name of the task), `nth` (`2`, `2+`, `2-5`; counted over the calls that
match the rest), `payload` (`/regular expression/` over the bytes that the call passes), `from` and `to` (time since the start).
Effects: `errno`, `result`, `short` (at most N bytes), `delay` (signed), `duration` (sets it), `corrupt` (XOR 0xFF of byte N
of what is read), `clock` (jump, signed), `signal`, `hold` (the thread rests), `remove` (the event did not happen; F0).
A mapping with the keys `when` and `do` is the YAML form; `parse_set` reads the short form of `--set`.
Fails: `InputError` that names the rule, the part and what is allowed.
"""

import errno as errno_names
import re
import shlex
import signal as signal_names
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any, Final

from events.errors import InputError

__all__ = ["Effects", "Rule", "RuleSet", "Subject", "parse_duration_ns", "parse_rule", "parse_set"]

_UNITS_NS: Final = {"ns": 1, "us": 1_000, "ms": 1_000_000, "s": 1_000_000_000, "m": 60_000_000_000, "h": 3_600_000_000_000}
_PREDICATES: Final = ("call", "path", "peer", "thread", "task", "nth", "payload", "from", "to")
_SHORT_FORM: Final = re.compile(r"(?P<call>[A-Za-z0-9_*?,]+)(?:@(?P<path>[^#]+?))?(?:#(?P<nth>[0-9+-]+))?\.(?P<effect>[a-z]+)$")


@dataclass(frozen=True, slots=True)
class Subject:
    """What a rule looks at: one call of a program, or one recorded event. Unknown fields stay empty."""

    call: str
    path: str = ""
    thread: int = -1
    task: str = ""
    payload: bytes = b""
    time_ns: int = 0


@dataclass(frozen=True, slots=True)
class Effects:
    """What is changed. A field that is None (or False) changes nothing."""

    errno: int | None = None
    result: int | None = None
    short: int | None = None
    delay_ns: int | None = None
    duration_ns: int | None = None
    corrupt: int | None = None
    clock_ns: int | None = None
    signal: int | None = None
    hold_ns: int | None = None
    remove: bool = False

    def over(self, other: "Effects") -> "Effects":
        """This one's effects first, the other's where this one has none; delays, holds and jumps add up."""
        values: dict[str, Any] = {}
        for item in fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            adds = item.name in ("delay_ns", "clock_ns", "hold_ns")
            if adds and mine is not None and theirs is not None:
                values[item.name] = mine + theirs
            else:
                values[item.name] = theirs if mine is None or mine is False else mine
        return Effects(**values)


@dataclass(frozen=True, slots=True)
class Rule:
    """A predicate and its effects; build it with `parse_rule`, `Rule.of` or directly."""

    effects: Effects
    call: str = "*"
    path: str | None = None
    peer: str | None = None
    thread: int | None = None
    task: str | None = None
    first: int = 1
    last: int | None = None
    payload: re.Pattern[bytes] | None = field(default=None)
    from_ns: int | None = None
    to_ns: int | None = None

    @classmethod
    def of(cls, mapping: Mapping[str, Any]) -> "Rule":
        """From the YAML form: {"when": {...}, "do": {...}}."""
        unknown = set(mapping) - {"when", "do"}
        if unknown or not isinstance(mapping.get("do"), Mapping):
            raise InputError(f"rule {mapping!r}: a rule has the keys 'when' and 'do', each with NAME: VALUE lines")
        when = {str(k): str(v) for k, v in (mapping.get("when") or {}).items()}
        do = {str(k): "" if v is True else str(v) for k, v in mapping["do"].items()}
        return _build(repr(dict(mapping)), when, do)

    def matches(self, subject: Subject) -> bool:
        """Everything but the count."""
        if not any(fnmatchcase(subject.call, name) for name in self.call.split(",")):
            return False
        for wanted in (self.path, self.peer):
            if wanted is not None and not fnmatchcase(subject.path, wanted):
                return False
        if self.thread is not None and subject.thread != self.thread:
            return False
        if self.task is not None and not fnmatchcase(subject.task, self.task):
            return False
        if self.payload is not None and not self.payload.search(subject.payload):
            return False
        after = self.from_ns is None or subject.time_ns >= self.from_ns
        return after and (self.to_ns is None or subject.time_ns < self.to_ns)

    def counts(self, number: int) -> bool:
        """Whether the number-th match (from 1) is meant."""
        return number >= self.first and (self.last is None or number <= self.last)


class RuleSet:
    """Rules with their counters; deterministic, one per replay."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.rules = tuple(rules)
        self.matched = [0] * len(self.rules)
        self.applied = [0] * len(self.rules)

    def __bool__(self) -> bool:
        return bool(self.rules)

    def effects(self, subject: Subject) -> Effects | None:
        """All effects on this call together, earlier rules first; None when no rule applies."""
        total: Effects | None = None
        for i, rule in enumerate(self.rules):
            if not rule.matches(subject):
                continue
            self.matched[i] += 1
            if rule.counts(self.matched[i]):
                self.applied[i] += 1
                total = rule.effects if total is None else total.over(rule.effects)
        return total


def parse_duration_ns(text: str, where: str) -> int:
    """`+50ms`, `-21ms`, `1.5s`, `300us`, `12` (ns); exact for up to nine decimals of a unit."""
    match = re.fullmatch(r"([+-]?)(\d+)(?:\.(\d+))?(ns|us|ms|s|m|h)?", text)
    if match is None:
        raise InputError(f"{where}: {text!r} is not a duration; write for example +50ms, -21ms, 1.5s or 800us")
    sign, whole, fraction, unit = match.groups()
    factor = _UNITS_NS[unit or "ns"]
    value = int(whole) * factor + (int(fraction) * factor // 10 ** len(fraction) if fraction else 0)
    return -value if sign == "-" else value


def parse_rule(text: str) -> Rule:
    """One rule in its text form."""
    before, arrow, after = text.partition("->")
    if not arrow:
        raise InputError(f"rule {text!r} has no '->'; write for example 'call=fsync nth=2 -> errno=EIO'")
    return _build(text, _pairs(text, before), _pairs(text, after))


def parse_set(text: str) -> Rule:
    """The short form CALL[@PATH][#NTH].EFFECT=VALUE, for example `fsync@/var/*#2.errno=EIO`."""
    key, equals, value = text.partition("=")
    match = _SHORT_FORM.match(key)
    if not equals or match is None:
        raise InputError(f"--set {text!r}: write CALL[@PATH][#NTH].EFFECT=VALUE, for example read@/etc/x#2.errno=EIO")
    when = {name: match[name] for name in ("call", "path", "nth") if match[name]}
    return _build(f"--set {text}", when, {match["effect"]: value})


def _pairs(rule: str, text: str) -> dict[str, str]:
    try:
        words = shlex.split(text.replace("\\", "\\\\"))
    except ValueError as error:
        raise InputError(f"rule {rule!r}: {error}") from error
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def _build(text: str, when: Mapping[str, str], do: Mapping[str, str]) -> Rule:
    where = f"rule {text!r}"
    unknown = set(when) - set(_PREDICATES)
    if unknown:
        raise InputError(f"{where}: {min(unknown)!r} cannot be asked for; there are {', '.join(_PREDICATES)}")
    if not do:
        raise InputError(f"{where}: no effect behind '->'; there are {', '.join(_EFFECTS)}")
    effects = Effects()
    for name, value in do.items():
        if name not in _EFFECTS:
            raise InputError(f"{where}: {name!r} is no effect; there are {', '.join(_EFFECTS)}")
        effects = replace(effects, **_EFFECTS[name](where, value))
    first, last = _nth(where, when.get("nth", "1+"))
    try:
        pattern = re.compile(when["payload"].strip("/").encode(), re.DOTALL) if "payload" in when else None
    except re.error as error:
        raise InputError(f"{where}: payload {when['payload']!r} is not a regular expression: {error}") from error
    return Rule(
        effects=effects, call=when.get("call", "*"), path=when.get("path"), peer=when.get("peer"), task=when.get("task"),
        thread=_number(where, when["thread"])["value"] if "thread" in when else None, first=first, last=last, payload=pattern,
        from_ns=parse_duration_ns(when["from"], where) if "from" in when else None,
        to_ns=parse_duration_ns(when["to"], where) if "to" in when else None,
    )  # fmt: skip


def _nth(where: str, text: str) -> tuple[int, int | None]:
    match = re.fullmatch(r"(\d+)(\+|-(\d+))?", text)
    if match is None or int(match[1]) < 1 or (match[3] and int(match[3]) < int(match[1])):
        raise InputError(f"{where}: nth={text!r}; write 2, 2+ or 2-5, counted from 1")
    first = int(match[1])
    return first, int(match[3]) if match[3] else None if match[2] else first


def _number(where: str, text: str) -> dict[str, int]:
    try:
        return {"value": int(text, 0)}
    except ValueError:
        raise InputError(f"{where}: {text!r} is not a whole number") from None


def _errno(where: str, text: str) -> dict[str, int]:
    value = getattr(errno_names, text.upper(), None)
    if value is None and text.isdigit() and 0 < int(text) < 4096:
        value = int(text)
    if not isinstance(value, int):
        raise InputError(f"{where}: {text!r} is no errno; write for example EIO, ENOSPC or 5")
    return {"errno": value}


def _signal(where: str, text: str) -> dict[str, int]:
    name = text.upper() if text.upper().startswith("SIG") else f"SIG{text.upper()}"
    value = int(text) if text.isdigit() else getattr(signal_names, name, 0)
    if not 0 < int(value) < 65:
        raise InputError(f"{where}: {text!r} is no signal; write for example SIGTERM or 15")
    return {"signal": int(value)}


def _sized(name: str) -> Any:
    def read(where: str, text: str) -> dict[str, int]:
        value = _number(where, text)["value"]
        if value < 0 and name != "result":
            raise InputError(f"{where}: {name}={text} must not be negative")
        return {name: value}

    return read


def _timed(name: str) -> Any:
    return lambda where, text: {name: parse_duration_ns(text, where)}


_EFFECTS: Final[dict[str, Any]] = {
    "errno": _errno, "result": _sized("result"), "short": _sized("short"), "delay": _timed("delay_ns"),
    "duration": _timed("duration_ns"), "corrupt": _sized("corrupt"), "clock": _timed("clock_ns"), "signal": _signal,
    "hold": _timed("hold_ns"), "remove": lambda _where, _text: {"remove": True},
}  # fmt: skip
