"""cluster.yaml, rayjob.yaml and rayserve.yaml, by Ray's own checks and for what has to agree in and between them."""

import copy
import json
import shlex
from importlib.metadata import version
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "docs" / "deploy"
CLUSTER = yaml.safe_load((DEPLOY / "cluster.yaml").read_text())
MANIFESTS = {name: list(yaml.safe_load_all((DEPLOY / name).read_text())) for name in ("rayjob.yaml", "rayserve.yaml")}
UNITS = {"Gi": 2**30, "Mi": 2**20}


def ray_cluster(name):
    """Return the specification of a manifest's Ray cluster."""
    spec = MANIFESTS[name][0]["spec"]
    return spec.get("rayClusterSpec", spec)


def groups(name):
    spec = ray_cluster(name)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def pods(name):
    """Return the pods' specifications, those of the front included."""
    deployments = [each["spec"] for each in MANIFESTS[name] if each["kind"] == "Deployment"]
    return [group["template"]["spec"] for group in [*groups(name), *deployments]]


def quantity(text):
    return int(text[:-2]) * UNITS[text[-2:]]


def test_ray_accepts_the_cluster_file():
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(CLUSTER, schema)
    validate_config(prepare_config(copy.deepcopy(CLUSTER)))
    broken = copy.deepcopy(CLUSTER)
    del broken["available_node_types"]["worker"]["resources"]
    with pytest.raises(jsonschema.ValidationError, match="resources"):
        jsonschema.validate(broken, schema)


def test_all_use_one_version_of_ray():
    assert f"ray[serve]=={version('ray')}" in CLUSTER["setup_commands"][2]
    assert {ray_cluster(name)["rayVersion"] for name in MANIFESTS} == {version("ray")}
    assert len({pod["containers"][0]["image"] for name in MANIFESTS for pod in pods(name)}) == 1


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_pod_has_the_packages_and_cannot_write_them(name):
    for pod in pods(name):
        (mount,) = (each for each in pod["containers"][0]["volumeMounts"] if each["mountPath"] == "/models")
        (volume,) = (each for each in pod["volumes"] if each["name"] == mount["name"])
        assert mount["readOnly"]
        assert volume["persistentVolumeClaim"] == {"claimName": "sdonnx-models", "readOnly": True}
        mounted = {each["name"] for each in pod["containers"][0]["volumeMounts"]}
        assert mounted == {each["name"] for each in pod["volumes"]}


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_node_asks_for_the_token(name):
    secret = ray_cluster(name)["authOptions"]["secretName"]
    assert ray_cluster(name)["authOptions"]["mode"] == "token"
    for deployment in (each for each in MANIFESTS[name] if each["kind"] == "Deployment"):
        env = {each["name"]: each for each in deployment["spec"]["template"]["spec"]["containers"][0]["env"]}
        assert env["RAY_AUTH_MODE"]["value"] == "token"
        assert env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == secret


@pytest.mark.parametrize("name", MANIFESTS)
def test_no_actor_runs_on_the_head(name):
    assert groups(name)[0]["rayStartParams"]["num-cpus"] == "0"
    assert CLUSTER["available_node_types"]["head"]["resources"] == {"CPU": 0}


def options(command):
    """Return the threads and bytes of an actor, and the number of actors, that a command asks for."""
    words = shlex.split(command)
    threads, memory, actors = (
        words[words.index(option) + 1] for option in ("--threads-per-actor", "--memory-per-actor", "--actors")
    )
    return int(threads), int(memory.removesuffix("GB")) * 10**9, int(actors)


def test_the_actors_fill_the_pods_at_most():
    threads, memory, actors = options(MANIFESTS["rayjob.yaml"][0]["spec"]["entrypoint"])
    worker = groups("rayjob.yaml")[1]
    resources = worker["template"]["spec"]["containers"][0]["resources"]
    cpus = int(worker["rayStartParams"]["num-cpus"])
    assert str(cpus) == resources["requests"]["cpu"]
    assert actors == cpus // threads * worker["maxReplicas"]
    free = quantity(resources["limits"]["memory"]) - int(worker["rayStartParams"]["object-store-memory"])
    assert cpus // threads * memory <= free


def test_the_actors_of_the_docs_fill_the_machines_at_most():
    docs = (ROOT / "docs" / "many-machines.md").read_text()
    command = docs.partition("ray exec cluster.yaml --tmux '")[2].partition("'")[0]
    threads, memory, actors = options(command.replace("\\\n", " "))
    worker = CLUSTER["available_node_types"]["worker"]
    assert actors == worker["resources"]["CPU"] // threads * worker["max_workers"]
    assert worker["resources"]["CPU"] // threads * memory <= worker["resources"]["memory"]


def test_the_front_joins_the_cluster_that_is_made():
    cluster, deployment, service = MANIFESTS["rayserve.yaml"]
    (command,) = deployment["spec"]["template"]["spec"]["containers"][0]["args"]
    assert f"ray start --address={cluster['metadata']['name']}-head-svc:6379 --num-cpus=0" in command
    assert f"--allow-host {service['metadata']['name']} " in command
    most = cluster["spec"]["workerGroupSpecs"][0]["maxReplicas"]
    assert f"--replicas 1:{most} " in command
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["replicas"] == 1
