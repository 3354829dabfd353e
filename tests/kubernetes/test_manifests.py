"""deploy/kubernetes against Kubernetes' own schema, against itself, and against the programs that it starts."""

from __future__ import annotations

import copy
import functools
import os
import re
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from fleetfed.cloud_coordinator.config import CoordinatorConfig
from fleetfed.cloud_coordinator.helper import config as helper_config
from fleetfed.cloud_coordinator.keys.equip import make_trust
from fleetfed.cloud_coordinator.keys.keyring import Keyring, MemberRole, NewMember
from fleetfed.cloud_coordinator.keys.pki import Listener
from fleetfed.gateway import config as gateway_config

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))
VERSIONS = ("1.28", "1.37")
"""Of Kubernetes."""
LOADERS: dict[str, Callable[[Path], Any]] = {
    "coordinator": CoordinatorConfig.load,
    "gateway": gateway_config.load,
    "helper": helper_config.load,
}

Document = dict[str, Any]


@functools.cache
def read(name: str) -> list[Document]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def documents(*names: str) -> Iterator[Document]:
    for name in names or FILES:
        yield from read(name)


def of_kind(kind: str) -> list[Document]:
    return [document for document in documents() if document["kind"] == kind]


def sets() -> list[Any]:
    found = of_kind("StatefulSet")
    return [pytest.param(each, id=f"{each['metadata']['namespace']}/{each['metadata']['name']}") for each in found]


def pod(document: Document) -> Document:
    spec: Document = document["spec"]["template"]["spec"]
    return spec


def containers(document: Document) -> list[Document]:
    return [*pod(document)["initContainers"], *pod(document)["containers"]]


def selects(selector: Document, labels: dict[str, str]) -> bool:
    return selector.get("matchLabels", {}).items() <= labels.items()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", FILES)
def test_kubernetes_knows_every_field(name: str, version: str) -> None:
    for document in documents(name):
        kubernetes_validate.validate(document, version, strict=True)


