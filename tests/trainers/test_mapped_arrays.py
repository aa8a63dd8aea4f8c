import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from trimtab.trainers import mapped_arrays
from trimtab.trainers.mapped_arrays import MappedArrays

ARRAYS = st.lists(
    npst.arrays(
        st.sampled_from([np.bool_, np.int64, np.float32]),
        npst.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=9),
    ),
    max_size=30,
)


@given(arrays=ARRAYS, chunk=st.sampled_from([1, 16]))
def test_arrays_are_kept_as_they_are(tmp_path_factory, arrays, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapped_arrays, "CHUNK", chunk * mapped_arrays.mmap.ALLOCATIONGRANULARITY)
        keep = MappedArrays(tmp_path_factory.getbasetemp()).keep
        kept = [keep(array) for array in arrays]
    for array, copy in zip(arrays, kept):
        assert copy.dtype == array.dtype and copy.flags.aligned
        np.testing.assert_array_equal(copy, array)


def test_an_array_larger_than_a_mapping_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped_arrays, "CHUNK", mapped_arrays.mmap.ALLOCATIONGRANULARITY)
    keep = MappedArrays(tmp_path).keep
    array = np.arange(3 * mapped_arrays.CHUNK, dtype=np.float64)
    small, copy = keep(array[:3]), keep(array)
    np.testing.assert_array_equal(copy, array)
    np.testing.assert_array_equal(small, array[:3])


def test_kept_arrays_are_the_owners_and_not_in_memory_of_the_process(tmp_path):
    def anonymous():
        with open("/proc/self/status") as status:
            return 1024 * int(status.read().split("RssAnon:")[1].split()[0])

    keep = MappedArrays(tmp_path).keep
    part = np.ones(1 << 20)  # 8 MiB
    before = anonymous()
    kept = [keep(part) for _ in range(64)]
    assert anonymous() - before < 1 << 27  # of 512 MiB
    kept[3][0] = 5.0  # arrays may be changed
    assert kept[3][0] == 5.0 and kept[4][0] == part[0] == 1.0


def test_nothing_is_left_behind(tmp_path):
    keep = MappedArrays(tmp_path / "new").keep
    kept = keep(np.ones(5))
    assert os.listdir(tmp_path / "new") == []
    del keep
    assert kept.sum() == 5  # an array outlives what made it


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_a_full_disk_is_an_error_and_no_crash(tmp_path, monkeypatch):
    with open("/dev/full", "r+b", buffering=0) as full:
        monkeypatch.setattr(mapped_arrays.tempfile, "TemporaryFile", lambda dir: full)
        with pytest.raises(OSError, match="No space left"):
            MappedArrays(tmp_path).keep(np.ones(5))
