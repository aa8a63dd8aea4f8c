"""Knobs that are fields of Kubernetes objects, through the official client.

All knobs of one object change by one strategic-merge patch, hence in one rollout, which is waited
for. Checks use the server's own dry run: it validates and authorises, and changes nothing.
"""

from __future__ import annotations

import time
import typing as tp

from .commands import Failed, text
from .config import Kubernetes, Value

# Seconds between looks at a rollout.
_POLL = 1.0

Object = tuple[str, str, str]  # kind, namespace, name


def target(knob: Kubernetes) -> Object:
    return knob.kind, knob.namespace, knob.name


def quantity(knob: Kubernetes, value: Value) -> tp.Any:
    """A knob's value as Kubernetes writes it: ``3``, ``"250m"``, ``"512Mi"``, ``"debug"``."""
    if knob.field == "replicas":
        return value
    if knob.field == "cpu":
        return f"{round(float(value) * 1000)}m"
    if knob.field == "memory":
        return f"{round(float(value))}Mi"
    return text(value)


def patch(knobs: tp.Sequence[tuple[Kubernetes, Value]]) -> dict[str, tp.Any]:
    """The strategic-merge patch that sets fields of one object."""
    spec: dict[str, tp.Any] = {}
    containers: dict[str, dict[str, tp.Any]] = {}
    for knob, value in knobs:
        written = quantity(knob, value)
        if knob.container is None:
            spec["replicas"] = written
            continue
        container = containers.setdefault(knob.container, {"name": knob.container})
        if knob.field == "env":
            container.setdefault("env", []).append({"name": knob.variable, "value": written})
            continue
        resources = container.setdefault("resources", {})
        for part in [knob.resource] if knob.resource else ["requests", "limits"]:
            resources.setdefault(part, {})[knob.field] = written
    if containers:
        spec["template"] = {"spec": {"containers": list(containers.values())}}
    return {"spec": spec}


class Cluster:
    """The API server that ``KUBECONFIG``, ``~/.kube/config`` or the pod's service account names."""

    def __init__(self, timeout: float) -> None:
        try:
            import kubernetes
        except ImportError:
            raise Failed(
                "a kubernetes knob needs the kubernetes client: pip install 'trimtab[tune]'"
            ) from None
        self._timeout = timeout
        settings = kubernetes.client.Configuration()
        try:
            kubernetes.config.load_config(client_configuration=settings)
        except kubernetes.config.ConfigException as e:
            raise Failed(f"no Kubernetes configuration: {e}: set KUBECONFIG") from None
        settings.retries = False
        self._api = kubernetes.client.AppsV1Api(kubernetes.client.ApiClient(settings))

    def _call(self, verb: str, item: Object, **kwargs: tp.Any) -> tp.Any:
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        kind, namespace, name = item
        method = {"Deployment": "deployment", "StatefulSet": "stateful_set"}[kind]
        shown = f"{kind} {namespace}/{name}"
        try:
            return getattr(self._api, f"{verb}_namespaced_{method}")(
                name, namespace, _request_timeout=self._timeout, **kwargs
            )
        except ApiException as e:
            raise Failed(f"{verb} {shown}: status {e.status} {e.reason}: {e.body!s:.300}") from None
        except HTTPError as e:
            raise Failed(f"{verb} {shown}: the API server does not answer: {e}") from None

    def check(self, item: Object, knobs: tp.Sequence[tuple[str, Kubernetes, Value]]) -> None:
        """Compares start values with the object and sends the patch as a dry run.

        Raises:
            Failed: the object, a container or a permission is missing, or a value is another.
        """
        found = self._call("read", item)
        containers = {c.name: c for c in found.spec.template.spec.containers}
        for name, knob, start in knobs:
            if knob.container is not None and knob.container not in containers:
                raise Failed(
                    f"knob {name!r}: container is {knob.container!r}: expected one of "
                    f"{sorted(containers)} of {knob.kind} {knob.namespace}/{knob.name}"
                )
            for where, live in _live(found, containers, knob):
                if live is None or not _same(knob, live, start):
                    raise Failed(
                        f"knob {name!r}: start is {start!r}, but {where} of {knob.kind} "
                        f"{knob.namespace}/{knob.name} is {live!r}: set start to what runs"
                    )
        self.apply(item, [(knob, start) for _, knob, start in knobs], dry_run=True)

    def apply(
        self, item: Object, knobs: tp.Sequence[tuple[Kubernetes, Value]], dry_run: bool = False
    ) -> None:
        """Patches one object and waits until the change runs everywhere.

        Raises:
            Failed: the patch is refused, or the rollout takes longer than the timeout.
        """
        # The client would send a dict as a JSON patch, the first type that the server lists.
        done = self._call(
            "patch",
            item,
            body=patch(knobs),
            field_manager="trimtab-tune",
            _content_type="application/strategic-merge-patch+json",
            **({"dry_run": "All"} if dry_run else {}),
        )
        if dry_run:
            return
        end = time.monotonic() + self._timeout
        while not _rolled_out(done):
            if time.monotonic() > end:
                kind, namespace, name = item
                raise Failed(
                    f"{kind} {namespace}/{name}: the rollout took more than timeout "
                    f"({self._timeout:g} s)"
                )
            time.sleep(_POLL)
            done = self._call("read", item)


def _live(
    found: tp.Any, containers: dict[str, tp.Any], knob: Kubernetes
) -> list[tuple[str, tp.Any]]:
    """Where a knob is in an object, and what stands there."""
    if knob.container is None:
        return [("replicas", found.spec.replicas)]
    container = containers[knob.container]
    if knob.field == "env":
        values = {v.name: v.value for v in container.env or []}
        return [(f"variable {knob.variable}", values.get(knob.variable))]
    parts = [knob.resource] if knob.resource else ["requests", "limits"]
    return [
        (f"{part}.{knob.field}", (getattr(container.resources, part, None) or {}).get(knob.field))
        for part in parts
    ]


def _same(knob: Kubernetes, live: tp.Any, start: Value) -> bool:
    from kubernetes.utils import parse_quantity

    if knob.field in ("cpu", "memory"):
        return bool(parse_quantity(live) == parse_quantity(quantity(knob, start)))
    return bool(live == quantity(knob, start))


def _rolled_out(found: tp.Any) -> bool:
    """As ``kubectl rollout status`` sees it."""
    status, wanted = found.status, found.spec.replicas
    if (status.observed_generation or 0) < (found.metadata.generation or 0):
        return False
    ready = getattr(status, "available_replicas", None)
    if ready is None:
        ready = status.ready_replicas
    return (
        (status.updated_replicas or 0) >= wanted
        and (status.replicas or 0) <= wanted
        and (ready or 0) >= wanted
    )