def test_the_schema_refuses_what_it_does_not_know() -> None:
    document = copy.deepcopy(of_kind("StatefulSet")[0])
    pod(document)["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readinesProbe"):
        kubernetes_validate.validate(document, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("document", sets())
def test_pods_are_as_restricted_as_their_namespaces_demand(document: Document) -> None:
    spec = pod(document)
    assert spec["automountServiceAccountToken"] is False
    context = spec["securityContext"]
    assert context["runAsNonRoot"]
    assert context["runAsUser"] == context["fsGroup"]
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    # A change at every start would open keys in the state to the group.
    assert context["fsGroupChangePolicy"] == "OnRootMismatch"
    for container in containers(document):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"].keys() == {"requests", "limits"}
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert probe in spec["containers"][0]


def test_namespaces_demand_restricted_pods() -> None:
    for document in of_kind("Namespace"):
        assert document["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    names = {document["metadata"]["name"] for document in of_kind("Namespace")}
    assert {each["metadata"]["namespace"] for each in documents() if each["kind"] != "Namespace"} == names


@pytest.mark.parametrize("document", sets())
def test_secrets_are_files(document: Document) -> None:
    for container in containers(document):
        assert "env" not in container
        assert "envFrom" not in container
    (secret,) = (volume for volume in pod(document)["volumes"] if "secret" in volume)
    users = [c["name"] for c in containers(document) for mount in c["volumeMounts"] if mount["name"] == secret["name"]]
    assert users == ["unpack"]
    (files,) = (volume for volume in pod(document)["volumes"] if volume["name"] == "files")
    assert files["emptyDir"]["medium"] == "Memory"


@pytest.mark.parametrize("document", sets())
def test_names_lead_somewhere(document: Document) -> None:
    namespace, spec = document["metadata"]["namespace"], pod(document)
    labels = document["spec"]["template"]["metadata"]["labels"]
    assert selects(document["spec"]["selector"], labels)
    (service,) = (
        each
        for each in of_kind("Service")
        if (each["metadata"]["namespace"], each["metadata"]["name"]) == (namespace, document["spec"]["serviceName"])
    )
    assert service["spec"]["selector"].items() <= labels.items()
    ports = {port["name"] for container in spec["containers"] for port in container["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    assert {port["name"] for port in service["spec"]["ports"]} == ports
    volumes = {volume["name"] for volume in spec["volumes"]}
    volumes |= {claim["metadata"]["name"] for claim in document["spec"]["volumeClaimTemplates"]}
    mounted = {mount["name"] for container in containers(document) for mount in container["volumeMounts"]}
    assert mounted == volumes
    targets = re.findall(r"^FROM runtime AS (\w+)$|^FROM \S+ AS (broker)$", (ROOT / "Dockerfile").read_text(), re.M)
    images = {f"fleetfed/{first or second}:0.1.0" for first, second in targets}
    assert {container["image"] for container in containers(document)} <= images


def test_every_policy_and_budget_selects_a_pod() -> None:
    pods = [(d["metadata"]["namespace"], d["spec"]["template"]["metadata"]["labels"]) for d in of_kind("StatefulSet")]
    for kind, key in (("NetworkPolicy", "podSelector"), ("PodDisruptionBudget", "selector")):
        for document in of_kind(kind):
            matched = [
                namespace
                for namespace, labels in pods
                if namespace == document["metadata"]["namespace"] and selects(document["spec"][key], labels)
            ]
            assert matched, document["metadata"]


def test_every_port_that_prometheus_asks_may_be_asked() -> None:
    allowed = {
        (document["metadata"]["namespace"], port["port"])
        for document in of_kind("NetworkPolicy")
        for rule in document["spec"].get("ingress", [])
        for port in rule["ports"]
    }
    ports = {
        (document["metadata"]["namespace"], port["containerPort"])
        for document in of_kind("StatefulSet")
        for container in pod(document)["containers"]
        for port in container["ports"]
    }
    assert allowed == ports


@pytest.mark.parametrize("role", LOADERS)
def test_the_settings_are_those_of_the_role(role: str, tmp_path: Path) -> None:
    (text,) = (doc["data"][f"{role}.toml"] for doc in of_kind("ConfigMap") if f"{role}.toml" in doc["data"])
    path = tmp_path / f"{role}.toml"
    path.write_text(text)
    settings = LOADERS[role](path)
    (document,) = (d for d in of_kind("StatefulSet") if pod(d)["containers"][0]["name"] == role)
    (container,) = pod(document)["containers"]
    assert settings.monitoring.listen == f"0.0.0.0:{container['ports'][0]['containerPort']}"
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {str(settings.identity), str(settings.state), "/etc/fleetfed"} <= mounts


@pytest.mark.parametrize("document", sets())
def test_what_is_unpacked_belongs_to_its_reader_alone(document: Document, tmp_path: Path) -> None:
    (unpack,) = pod(document)["initContainers"]
    (script,) = unpack["args"]
    folder = "broker" if "/broker" in script else "identity"
    source = tmp_path / "source" / "tls"
    source.mkdir(parents=True)
    (source / "key.pem").write_text("key")
    (source / "key.pem").chmod(0o644)
    (tmp_path / "secret").mkdir()
    (tmp_path / "files").mkdir()
    with tarfile.open(tmp_path / "secret" / f"{folder}.tar", "w") as tar:
        tar.add(tmp_path / "source", ".")
    here = script.replace("/files", str(tmp_path / "files")).replace("/secret", str(tmp_path / "secret"))
    # Twice: a pod whose containers all died unpacks again.
    for _ in range(2):
        subprocess.run([*unpack["command"], here], check=True)
    key = tmp_path / "files" / folder / "tls" / "key.pem"
    assert key.read_text() == "key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700


def test_the_secrets_that_are_packed_are_those_that_pods_unpack(tmp_path: Path) -> None:
    now = int(time.time() * 1000)
    keyring = Keyring.create(tmp_path / "keys", "demo", now=now)
    wanted = [
        NewMember(id="coordinator", role=MemberRole.COORDINATOR),
        NewMember(id="cloud-broker", role=MemberRole.BROKER, hosts=("broker",), listener=Listener.CLOUD),
        NewMember(id="north-broker", role=MemberRole.BROKER, hosts=("broker",)),
        NewMember(id="g-north", role=MemberRole.GATEWAY, site="north"),
        NewMember(id="b-north", role=MemberRole.BRIDGE, site="north"),
        NewMember(id="h-two", role=MemberRole.HELPER),
    ]
    keyring.issue(wanted, now=now)
    make_trust(keyring, now=now)
    (tmp_path / "pgpass").write_text("postgres:5432:fleetfed:fleetfed:secret\n")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [FOLDER / "pack.sh", tmp_path / "keys", tmp_path / "pgpass", tmp_path / "out"]
    subprocess.run(command, check=True, env={**os.environ, "PATH": path}, capture_output=True)

    packed = {str(tar.relative_to(tmp_path / "out")) for tar in (tmp_path / "out").glob("*/*/*.tar")}
    assert packed == {unpacked(document) for document in of_kind("StatefulSet")}
    for tar in packed:
        assert stat.S_IMODE((tmp_path / "out" / tar).stat().st_mode) == 0o600
    for namespace in ("fleetfed", "fleetfed-north"):
        with tarfile.open(tmp_path / "out" / namespace / "broker-files" / "broker.tar") as tar:
            members = {"/etc/fleetfed" + name.removeprefix(".") for name in tar.getnames()}
            config = tar.extractfile("./mosquitto.conf")
            assert config is not None
            named = set(re.findall(r"file (/etc/fleetfed/\S+)", config.read().decode()))
        assert len(named) >= 4
        assert named <= members
    with tarfile.open(tmp_path / "out" / "fleetfed" / "coordinator-identity" / "identity.tar") as tar:
        assert {"./pgpass", "./signing.key", "./tls/key.pem"} <= set(tar.getnames())


def unpacked(document: Document) -> str:
    """Where the tar lies that a pod unpacks."""
    (secret,) = (volume["secret"]["secretName"] for volume in pod(document)["volumes"] if "secret" in volume)
    (found,) = re.findall(r"--file=/secret/(\S+)", pod(document)["initContainers"][0]["args"][0])
    return f"{document['metadata']['namespace']}/{secret}/{found}"
