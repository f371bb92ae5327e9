"""Rules mean what they say: predicates, counting, effects, and errors that name the part and the remedy."""

import errno
import signal

import pytest

from events.errors import InputError
from replay.rules import Effects, Rule, RuleSet, Subject, parse_duration_ns, parse_rule, parse_set

FSYNC = Subject("fsync", "/var/lib/journal", thread=1, time_ns=1_500_000_000)


def test_the_nth_match_is_counted_over_the_calls_that_match_the_rest():
    rules = RuleSet([parse_rule("call=fsync path=/var/* nth=2 -> errno=EIO")])
    other = Subject("fsync", "/etc/x")

    answers = [rules.effects(s) for s in (FSYNC, other, FSYNC, other, FSYNC)]

    assert answers == [None, None, Effects(errno=errno.EIO), None, None]
    assert (rules.matched, rules.applied) == ([3], [1])


@pytest.mark.parametrize(
    ("text", "subject"),
    [
        ("call=fsync -> delay=+50ms", FSYNC),
        ("call=f*,write thread=1 -> result=0", FSYNC),
        ("path=/var/* from=1s to=2s -> hold=1ms", FSYNC),
        ("payload=/35=8\\x01/ -> corrupt=3", Subject("recvfrom", "tcp:10.0.0.7:9", payload=b"8=FIX\x0135=8\x01")),
        ("peer=tcp:10.0.0.7:* -> short=2", Subject("recvfrom", "tcp:10.0.0.7:9")),
        ("task=batch-* -> remove", Subject("sched_switch", task="batch-recon")),
    ],
)
def test_a_predicate_meets_what_it_describes(text, subject):
    assert parse_rule(text).matches(subject)


@pytest.mark.parametrize(
    "text",
    ["call=write -> errno=5", "call=fsync thread=2 -> errno=5", "call=fsync to=1s -> errno=5", "payload=/x/ -> errno=5"],
)
def test_a_predicate_misses_everything_else(text):
    assert not parse_rule(text).matches(FSYNC)


@pytest.mark.parametrize(
    ("effect", "expected"),
    [
        ("errno=ENOSPC", Effects(errno=errno.ENOSPC)),
        ("errno=5", Effects(errno=5)),
        ("result=-1", Effects(result=-1)),
        ("delay=-21ms", Effects(delay_ns=-21_000_000)),
        ("duration=1.5s", Effects(duration_ns=1_500_000_000)),
        ("clock=+1h", Effects(clock_ns=3_600_000_000_000)),
        ("signal=TERM", Effects(signal=signal.SIGTERM)),
        ("hold=5us short=7", Effects(hold_ns=5_000, short=7)),
    ],
)
def test_each_effect_is_read(effect, expected):
    assert parse_rule(f"call=read -> {effect}").effects == expected


def test_several_rules_on_one_call_add_their_delays_and_the_first_errno_wins():
    rules = RuleSet(map(parse_rule, ["call=fsync -> delay=1ms errno=EIO", "call=fsync -> delay=2ms errno=ENOSPC"]))

    assert rules.effects(FSYNC) == Effects(delay_ns=3_000_000, errno=errno.EIO)


def test_the_three_forms_of_a_rule_are_one_rule():
    text = parse_rule("call=fsync path=/var/* nth=2 -> errno=EIO")

    assert text == parse_set("fsync@/var/*#2.errno=EIO")
    assert text == Rule.of({"when": {"call": "fsync", "path": "/var/*", "nth": 2}, "do": {"errno": "EIO"}})


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("call=fsync", "->"),
        ("call=fsync -> ", "no effect"),
        ("size=3 -> errno=EIO", "size"),
        ("call=fsync -> errno=EWHAT", "EWHAT"),
        ("call=fsync -> delay=soon", "soon"),
        ("call=fsync nth=0 -> errno=EIO", "nth"),
        ("call=fsync nth=5-2 -> errno=EIO", "nth"),
        ("payload=/(/ -> errno=EIO", "regular expression"),
        ("call=read -> short=-1", "negative"),
        ("call=read -> burn=1", "burn"),
    ],
)
def test_a_wrong_rule_is_refused_with_its_part(text, part):
    with pytest.raises(InputError, match=part.replace("(", "\\(")):
        parse_rule(text)


@pytest.mark.parametrize(("text", "ns"), [("12", 12), ("+0.000000001s", 1), ("2m", 120_000_000_000), ("-1.25ms", -1_250_000)])
def test_durations_are_exact(text, ns):
    assert parse_duration_ns(text, "test") == ns
