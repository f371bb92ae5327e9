"""The text of ftrace: `trace` and `trace_pipe` of tracefs, and `trace-cmd report`.

One event a line: task name, tid, (tgid), [cpu], flags, seconds, event, arguments:

    my app-1-123   (   123) [003] d..3.  2261.784942: sched_switch: prev_comm=... ==> next_comm=...

Task names may hold anything. Understood besides: traces without the tgid and flags columns (2.6 and `trace-cmd`), the buffer
name before the task (`trace-cmd` of an instance), latency format, both spellings of the scheduler's events, times in micro-
and nanoseconds or as a plain counter (then taken for nanoseconds), and the notes about lost events of both tools.

Times of microsecond resolution stay as they are: two events of one microsecond keep the order of the file only within a CPU.

Lines that are no event (headers, function traces, markers) are counted by reason. Raises nothing of its own.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from events.records import FLAG_HARDIRQ, FLAG_SOFTIRQ
from probe.neutral import Fields, Report, Row

__all__ = ["parse_arguments", "read_text"]

_TIME: Final = r"(?P<time>\d+(?:\.\d+)?(?P<unit>us)?)(?:[ +!#*@$]*):\s+"
_EVENT: Final = r"(?P<event>[A-Za-z_][\w.:-]*?)(?P<sep>:\s|:$|\(|\s->\s)(?P<args>.*)$"
_LINE: Final = re.compile(
    r"^(?:(?P<buffer>[^\s:]+):\s)?\s*(?P<comm>.*?)-(?P<tid>\d+)\s+(?:\(\s*(?P<tgid>\d+|-+)\)\s+)?\[(?P<cpu>\d+)\]\s+"
    r"(?:(?P<flags>[^\s:]+)\s+)?" + _TIME + _EVENT
)
_LATENCY_LINE: Final = re.compile(
    r"^(?:(?P<buffer>[^\s:]+):\s)?\s*(?P<comm>.*?)-(?P<tid>\d+)\s+(?P<tgid>)(?P<cpu>\d+)"
    r"(?P<flags>[^\s\d:][^\s:]{2,6})\s+" + _TIME + _EVENT
)
_LOST: Final = re.compile(r"^(?:\S+:\s+)?CPU:\s*(\d+) \[(?:LOST )?(\d+)? ?(?:EVENTS(?: DROPPED)?|EVENTS LOST)\]\s*$")

_COMM_FIRST: Final = re.compile(r"^(?P<key>comm)=(?P<comm>.*) (?P<rest>pid=-?\d+(?: .*)?)$")
_SWITCH: Final = re.compile(
    r"^prev_comm=(?P<prev_comm>.*) prev_pid=(?P<prev_pid>-?\d+) prev_prio=(?P<prev_prio>-?\d+) prev_state=(?P<prev_state>\S+)"
    r" ==> next_comm=(?P<next_comm>.*) next_pid=(?P<next_pid>-?\d+) next_prio=(?P<next_prio>-?\d+)"
)
_SWITCH_SHORT: Final = re.compile(
    r"^(?:task )?(?P<prev_comm>.*):(?P<prev_pid>\d+) \[(?P<prev_prio>-?\d+)\] \(?(?P<prev_state>[^\s()]+)\)? ==> "
    r"(?P<next_comm>.*):(?P<next_pid>\d+) \[(?P<next_prio>-?\d+)\]"
)
_WAKE_SHORT: Final = re.compile(
    r"^(?:task )?(?P<comm>.*):(?P<pid>\d+) \[(?P<prio>-?\d+)\](?: <CANT FIND FIELD \w+>)?(?: success=(?P<success>\d+))?"
    r"(?:\s+(?:CPU:|\[)(?P<target_cpu>\d+)\]?)?"
)
_FORK: Final = re.compile(r"^comm=(?P<comm>.*) pid=(?P<pid>\d+) child_comm=(?P<child_comm>.*) child_pid=(?P<child_pid>\d+)")
_RENAME: Final = re.compile(r"^pid=(?P<pid>\d+) oldcomm=(?P<oldcomm>.*) newcomm=(?P<newcomm>.*) oom_score_adj=")
_SIGNAL: Final = re.compile(
    r"^sig=(?P<sig>\d+) errno=(?P<errno>-?\d+) code=(?P<code>-?\d+) comm=(?P<comm>.*) pid=(?P<pid>\d+)"
    r"(?: grp=(?P<grp>\d+) res=(?P<res>\d+))?"
)
_RAW_ENTER: Final = re.compile(r"^NR (?P<id>-?\d+) \((?P<args>[^)]*)\)")
_RAW_EXIT: Final = re.compile(r"^NR (?P<id>-?\d+) = (?P<ret>-?\w+)")
_BLOCK: Final = re.compile(
    r"^(?P<dev>\d+,\d+) (?P<rwbs>\S+) (?:(?P<bytes>\d+) )?(?:\((?P<cmd>[^)]*)\) )?(?P<sector>\d+) \+ (?P<nr_sector>\d+)"
    r"(?: \w+,\d+,\d+)? \[(?P<last>.*)\]"
)
_UNPLUG: Final = re.compile(r"^\[(?P<comm>.*)\] (?P<nr_rq>\d+)")
_CONTENTION: Final = re.compile(r"^(?P<lock_addr>\w+) \((?:flags=(?P<flags>[\w| ]+)|ret=(?P<ret>-?\d+))\)")
_JBD2: Final = re.compile(r"^dev (?P<dev>\d+,\d+) (?:transaction|tid) (?P<transaction>\d+)(?: sync (?P<sync_commit>\d+))?")
_PAIR: Final = re.compile(r"(?:^|[\s,{(])([A-Za-z_][\w.]*(?: struct)?)[=:]\s?(\S+?)(?=[,})]?(?:\s|$))")
_LOCK_FLAGS: Final = {"SPIN": 1, "READ": 2, "WRITE": 4, "RT": 8, "PERCPU": 16, "MUTEX": 32}


def _pairs(text: str) -> dict[str, Any]:
    return dict(_PAIR.findall(text))


def _matched(*patterns: re.Pattern[str]) -> Callable[[str], dict[str, Any]]:
    def parse(text: str) -> dict[str, Any]:
        for pattern in patterns:
            found = pattern.match(text)
            if found:
                return {name: value for name, value in found.groupdict().items() if value is not None}
        return _pairs(text)

    return parse


def _wake(text: str) -> dict[str, Any]:
    found = _COMM_FIRST.match(text)
    if found:
        return {"comm": found["comm"], **_pairs(found["rest"])}
    return _matched(_WAKE_SHORT)(text)


def _enter(text: str) -> dict[str, Any]:
    found = _RAW_ENTER.match(text)
    if not found:
        return _pairs(text)
    # The arguments are hexadecimal without 0x; "10" would be read as ten.
    return {"id": found["id"], "args": [f"0x{a.strip()}" for a in found["args"].split(",") if a.strip()]}


def _block(text: str) -> dict[str, Any]:
    found = _BLOCK.match(text)
    if not found:
        return _pairs(text)
    fields = {name: value for name, value in found.groupdict().items() if value is not None and name != "last"}
    if re.fullmatch(r"-?\d+", found["last"]):  # completions end with the error, all others with the task's name
        fields["error"] = found["last"]
    return fields


def _contention(text: str) -> dict[str, Any]:
    fields = _matched(_CONTENTION)(text)
    if "flags" in fields:
        fields["flags"] = sum(_LOCK_FLAGS.get(word.strip(), 0) for word in fields["flags"].split("|"))
    return fields


def _exec(text: str) -> dict[str, Any]:
    found = re.match(r"^filename=(?P<filename>.*) pid=(?P<pid>\d+) old_pid=(?P<old_pid>\d+)", text)
    return found.groupdict() if found else _pairs(text)


_PARSERS: Final[dict[str, Callable[[str], dict[str, Any]]]] = {
    "sched_switch": _matched(_SWITCH, _SWITCH_SHORT),
    "sched_waking": _wake,
    "sched_wakeup": _wake,
    "sched_wakeup_new": _wake,
    "sched_migrate_task": _wake,
    "sched_process_exit": _wake,
    "sched_process_free": _wake,
    "sched_process_fork": _matched(_FORK),
    "sched_process_exec": _exec,
    "task_rename": _matched(_RENAME),
    "signal_generate": _matched(_SIGNAL),
    "sys_enter": _enter,
    "sys_exit": _matched(_RAW_EXIT),
    "block_unplug": _matched(_UNPLUG),
    "contention_begin": _contention,
    "contention_end": _contention,
}


def parse_arguments(event: str, text: str) -> dict[str, Any]:
    """The fields that an event's text holds, by kernel name."""
    parser = _PARSERS.get(event)
    if parser is None:
        parser = _block if event.startswith("block_") else _matched(_JBD2) if event.startswith("jbd2_") else _pairs
    return parser(text.strip())


