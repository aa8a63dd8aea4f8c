import json
import re

import pytest

from tests.trainers.policies import PROMPTS, REWARDS, WEIGHTS, evaluated, policies, respond_with
from trimtab.trainers import Policy, evaluate, sweep, write_report


def test_a_plane_without_what_is_compared_against_is_reported(tmp_path):
    mixed = Policy("mixed", respond_with(1.0), weights=[{"red": 0.5, "blue": 0.5}])
    points = sweep([*policies()[:2], mixed], PROMPTS, WEIGHTS, REWARDS, tmp_path, seeds=2)
    result = evaluate(points, [("red",)], against=("mixed", mixed.strength), draws=20)
    write_report(result, tmp_path / "front")
    red, both = (tmp_path / "front.md").read_text().split("## Hypervolume: ")[1:3]
    assert "ahead by" not in red and "ahead by" in both


def test_reports_hold_every_point_and_need_no_network(tmp_path):
    result, _ = evaluated(tmp_path / "points")
    files = write_report(result, tmp_path / "out" / "front", intro="# Title\n\n")
    assert files[1].read_text().startswith("# Title\n\n6 prompts;")
    assert [file.name for file in files] == [f"front.{e}" for e in ("json", "md", "png", "html")]
    written = json.loads(files[0].read_text(), parse_constant=pytest.fail)  # no NaN
    assert len(written["points"]) == 10
    table = files[1].read_text().split("## Points")[1]
    assert len(re.findall(r"^\| (?:unguided|weak|strong) \|", table, re.M)) == 10
    assert "**no**" in files[1].read_text()
    assert files[2].read_bytes().startswith(b"\x89PNG")
    page = files[3].read_text()
    assert not re.search(r"https?://|src=|href=", page)
    data = re.search(r"const data = (.*);\n", page)[1].replace("<\\/", "</")
    assert len(json.loads(data)["points"]) == 10
