"""Files of deploy/ against the schemas of who reads them, and against this project's own configuration."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

import cluster
from cluster.config import load_config

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def documents(path: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all((DEPLOY / path).read_text()) if document]


def resource(kind: str) -> dict[str, Any]:
    return next(item for item in documents("kubernetes/rayservice.yaml") if item["kind"] == kind)


@pytest.mark.parametrize("name", ["local", "aws", "gcp"])
def test_cluster_files_are_what_ray_up_wants(name: str) -> None:
    (config,) = documents(f"ray/{name}.yaml")
    validate_config(prepare_config(config))
    starts = [
        line for kind in ("head", "worker") for line in config[f"{kind}_start_ray_commands"] if "ray start" in line
    ]
    assert len(starts) == 2
    for line in starts:
        assert "RAY_AUTH_MODE=token" in line
        assert "RAY_USAGE_STATS_ENABLED=0" in line
        assert "unset OMP_NUM_THREADS" in line
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert any("expertmesh doctor" in line for line in config["setup_commands"])
    assert "~/.ray/auth_token" in config["file_mounts"]


def serve_configs() -> list[dict[str, Any]]:
    return [documents("ray/serve-config.yaml")[0], yaml.safe_load(resource("RayService")["spec"]["serveConfigV2"])]


@pytest.mark.parametrize("config", serve_configs(), ids=["ray", "kubernetes"])
def test_serve_configs_are_what_serve_deploy_wants(config: dict[str, Any]) -> None:
    ServeDeploySchema.model_validate(config)
    applications = {item["name"]: item for item in config["applications"]}
    settings = [load_config(flags=item["args"]["config"], environ={}) for item in applications.values()]
    assert len({repr(one) for one in settings}) == 1, "all say the same"
    groups = [name for name in applications if name.startswith("experts-")]
    assert groups == [f"experts-{number}" for number in range(settings[0].groups)]
    for number, name in enumerate(groups):
        assert applications[name]["args"]["group"] == number
        assert applications[name]["import_path"] == "cluster.declare:group"
    assert applications["expertmesh"]["import_path"] == "cluster.declare:router"
    assert settings[0].copies == 2
    assert settings[0].data_plane.bind != "127.0.0.1"


def test_pods_have_the_labels_that_applications_want() -> None:
    spec = resource("RayService")["spec"]
    cluster_spec = spec["rayClusterConfig"]
    offered = {cluster_spec["headGroupSpec"]["labels"]["role"]}
    offered |= {group["labels"]["role"] for group in cluster_spec["workerGroupSpecs"]}
    wanted = {
        item["args"]["actor"]["label_selector"]["role"]
        for item in yaml.safe_load(spec["serveConfigV2"])["applications"]
    }
    assert wanted == offered
    assert cluster_spec["authOptions"] == {"mode": "token"}
    templates = [cluster_spec["headGroupSpec"]["template"], cluster_spec["workerGroupSpecs"][0]["template"]]
    for template in templates:
        (container,) = template["spec"]["containers"]
        assert template["spec"]["securityContext"]["runAsNonRoot"]
        assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in container["env"]
        assert container["image"].endswith(f":{cluster.__version__}")
        assert "/dev/shm" in {mount["mountPath"] for mount in container["volumeMounts"]}
    # Services, budgets and policies select pods that there are.
    labels = [template["metadata"]["labels"] for template in templates]
    for item in [*documents("kubernetes/rayservice.yaml"), *documents("kubernetes/network.yaml")]:
        selector = item["spec"].get("selector") or item["spec"].get("podSelector")
        if selector is not None:
            wanted_labels = selector.get("matchLabels", selector)
            assert any(wanted_labels.items() <= found.items() for found in labels), item["metadata"]["name"]


def test_the_image_installs_what_ci_tested_and_is_not_root() -> None:
    text = (DEPLOY / "docker/Dockerfile").read_text()
    assert "-c constraints.txt" in text
    assert re.findall(r"^USER (\d+)$", text, re.MULTILINE)[-1] != "0"
    for source in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        for name in source.split():
            assert (DEPLOY.parent / name).exists()


def test_pages_name_files_that_there_are() -> None:
    for page in DEPLOY.rglob("*.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"
