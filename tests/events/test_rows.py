"""Rows become the same batch as pyarrow's own conversion makes, without pandas behind it."""

import subprocess
import sys

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from events.records import LOSSES, TASKS, rows_to_arrow


def _values(kind):
    if pa.types.is_boolean(kind):
        return st.booleans()
    if pa.types.is_string(kind) or pa.types.is_dictionary(kind):
        return st.text(st.characters(codec="utf-8"), max_size=20)
    bits = kind.bit_width
    signed = pa.types.is_signed_integer(kind)
    return st.integers(-(1 << bits - 1) if signed else 0, (1 << bits - signed) - 1)


def _rows(schema):
    return st.lists(st.fixed_dictionaries({}, optional={f.name: st.none() | _values(f.type) for f in schema}), max_size=20)


@pytest.mark.parametrize("schema", [TASKS, LOSSES], ids=["tasks", "losses"])
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_rows_come_back_as_they_went_in(schema, data):
    rows = data.draw(_rows(schema))

    batch = rows_to_arrow(rows, schema)

    batch.validate(full=True)
    assert batch.schema.equals(schema)
    assert batch.to_pylist() == [{f.name: row.get(f.name) for f in schema} for row in rows]


def test_a_value_that_does_not_fit_is_an_error():
    with pytest.raises(pa.ArrowInvalid, match="uint32 cannot hold one of"):
        rows_to_arrow([{"tid": -1}], TASKS)


def test_the_way_of_a_recording_does_not_import_pandas():
    """It would stall the first drain for half a second and cost the probe 60 MB."""
    code = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "pandas":
            raise SystemExit("pandas was imported")
sys.meta_path.insert(0, Finder())
import numpy as np
from events.frames import Frame, Watermark, empty_events
from probe.framing import Framer, loss_row
make = Framer(node="n", boot_id="b", recording="r")
frames = [*make.tasks([{"tid": 1}]), *make.losses([loss_row("shed", "probe", from_mono_ns=1, to_mono_ns=2)])]
frames += make.events({n: np.ones(23, c.dtype) for n, c in empty_events().items()}, Watermark(1), 100)
for sealed in frames:
    Frame.decode(sealed.data).batch.to_pylist()
assert Frame.decode(frames[-1].data).events()["cpu"].tolist() == [1] * 23
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
