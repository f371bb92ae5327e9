"""Selectors: what they take, what they match, and what a wrong one is told."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from events.errors import InputError
from probe.cgroups import container_of
from probe.watch import Selector, descendants, glob_masks

CONTAINER = "4f" * 32


@pytest.mark.parametrize("text", ["all", "pid:23", "comm:settle*", "cgroup:/pay/core", f"container:{CONTAINER}", "port:5432"])
def test_a_selector_reads_back_as_it_was_written(text):
    assert str(Selector.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "pid:", "pid:x", "pid:0", "pid:99999999", "port:70000", "comm:", "user:me", "container:xyz"]
)
def test_a_wrong_selector_is_named(text):
    with pytest.raises(InputError, match=f"watch '{text}'"):
        Selector.parse(text)


def test_a_cgroup_selector_takes_groups_below_it_but_not_beside_it():
    selector = Selector.parse("cgroup:/pay")

    assert [p for p in ("/pay", "/pay/core", "/payroll", "/") if selector.matches_cgroup(p)] == ["/pay", "/pay/core"]


def test_a_container_selector_takes_a_short_id():
    path = f"/system.slice/docker-{CONTAINER}.scope"

    assert Selector.parse(f"container:{CONTAINER[:12]}").matches_cgroup(path)
    assert container_of(path) == CONTAINER
    assert not Selector.parse("container:" + "4e" * 6).matches_cgroup(path)


def masks_match(masks, comm):
    name = comm.encode()[:15].ljust(16, b"\0")
    words = [int.from_bytes(name[i : i + 8], "little") for i in (0, 8)]
    return all(w & masks[2 * i] == masks[2 * i + 1] for i, w in enumerate(words))


@given(st.text("ab-?*", max_size=8), st.text("ab-", min_size=1, max_size=15))
def test_the_kernel_sides_masks_match_what_the_pattern_matches(pattern, comm):
    masks = glob_masks(pattern)

    if masks is not None and "?" not in pattern:
        assert masks_match(masks, comm) == Selector("comm", pattern).matches_comm(comm)
    elif masks is not None and Selector("comm", pattern).matches_comm(comm):
        assert masks_match(masks, comm)


def test_descendants_are_found_at_any_depth():
    parents = {2: 1, 3: 2, 4: 3, 5: 1, 6: 6}

    assert descendants([2], parents) == {2, 3, 4}
    assert descendants([6, 9], parents) == {6, 9}