def _syscall(event: str, separator: str, text: str) -> tuple[str, dict[str, Any]]:
    """`sys_read(fd: 3, ...)` and `sys_read -> 0x340`: how tracefs prints the events of single calls."""
    name = event.removeprefix("sys_")
    if separator == "(":
        return "sys_enter", {"name": name, "args": [v for _, v in _PAIR.findall(text.rstrip(")") + " ")]}
    return "sys_exit", {"name": name, "ret": text.strip()}


def _event(found: re.Match[str]) -> tuple[str, dict[str, Any]]:
    event = found["event"].rpartition(":")[2]  # `sched:sched_switch`
    if not found["sep"].startswith(":"):
        return _syscall(event, found["sep"], found["args"])
    for prefix, kind in (("sys_enter_", "sys_enter"), ("sys_exit_", "sys_exit")):
        if event.startswith(prefix):
            values = _pairs(found["args"] + " ")
            if kind == "sys_exit":
                return kind, {"name": event.removeprefix(prefix), "ret": values.get("ret", found["args"].strip())}
            return kind, {"name": event.removeprefix(prefix), "args": list(values.values())}
    return event, parse_arguments(event, found["args"])


def _time_ns(text: str, unit: str | None) -> int:
    whole, _, fraction = text.removesuffix("us").partition(".")
    if unit:
        return int(whole) * 1000
    if not fraction:
        return int(whole)  # a counter clock
    return int(whole) * 1_000_000_000 + int(fraction.ljust(9, "0")[:9])


