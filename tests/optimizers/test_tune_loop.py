"""The loop against a system of files: what is left behind by breaches, failures, kills and ends.

Knobs are files that a command writes, the cost is a command that reads them. Where something must
happen at a certain moment, the loop's own report of its phase is the clock: nothing here sleeps.
"""

import json
import math
import signal
import subprocess
import sys
import time

import pytest
import yaml

pytest.importorskip("pydantic")
from trimtab.optimizers.tune.commands import Failed, Stop
from trimtab.optimizers.tune.config import ConfigError, load
from trimtab.optimizers.tune.loop import Tuner

SET = ["sh", "-c", 'echo "$1" > "$2"', "-", "{value}", "{name}"]
START = {"a": 8, "b": 0.9, "c": True, "d": "z"}
KNOBS = [
    {"name": "a", "type": "int", "low": 1, "high": 64, "scale": "log", "start": 8, "command": SET},
    {"name": "b", "type": "float", "low": 0, "high": 1, "start": 0.9, "command": SET},
    {"name": "c", "type": "bool", "start": True, "command": SET},
    {"name": "d", "type": "choice", "choices": ["x", "y", "z"], "start": "z", "command": SET},
]
BARE = {k: v for k, v in KNOBS[0].items() if k != "command"}
PRINT = "test ! -e down && cat a b c d | xargs | "
COST = PRINT + (
    """awk '{x=log($1/32); y=$2-0.3; print 10+x*x+10*y*y+($3=="true")*0.5+($4!="y")}'"""
)


def true_cost(point):
    """What the command prints, computed apart."""
    return (
        10
        + math.log(point["a"] / 32) ** 2
        + 10 * (point["b"] - 0.3) ** 2
        + 0.5 * point["c"]
        + (point["d"] != "y")
    )


def reset(folder):
    for name, value in START.items():
        (folder / name).write_text((value if isinstance(value, str) else json.dumps(value)) + "\n")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reset(tmp_path)
    return tmp_path


def configured(folder, **changes):
    content = {
        "knobs": KNOBS,
        "cost": {"command": ["sh", "-c", COST]},
        "settle": 0,
        "window": 0,
        "evaluations": 40,
        **changes,
    }
    path = folder / "tune.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def applied(folder):
    text = {name: (folder / name).read_text().strip() for name in START}
    return {**{n: json.loads(text[n]) for n in "abc"}, "d": text["d"]}


def lines(folder, name, **filters):
    path = folder / f"tune.{name}.jsonl"
    whole = path.read_text().split("\n")[:-1] if path.exists() else []
    found = [json.loads(line) for line in whole]
    return [x for x in found if all(x.get(k) == v for k, v in filters.items())]


def run(folder, observe=lambda status: None, stop=None, **changes):
    tuner = Tuner(load(configured(folder, **changes)), stop, observe)
    assert tuner.run()
    return tuner


def asked_and_told(folder):
    told = lines(folder, "state", kind="tell")
    asked = {a["number"]: a["values"] for a in lines(folder, "state", kind="ask")}
    return [(asked[t["number"]], t["outcome"], t["cost"], t["good"]) for t in told]


def command(folder):
    return [sys.executable, "-m", "trimtab.optimizers.tune", str(folder / "tune.yaml")]


