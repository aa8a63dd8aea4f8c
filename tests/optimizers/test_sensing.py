"""The ensembles: moments, orthogonality, and the block view of packed signs."""

import numpy as np
import pytest

from trimtab.optimizers import sensing


@pytest.mark.parametrize("draw", [sensing.gaussian, sensing.rademacher])
def test_rows_are_white(draw):
    rng = np.random.RandomState(0)
    rows = np.stack([sensing.expand(draw(rng, 13), 13) for _ in range(4000)])
    np.testing.assert_allclose(rows.T @ rows / 4000, np.eye(13), atol=0.1)
    np.testing.assert_allclose(rows.mean(axis=0), 0, atol=0.08)


def test_rademacher_takes_one_bit_a_sign():
    row = sensing.rademacher(np.random.RandomState(0), 1001)
    assert row.nbytes == 126
    assert set(np.unique(sensing.expand(row, 1001))) == {-1.0, 1.0}


def test_orthogonal_rows():
    rows = sensing.orthogonal(np.random.RandomState(0), 7)
    np.testing.assert_allclose(rows @ rows.T, 7 * np.eye(7), atol=1e-12)


@pytest.mark.parametrize("draw", [sensing.gaussian, sensing.rademacher])
@pytest.mark.parametrize("n, d", [(3, 5), (200, 30_001), (1000, 9000)])
def test_blocks_make_up_the_matrix(draw, n, d):
    rng = np.random.RandomState(0)
    rows = np.stack([draw(rng, d) for _ in range(n)])
    out = np.full((n, d), np.nan)
    for part, block in sensing.blocks(rows, d):
        assert block.nbytes <= 1 << 25
        out[:, part] = block
    np.testing.assert_array_equal(out, sensing.expand(rows, d))
