import math

import numpy as np
import pytest

from trimtab.trainers.statistics import interval, prompt_draws


def test_bootstrap_intervals_cover_the_mean_as_often_as_they_say():
    rng = np.random.default_rng(0)
    order = prompt_draws(40, 400)
    covered, widths = 0, []
    for _ in range(300):
        sample = rng.normal(2.0, 1.5, 40)
        found = interval(sample[order].mean(1))
        assert found["value"] == pytest.approx(sample.mean())
        covered += found["low"] <= 2.0 <= found["high"]
        widths.append(found["high"] - found["low"])
    assert 0.88 < covered / 300 < 0.98  # 0.95 less what 40 prompts cost; 300 trials, sd 0.013
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 1.5 / math.sqrt(40), rel=0.06)