def until(true, process=None, seconds=300):
    """Polls; a busy machine only takes longer."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "nothing happened"
        assert process is None or process.poll() is None, "the tuner ended too early"
        time.sleep(0.01)


def test_run_ends_at_a_better_point_that_was_measured(folder):
    tuner = run(folder, evaluations=100)
    point = applied(folder)
    assert point == tuner.status.good == lines(folder, "state", kind="tell")[-1]["good"]
    assert true_cost(point) < true_cost(START) - 2
    history = asked_and_told(folder)
    assert history[0][0] == START
    assert len(history) == 100 and tuner.status.outcomes == {"ok": 100, "failed": 0, "breach": 0}
    for values, _, cost, good in history:
        assert cost == pytest.approx(true_cost(values), rel=1e-4)
        assert good in [START, *(v for v, _, _, _ in history)]


def test_audit_log_replays_to_what_is_applied(folder):
    run(folder)
    state = dict(START)
    for change in lines(folder, "audit"):
        if change["reason"] != "start":
            assert change["before"] == state[change["knob"]] != change["after"]
        state[change["knob"]] = change["after"]
    assert state == applied(folder)


def test_dry_run_changes_nothing_and_shows_the_first_round(folder):
    path = configured(folder, limits={"slo": {"command": ["cat", "b"], "bound": 0.95}})
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}
    shown = Tuner(load(path)).dry_run()
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()} == before
    assert shown[:2] == [f"cost now: {true_cost(START):g}", "slo now: 0.9"]
    text = "\n".join(shown)
    run(folder, limits={"slo": {"command": ["cat", "b"], "bound": 0.95}}, evaluations=20)
    for ask in lines(folder, "state", kind="ask")[:3]:
        assert f"- {ask['values']['b']} b" in text


def test_points_stay_within_max_change_of_the_recommendation(folder):
    seen = []

    def observe(status):
        if status.phase == "measuring":
            seen.append((dict(status.now), dict(tuner._optimizer.recommend().value)))

    tuner = Tuner(
        load(configured(folder, evaluations=80, limits={"max_change": 0.05})), None, observe
    )
    assert tuner.run()
    assert len(seen) >= 80
    for point, center in seen:
        assert abs(point["b"] - center["b"]) <= 0.05 + 1e-5
        levels = abs(point["a"] - center["a"])
        assert levels <= 1 or abs(math.log(point["a"] / center["a"])) <= 0.05 * math.log(64) + 1e-5
    assert true_cost(applied(folder)) < true_cost(START)


# -- limits ------------------------------------------------------------------------------------

# The optimum, b = 0.3, is forbidden.
SLO = {"command": ["sh", "-c", "awk '{print 1 - $1}' b"], "bound": 0.5}


@pytest.mark.parametrize("every", [None, 0.02])
def test_breach_rolls_back_and_is_never_the_last_good_point(folder, every):
    slo = SLO if every is None else {**SLO, "every": every}
    window = 0 if every is None else 0.05
    tuner = run(folder, limits={"slo": slo}, window=window, evaluations=90)
    told = lines(folder, "state", kind="tell")
    breaches = [t for t in told if t["outcome"] == "breach"]
    assert breaches and tuner.status.rollbacks == len(breaches)
    assert all(t["good"]["b"] >= 0.5 for t in told) and applied(folder)["b"] >= 0.5
    assert all((t["cost"] is None) == (every is not None) for t in breaches)
    asks = {a["number"]: a["values"] for a in lines(folder, "state", kind="ask")}
    assert all(asks[t["number"]]["b"] < 0.5 for t in breaches)
    assert all(asks[t["number"]]["b"] >= 0.5 for t in told if t["outcome"] == "ok")
    assert true_cost(applied(folder)) < true_cost(START)
    # After the changes of a breach come those that undo them, before any other measurement.
    audit = lines(folder, "audit")
    for i, change in enumerate(audit):
        if change["reason"] == "measure" and change["knob"] == "b" and change["after"] < 0.5:
            following = [c["reason"] for c in audit[i + 1 :]]
            assert next(r for r in following if r != "measure") in ("breach", "exit")
            undone = next(c for c in audit[i + 1 :] if c["knob"] == "b")
            assert undone["after"] >= 0.5 and undone["reason"] in ("breach", "exit")


def test_start_that_breaches_is_refused_before_anything_is_changed(folder):
    path = configured(folder, limits={"slo": {**SLO, "bound": 0.05}})
    with pytest.raises(Failed, match=r"limits\.slo\.bound is 0\.05, and the system is at 0\.1"):
        Tuner(load(path)).run()
    assert applied(folder) == START and not lines(folder, "audit")


def test_max_regression_in_percent_is_of_the_first_cost(folder):
    tuner = run(folder, limits={"max_regression": "20%"}, evaluations=20)
    assert tuner._optimizer._config.max_regression == pytest.approx(
        0.2 * true_cost(START), rel=1e-4
    )


# -- failures ----------------------------------------------------------------------------------


def test_failed_measurement_is_told_as_failed_and_rolled_back(folder):
    # No number is printed where d is "x".
    cost = 'test "$(cat d)" = x && echo oops || { ' + COST + "; }"
    tuner = run(folder, cost={"command": ["sh", "-c", cost]}, evaluations=30)
    told = lines(folder, "state", kind="tell")
    failed = [t for t in told if t["outcome"] == "failed"]
    assert failed and tuner.status.outcomes["failed"] == len(failed)
    assert all("'oops' is not a finite number" in t["why"] and t["cost"] is None for t in failed)
    assert all(t["good"]["d"] != "x" for t in told) and applied(folder)["d"] != "x"
    assert true_cost(applied(folder)) < true_cost(START)


def test_knob_that_cannot_be_applied_is_rolled_back(folder):
    refuses = [
        "sh",
        "-c",
        'test "$1" != x && echo "$1" > d || { echo no x >&2; exit 3; }',
        "-",
        "{value}",
    ]
    knobs = [*KNOBS[:3], {**KNOBS[3], "command": refuses}]
    run(folder, knobs=knobs, evaluations=30)
    failed = lines(folder, "state", kind="tell", outcome="failed")
    assert failed
    assert all(
        "d cannot be applied" in t["why"] and "exited with 3: no x" in t["why"] for t in failed
    )
    assert applied(folder) == failed[-1]["good"] or applied(folder)["d"] != "x"
    assert [c for c in lines(folder, "audit") if "no x" in c.get("error", "")]


def test_outage_is_waited_out_at_the_last_good_point(folder):
    down, seen = folder / "down", []

    def observe(status):
        if status.evaluations == 12 and status.phase == "measuring" and not seen:
            down.touch()
        if status.outage and status.phase.startswith("waiting"):
            seen.append((applied(folder), dict(status.good)))
            if len(seen) == 2:
                down.unlink()

    tuner = run(folder, observe)
    assert len(seen) == 2 and all(point == good for point, good in seen)
    # Nobody is blamed for it: the same points and costs as without.
    assert tuner.status.outcomes == {"ok": 40, "failed": 0, "breach": 0}
    interrupted = asked_and_told(folder)
    for name in ("tune.state.jsonl", "tune.audit.jsonl"):
        (folder / name).unlink()
    reset(folder)
    run(folder)
    assert asked_and_told(folder) == interrupted


def test_restoring_goes_on_until_it_succeeds(folder, caplog):
    """A breach while the way to the knobs is cut: it is tried again until it works."""
    blocked = folder / "blocked"
    guarded = ["sh", "-c", 'test ! -e blocked && echo "$1" > "$2"', "-", "{value}", "{name}"]
    cost = "test ! -e blocked && " + COST

    def observe(status):
        moved = status.phase == "measuring" and status.now != status.good
        if status.evaluations >= 5 and moved and not caplog.records:
            blocked.touch()
        if any("cannot restore" in r.message for r in caplog.records):
            blocked.unlink(missing_ok=True)

    class Unblock(Stop):
        def wait(self, seconds):
            observe(tuner.status)
            super().wait(min(seconds, 0.01))

    knobs = [{**knob, "command": guarded} for knob in KNOBS]
    path = configured(folder, knobs=knobs, cost={"command": ["sh", "-c", cost]})
    tuner = Tuner(load(path), Unblock(), observe)
    assert tuner.run()
    assert any("cannot restore" in r.message for r in caplog.records)
    assert applied(folder) == tuner.status.good and tuner.status.evaluations == 40


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"cost": {"command": ["no-such"]}}, "cost: command 'no-such' cannot start: No such file"),
        ({"cost": {"command": ["echo", "x"]}}, "cost: echo x: 'x' is not a finite number"),
        ({"cost": {"command": ["echo", "nan"]}}, "cost: echo nan: 'nan' is not a finite number"),
        ({"cost": {"command": ["false"]}}, "cost: command 'false' exited with 1"),
        (
            {"cost": {"command": ["sleep", "60"]}, "timeout": 0.2},
            r"command 'sleep 60' took more than timeout \(0.2 s\)",
        ),
        ({"limits": {"slo": {"command": ["true"], "bound": 1}}}, "limits.slo: true: '' is not"),
        ({"knobs": [{**KNOBS[0], "command": ["no", "{value}"]}]}, "knob 'a': command 'no' is not"),
        ({"after": {"command": ["no-such"]}}, "after: command 'no-such' is not found"),
        (
            {"knobs": [{**BARE, "http": {"method": "PUT", "url": "http://127.0.0.1:1/{value}"}}]},
            "knob 'a': url is 'http://127.0.0.1:1/{value}': nobody answers",
        ),
        (
            {"knobs": [{**BARE, "http": {"method": "PUT", "url": "http://127.0.0.1:{value}"}}]},
            "knob 'a': url is 'http://127.0.0.1:{value}': nobody answers",
        ),
        (
            {"cost": {"promql": "up"}, "prometheus": {"url": "http://127.0.0.1:1"}},
            "cost: prometheus.url http://127.0.0.1:1: ConnectError",
        ),
        ({"evaluations": 3}, "evaluations is 3, and one round takes 9"),
        (
            {"knobs": [{**KNOBS[0], "command": ["false", "{value}"]}]},
            "a cannot be applied: command 'false 8' exited with 1",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_changed(folder, changes, expected):
    path = configured(folder, **changes)
    with pytest.raises(Failed, match=expected):
        Tuner(load(path)).run()
    assert applied(folder) == START
    assert not lines(folder, "state")


def test_state_of_a_running_tuner_is_refused(folder):
    path = configured(folder)

    def observe(status):
        if status.phase == "measuring" and status.evaluations == 3:
            with pytest.raises(ConfigError, match="another tuner uses it"):
                Tuner(load(path)).run()
            refused.append(True)

    refused = []
    assert Tuner(load(path), None, observe).run() and refused


@pytest.mark.parametrize(
    "content, expected",
    [
        ("knobs: []\n", "line 1 is no JSON object: move the file away"),
        ("7\n", "line 1 is no JSON object"),
        ('{"a": 7}\n', "holds no run of a tuner: name another file"),
    ],
)
def test_state_that_is_no_state_is_refused(folder, content, expected):
    (folder / "tune.state.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=expected):
        run(folder)
    assert applied(folder) == START


# -- going on ----------------------------------------------------------------------------------


def reference(folder, tmp_path_factory, monkeypatch, **changes):
    """What an uninterrupted run asks and is told."""
    apart = tmp_path_factory.mktemp("apart")
    monkeypatch.chdir(apart)
    reset(apart)
    run(apart, **changes)
    monkeypatch.chdir(folder)
    return asked_and_told(apart)


def test_second_run_goes_on_as_if_there_had_been_no_end(folder, tmp_path_factory, monkeypatch):
    limits = {"max_change": 0.2, "slo": SLO}
    whole = reference(folder, tmp_path_factory, monkeypatch, evaluations=50, limits=limits)
    for evaluations in (17, 30, 50):
        run(folder, evaluations=evaluations, limits=limits)
    assert len(lines(folder, "state", kind="begin")) == 1
    assert asked_and_told(folder) == whole


def test_torn_last_line_is_dropped(folder, tmp_path_factory, monkeypatch):
    whole = reference(folder, tmp_path_factory, monkeypatch)
    run(folder, evaluations=20)
    path = folder / "tune.state.jsonl"
    path.write_bytes(path.read_bytes()[:-7])  # the 20th answer, half written
    run(folder)
    assert asked_and_told(folder) == whole


def test_kill_at_any_moment_goes_on_with_knobs_restored_first(
    folder, tmp_path_factory, monkeypatch
):
    whole = reference(folder, tmp_path_factory, monkeypatch)
    configured(folder, cost={"command": ["sh", "-c", "sleep 0.05; " + COST]})
    process = subprocess.Popen(command(folder))
    for evaluations, moment in ((1, 0.0), (9, 0.03), (10, 0.011), (22, 0.07)):
        until(lambda n=evaluations: len(lines(folder, "state", kind="tell")) >= n, process)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
        before, good = len(lines(folder, "audit")), lines(folder, "state", kind="tell")[-1]["good"]
        process = subprocess.Popen(command(folder))
        until(lambda n=before: len(lines(folder, "audit")) >= n + len(START), process)
        first = lines(folder, "audit")[before : before + len(START)]
        assert {c["reason"] for c in first} == {"resume"}
        assert {c["knob"]: c["after"] for c in first} == good
    assert process.wait() == 0
    told = lines(folder, "state", kind="tell")
    assert applied(folder) == told[-1]["good"]
    # No kill left a trace in what was asked and told.
    assert len(lines(folder, "state", kind="begin")) == 1
    assert [t["number"] for t in told] == list(range(1, 41))
    assert asked_and_told(folder) == whole


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signal_restores_the_last_good_point_and_ends(folder, name):
    """Told in the middle of a measurement that would take ten minutes."""
    hangs = 'test "$(cat b d | xargs)" = "0.9 z" || sleep 600; ' + COST
    configured(folder, cost={"command": ["sh", "-c", hangs]}, timeout=1000)
    process = subprocess.Popen(command(folder), stderr=subprocess.PIPE, text=True)
    until(
        lambda: {"b", "d"} & {c["knob"] for c in lines(folder, "audit", reason="measure")}, process
    )
    process.send_signal(getattr(signal, name))
    _, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
    assert applied(folder) == START
    assert [c["reason"] for c in lines(folder, "audit")][-1] == "exit" and "told to stop" in log


def test_another_answer_of_the_optimizer_begins_afresh_from_the_last_good_point(folder, caplog):
    """As another version of numpy may give: the log's asks are no longer what is asked."""
    run(folder, evaluations=30)
    path = folder / "tune.state.jsonl"
    content = path.read_text().splitlines()
    ask = json.loads(content[15])
    assert ask["kind"] == "ask"
    ask["values"]["b"] += 1e-5
    content[15] = json.dumps(ask)
    path.write_text("\n".join(content) + "\n")
    good = lines(folder, "state", kind="tell")[-1]["good"]
    tuner = run(folder, evaluations=20)
    assert "the replay asks for another point after 7: beginning afresh" in caplog.text
    begins = lines(folder, "state", kind="begin")
    assert len(begins) == 2 and begins[1]["start"] == good
    assert tuner.status.evaluations == 20
    assert true_cost(applied(folder)) <= true_cost(good)