def _irq_flags(column: str | None) -> int:
    """The third character of the flags column: h hard interrupt, s soft interrupt, H hard within soft."""
    if not column or len(column) < 3:
        return 0
    return {"h": FLAG_HARDIRQ, "s": FLAG_SOFTIRQ, "H": FLAG_HARDIRQ | FLAG_SOFTIRQ}.get(column[2], 0)


def _row(line: int, found: re.Match[str], node: str) -> Row:
    event, fields = _event(found)
    tgid = found["tgid"]
    return Row(
        line=line,
        node=node,
        cpu=int(found["cpu"]),
        time_ns=_time_ns(found["time"], found["unit"]),
        kind=event,
        fields=Fields(fields),
        tid=int(found["tid"]),
        tgid=int(tgid) if tgid and tgid.isdecimal() else None,
        comm=None if found["comm"] in ("<...>", "<idle>") else found["comm"],
        flags=_irq_flags(found["flags"]),
    )


def _why_not(text: str) -> str:
    if text.startswith("#") or re.match(r"^(cpus=\d+|version = |CPU \d+ is empty|\s*$)", text):
        return ""
    return "function trace" if "<-" in text else "buffer started" if text.startswith("##") else "not an event"


def read_text(lines: Iterable[bytes], report: Report, node: str) -> Iterator[Row]:
    """The rows of an ftrace text, in file order. `node` is the name of the machine, which the text does not give."""
    for number, raw in enumerate(lines, start=1):
        text = raw.decode(errors="replace").rstrip("\r\n")
        found = _LINE.match(text) or _LATENCY_LINE.match(text)
        if found:
            yield _row(number, found, node)
            continue
        lost = _LOST.match(text)
        if lost:
            yield Row(number, node, int(lost[1]), 0, "lost", Fields({}), lost_before=int(lost[2] or 0))
            continue
        reason = _why_not(text)
        if reason:
            report.skip(number, reason, text[:120])
