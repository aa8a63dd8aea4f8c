"""Patches through the official Kubernetes client, against an API server of our own.

No cluster can be had here. The server keeps one Deployment, applies strategic-merge patches by the
API's merge keys, and refuses with 422 what the API's published schemas do not allow
(kubernetes-validate, strict: unknown fields are errors). No admission, quotas, controllers.
"""

import contextlib
import copy
import http.server
import json
import threading

import pytest
import yaml

pytest.importorskip("pydantic")
pytest.importorskip("kubernetes")
pytest.importorskip("kubernetes_validate")
import kubernetes.config
import kubernetes_validate as validate

from trimtab.optimizers.tune import cluster
from trimtab.optimizers.tune.commands import Failed
from trimtab.optimizers.tune.config import load
from trimtab.optimizers.tune.knobs import System
from trimtab.optimizers.tune.loop import Tuner

PATH = "/apis/apps/v1/namespaces/shop/deployments/web"
DEPLOYMENT = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "web", "namespace": "shop", "generation": 1},
    "spec": {
        "replicas": 4,
        "selector": {"matchLabels": {"app": "web"}},
        "template": {
            "metadata": {"labels": {"app": "web"}},
            "spec": {
                "containers": [
                    {
                        "name": "app",
                        "image": "web:1",
                        "env": [{"name": "LOG", "value": "info"}, {"name": "POOL", "value": "8"}],
                        "resources": {
                            "requests": {"cpu": "1", "memory": "512Mi"},
                            "limits": {"cpu": "1000m", "memory": "1Gi"},
                        },
                    },
                    {"name": "proxy", "image": "proxy:1"},
                ]
            },
        },
    },
    "status": {},
}
# As `patchMergeKey` says of these lists in the API's OpenAPI document.
MERGE_KEYS = {"containers": "name", "env": "name"}


def merged(old, patch, key=None):
    """The strategic merge of a patch into an object."""
    if isinstance(old, dict) and isinstance(patch, dict):
        out = dict(old)
        for name, part in patch.items():
            out[name] = merged(old.get(name), part, name)
        return out
    if isinstance(patch, list) and key in MERGE_KEYS and isinstance(old, list):
        by = MERGE_KEYS[key]
        known = {item[by]: item for item in old}
        for item in patch:
            known[item[by]] = merged(known.get(item[by], {}), item)
        return list(known.values())
    return patch