def test_other_knobs_begin_afresh_from_the_last_good_point(folder, caplog):
    run(folder, evaluations=30)
    good = lines(folder, "state", kind="tell")[-1]["good"]
    narrow = [{**KNOBS[0], "high": 8}, {**KNOBS[1], "high": 0.95}, KNOBS[3]]
    run(folder, evaluations=20, knobs=narrow)
    assert "knobs, cost, limits or options differ" in caplog.text
    assert "knobs ['c'] are no longer configured" in caplog.text
    begin = lines(folder, "state", kind="begin")[1]
    assert begin["start"] == {"a": min(good["a"], 8), "b": min(good["b"], 0.95), "d": good["d"]}
    assert applied(folder)["a"] <= 8


# -- the command -------------------------------------------------------------------------------


def test_command_prints_the_fault_and_exits_with_2(folder):
    configured(folder, settle=-1)
    ended = subprocess.run(command(folder), capture_output=True, text=True)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert f"error: {folder}/tune.yaml: settle is -1: expected greater than" in ended.stderr


def test_dry_run_of_the_command_changes_nothing(folder):
    configured(folder)
    ended = subprocess.run([*command(folder), "--dry-run"], capture_output=True, text=True)
    assert ended.returncode == 0 and "point 9 of the first round:" in ended.stdout
    assert applied(folder) == START
    assert {p.name for p in folder.iterdir()} == {*START, "tune.yaml"}
