"""The catalogue of kinds: numbers and bits never collide, and encoding is the inverse of decoding."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from events.kinds import BY_NAME, BY_NUMBER, KINDS, c_header


def test_numbers_and_names_are_unique():
    assert len(BY_NUMBER) == len(BY_NAME) == len(KINDS)
    assert all(0 < kind.number < 256 for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_no_two_fields_of_a_kind_share_a_bit(kind):
    taken = [0] * 5
    for f in kind.fields.values():
        mask = ((1 << f.bits) - 1) << f.shift
        assert mask < 1 << 64, f"{f.name} runs out of its argument"
        assert taken[f.arg] & mask == 0, f"{f.name} overlaps another field"
        taken[f.arg] |= mask


@given(st.data())
def test_decode_and_get_return_what_encode_was_given(data):
    kind = data.draw(st.sampled_from([k for k in KINDS if k.fields]))
    values = {
        f.name: data.draw(
            st.integers(-(1 << f.bits - 1), (1 << f.bits - 1) - 1) if f.signed else st.integers(0, (1 << f.bits) - 1)
        )
        for f in kind.fields.values()
    }

    args = kind.encode(**values)
    columns = {f"a{i}": np.array([a], np.uint64) for i, a in enumerate(args)}

    assert kind.decode(args) == values
    assert {name: int(kind.get(columns, name)[0]) for name in kind.fields} == values


def test_the_c_side_gets_every_number_and_every_field():
    text = c_header()

    assert "#define KIND_SCHED_SWITCH 1\n" in text
    assert "#define SCHED_SWITCH__PREV_STATE_SHIFT 0\n" in text
    assert text.count("#define KIND_") == len(KINDS)
    assert text.count("_MASK ") == sum(len(k.fields) for k in KINDS)