class Server(http.server.ThreadingHTTPServer):
    """One Deployment, and the patches that it was sent.

    Attributes:
        stored: the object.
        patches: query and body of each patch.
        refuse: the status that patches are answered with, if any.
        most_cores: a rollout whose pods ask for more does not end.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.stored = copy.deepcopy(DEPLOYMENT)
        self.patches, self.refuse, self.most_cores = [], None, 99.0
        self.settled()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def settled(self):
        n = self.stored["spec"]["replicas"]
        self.stored["status"] = {
            "observedGeneration": self.stored["metadata"]["generation"],
            "replicas": n, "updatedReplicas": n, "availableReplicas": n, "readyReplicas": n,
        }  # fmt: skip

    @property
    def containers(self):
        return {c["name"]: c for c in self.stored["spec"]["template"]["spec"]["containers"]}


def cores(server):
    limit = server.containers["app"]["resources"]["limits"]["cpu"]
    return int(limit.removesuffix("m")) / 1000


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # the client gave up
            self.wfile.write(body)

    def failure(self, status, message):
        self.answer(status, {"kind": "Status", "apiVersion": "v1", "message": message})

    def do_GET(self):
        if self.path != PATH:
            return self.failure(404, f"{self.path} not found")
        if cores(self.server) <= self.server.most_cores:
            self.server.settled()  # the controller has come round since the last look
        self.answer(200, self.server.stored)

    def do_PATCH(self):
        server = self.server
        path, _, query = self.path.partition("?")
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if server.refuse:
            return self.failure(server.refuse, "refused")
        if path != PATH:
            return self.failure(404, f"{path} not found")
        if self.headers["Content-Type"] != "application/strategic-merge-patch+json":
            return self.failure(415, f"{self.headers['Content-Type']} is not taken")
        new = merged(server.stored, body)
        try:
            validate.validate(new, "1.33", strict=True)
        except validate.ValidationError as e:
            return self.failure(422, e.message)
        server.patches.append((query, body))
        if "dryRun=All" not in query:
            new["metadata"]["generation"] += 1
            server.stored = new
        self.answer(200, new)


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_POLL", 0.01)
    running = Server()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [
            {"name": "here", "cluster": {"server": f"http://127.0.0.1:{running.server_port}"}}
        ],
        "users": [{"name": "me", "user": {"token": "x"}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
    }
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    # What KUBECONFIG says when the client is imported.
    for module in (kubernetes.config, kubernetes.config.kube_config):
        monkeypatch.setattr(module, "KUBE_CONFIG_DEFAULT_LOCATION", str(path))
    yield running
    running.shutdown()
    running.server_close()


def knob(label, type_, low, high, start, **field):
    target = {"kind": "Deployment", "namespace": "shop", "name": "web", **field}
    ends = {} if low is None else {"low": low, "high": high}
    return {"name": label, "type": type_, **ends, "start": start, "kubernetes": target}


KNOBS = [
    knob("replicas", "int", 1, 10, 4, field="replicas"),
    knob("cpu", "float", 0.1, 4, 1, field="cpu", container="app"),
    knob("memory", "int", 256, 4096, 512, field="memory", container="app", resource="requests"),
    knob("pool", "int", 1, 64, 8, field="env", container="app", variable="POOL"),
]


def configured(tmp_path, **changes):
    content = {
        "knobs": KNOBS,
        "cost": {"command": ["cat", str(tmp_path / "cost")]},
        "settle": 0,
        "window": 0,
        "evaluations": 20,
        **changes,
    }
    (tmp_path / "cost").write_text("10")
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(content))
    return load(tmp_path / "tune.yaml")


def lines(folder, kind):
    text = (folder / "tune.state.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]


def test_one_patch_sets_all_fields_of_an_object(tmp_path, server):
    changes = []
    system = System(configured(tmp_path), lambda **change: changes.append(change))
    point = {"replicas": 6, "cpu": 0.2504, "memory": 768, "pool": 12}
    system.apply(point, "measure")
    assert {c["knob"]: c["after"] for c in changes} == point == system.now
    assert len(server.patches) == 1
    app = server.containers["app"]
    assert server.stored["spec"]["replicas"] == 6
    assert app["resources"]["requests"] == {"cpu": "250m", "memory": "768Mi"}
    assert app["resources"]["limits"] == {"cpu": "250m", "memory": "1Gi"}
    assert app["env"] == [{"name": "LOG", "value": "info"}, {"name": "POOL", "value": "12"}]
    assert app["image"] == "web:1" and server.containers["proxy"] == {
        "name": "proxy",
        "image": "proxy:1",
    }


def test_run_patches_and_ends_at_the_last_good_point(tmp_path, server):
    config = configured(tmp_path)

    def observe(status):
        if status.phase == "measuring":
            cost = (server.stored["spec"]["replicas"] - 6) ** 2 + (cores(server) - 2) ** 2
            (tmp_path / "cost").write_text(str(cost))

    tuner = Tuner(config, None, observe)
    assert tuner.run() and tuner.status.outcomes["ok"] == 20
    good = tuner.status.good
    assert server.stored["spec"]["replicas"] == good["replicas"]
    assert cores(server) == round(good["cpu"], 3)
    env = {v["name"]: v["value"] for v in server.containers["app"]["env"]}
    assert env == {"LOG": "info", "POOL": str(good["pool"])}
    queries = [query for query, _ in server.patches]
    assert "dryRun=All" in queries[0] and not any("dryRun" in query for query in queries[1:])


def test_dry_run_sends_dry_runs_only(tmp_path, server):
    before = copy.deepcopy(server.stored["spec"])
    shown = Tuner(configured(tmp_path)).dry_run()
    assert any(line.strip().startswith("PATCH Deployment shop/web {") for line in shown)
    assert server.stored["spec"] == before
    assert [("dryRun=All" in query) for query, _ in server.patches] == [True]


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"start": 9}, r"knob 'x': start is 9, but variable POOL of Deployment shop/web is '8'"),
        ({"container": "ap"}, r"knob 'x': container is 'ap': expected one of \['app', 'proxy'\]"),
        ({"name": "wbe"}, "read Deployment shop/wbe: status 404"),
        ({"variable": "PULL"}, "variable PULL of Deployment shop/web is None: set start to what"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_is_changed(
    tmp_path, server, change, expected
):
    change = dict(change)
    start = change.pop("start", 8)
    field = {"field": "env", "container": "app", "variable": "POOL", **change}
    tuner = Tuner(configured(tmp_path, knobs=[knob("x", "int", 1, 64, start, **field)]))
    with pytest.raises(Failed, match=expected):
        tuner.run()
    assert not server.patches


@pytest.mark.parametrize("status", [403, 422])
def test_refused_patch_is_told_before_anything_is_changed(tmp_path, server, status):
    server.refuse = status
    with pytest.raises(Failed, match=f"patch Deployment shop/web: status {status}"):
        Tuner(configured(tmp_path)).run()


def test_unreachable_api_server(tmp_path, server):
    server.shutdown()
    server.server_close()
    with pytest.raises(Failed, match="read Deployment shop/web: the API server does not answer"):
        Tuner(configured(tmp_path)).run()


def test_rollout_that_does_not_end_is_a_failure_and_rolled_back(tmp_path, server):
    """Pods that ask for more than 1.05 cores find no node."""
    server.most_cores = 1.05
    tuner = Tuner(configured(tmp_path, timeout=10, evaluations=9))
    assert tuner.run()
    asked = [line["values"]["cpu"] > 1.05 for line in lines(tmp_path, "ask")]
    told = lines(tmp_path, "tell")
    assert any(asked) and [t["outcome"] == "failed" for t in told] == asked
    assert all("the rollout took more than timeout (10 s)" in t["why"] for t in told if t["why"])
    assert cores(server) <= 1.05


def test_body_that_the_api_does_not_know_is_refused_by_the_server(server):
    """The server of these tests can tell a wrong body."""
    wrong = merged(DEPLOYMENT, {"spec": {"replica": 3}})
    with pytest.raises(validate.ValidationError):
        validate.validate(wrong, "1.33", strict=True)
    wrong = merged(DEPLOYMENT, cluster.patch([]) | {"spec": {"replicas": "3"}})
    with pytest.raises(validate.ValidationError):
        validate.validate(wrong, "1.33", strict=True)
