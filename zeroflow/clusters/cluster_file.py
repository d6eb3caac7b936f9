"""Cluster files: what Ray accepts in one, and what it accepts and should not.

Ray checks a file against its own schema, which lets through what costs money or opens doors: machines that do not exist,
misspelt keys of the provider, folders that are not here, ports open to the world, versions that change from day to day.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from zeroflow.errors import ConfigError, unknown
from zeroflow.sweep.cluster_config import as_ray_reads_it

WORLD = ("0.0.0.0/0", "::/0")
"""Address ranges that mean everybody."""

_PROVIDERS = {
    "aws": (
        "region", "availability_zone", "cache_stopped_nodes", "security_group", "key_pair", "use_internal_ips", "cloudwatch",
        "aws_credentials", "max_retries",
    ),
    "gcp": ("region", "availability_zone", "project_id", "use_internal_ips", "gcp_credentials"),
    "local": ("head_ip", "worker_ips", "external_head_ip", "coordinator_address", "use_internal_ips"),
}  # fmt: skip
"""Keys of ``provider`` that Ray's providers read, beside ``type``."""

_RAYS_OWN = ("SubnetIds", "SecurityGroupIds")
"""Keys of a node's configuration that Ray itself turns into others before it asks AWS."""

_GCP_INSTANCE = (
    "machineType", "disks", "networkInterfaces", "serviceAccounts", "scheduling", "metadata", "guestAccelerators", "labels",
    "tags", "minCpuPlatform", "shieldedInstanceConfig", "confidentialInstanceConfig", "canIpForward", "deletionProtection",
)  # fmt: skip

_EXACT = re.compile(r"(:[\w.-]*\d+\.\d+\.\d+[\w.-]*|:\d[\w.-]*|@sha256:[0-9a-f]{64})$")
"""What the name of an image ends with that is the same one tomorrow."""


@dataclass(frozen=True)
class Machines:
    """One kind of machine. ``count``: of them at most. ``spot``: may be taken away. ``resources``: of one, in Ray's words."""

    name: str
    type: str
    count: int
    spot: bool
    resources: Mapping[str, float]


@dataclass(frozen=True)
class ClusterFile:
    """A cluster file as Ray will take it, and what is wrong with it.

    Attributes:
        config: with Ray's defaults filled in; of a Kubernetes file, its RayJob.
        kind: ``aws``, ``gcp``, ``local``, ``kuberay``.
        problems: one line each; empty: nothing is wrong that can be seen from here.
    """

    path: Path
    kind: str
    config: Mapping[str, Any]
    problems: tuple[str, ...]

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.config.get("metadata") or {} if self.kind != "kuberay" else {}

    def setting(self, name: str) -> str | None:
        """What the file gives machines as an environment variable; None: nothing."""
        for text in self.metadata.values():
            if isinstance(text, str) and text.startswith(f"{name}="):
                return text.removeprefix(f"{name}=") or None
        return None

    @property
    def machines(self) -> list[Machines]:
        """The head, then kinds of workers. Of a file without kinds of machines (``local``, Kubernetes): none."""
        if self.kind not in ("aws", "gcp"):
            return []
        head = self.config["head_node_type"]
        kinds = self.config["available_node_types"]
        return [
            Machines(
                name,
                str(kinds[name]["node_config"].get("InstanceType") or kinds[name]["node_config"].get("machineType")),
                1 if name == head else int(kinds[name].get("max_workers", self.config["max_workers"])),
                _is_spot(kinds[name]["node_config"]),
                kinds[name].get("resources") or {},
            )
            for name in sorted(kinds, key=lambda name: name != head)
        ]


def read_cluster(path: Path) -> ClusterFile:
    """Read a cluster file and find what is wrong with it. Asks nobody; see ``zeroflow.clusters.aws`` for what an account says.

    Raises:
        ConfigError: no such file, no YAML, or nothing in it that Ray could start.
    """
    try:
        documents = [document for document in yaml.safe_load_all(path.read_text()) if document is not None]
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: no YAML: {error}") from None
    jobs = [d for d in documents if isinstance(d, Mapping) and d.get("kind") == "RayJob"]
    if jobs:
        return ClusterFile(path, "kuberay", jobs[0], tuple(_of_job(jobs[0], documents)))
    if len(documents) != 1 or not isinstance(documents[0], Mapping):
        raise ConfigError(f"{path}: expected one mapping, a cluster file of Ray, or a RayJob of Kubernetes")
    given = documents[0]
    provider = given.get("provider")
    kind = provider.get("type") if isinstance(provider, Mapping) else None
    if kind not in _PROVIDERS:
        raise unknown("provider type", kind, _PROVIDERS, where=f"{path}: provider.type")
    try:
        config = as_ray_reads_it(given)
    except Exception as error:
        said = getattr(error, "message", None) or str(error)
        at = ".".join(map(str, getattr(error, "absolute_path", ())))
        raise ConfigError(f"{path}: {at + ': ' if at else ''}Ray refuses it: {said}") from None
    return ClusterFile(path, kind, config, tuple(_problems(kind, given, config)))


def _problems(kind: str, given: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[str]:
    yield from _left_to_edit(given, set())
    provider = given["provider"]
    for key in provider:
        if key != "type" and key not in _PROVIDERS[kind]:
            yield str(unknown(f"key of provider {kind}", key, _PROVIDERS[kind], where="provider"))
    for remote, local in (config.get("file_mounts") or {}).items():
        if not Path(local).expanduser().exists():
            yield f"file_mounts.{remote}: {local}: not here; `sh cluster/pack.sh` makes cluster/mount"
    yield from _open_doors(kind, provider, config)
    yield from _loose_versions(config)
    for name in config.get("available_node_types", {}) if kind != "local" else ():
        node = config["available_node_types"][name]["node_config"]
        where = f"available_node_types.{name}.node_config"
        yield from _aws_node(node, where) if kind == "aws" else _gcp_node(node, where)
    prices = (given.get("metadata") or {}).get("prices")
    types = {
        str(node["node_config"].get("InstanceType") or node["node_config"].get("machineType"))
        for node in config["available_node_types"].values()
    }
    if kind != "local" and not isinstance(prices, Mapping):
        yield "metadata.prices: missing; expected the price an hour of every kind of machine, so that the most can be told"
    elif kind != "local":
        for name in sorted(types - set(prices or {})):
            yield f"metadata.prices: no price of {name}"


def _left_to_edit(content: Any, told: set[str], where: str = "") -> Iterator[str]:
    """Values that only whoever starts the cluster knows; of one that is written once and used again only the first place."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _left_to_edit(value, told, f"{where}.{key}" if where else str(key))
    elif isinstance(content, list):
        for number, value in enumerate(content):
            yield from _left_to_edit(value, told, f"{where}[{number}]")
    elif isinstance(content, str) and "CHANGE-ME" in content and content not in told:
        told.add(content)
        yield f"{where}: {content!r} is yours to edit"


def _open_doors(kind: str, provider: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[str]:
    group = provider.get("security_group") or {}
    for number, rule in enumerate(group.get("IpPermissions") or []):
        ranges = [
            r.get("CidrIp") or r.get("CidrIpv6") for r in [*rule.get("IpRanges", []), *rule.get("Ipv6Ranges", [])]
        ]
        if any(r in WORLD for r in ranges):
            yield f"provider.security_group.IpPermissions[{number}]: open to the world; expected your own address"
    owned = all("SecurityGroupIds" in node["node_config"] for node in config["available_node_types"].values())
    if kind == "aws" and "GroupName" not in group and not owned:
        yield (
            "provider.security_group: no GroupName: Ray would make a group with SSH open to the world; expected the name of a "
            "group that exists, such as cluster/aws.yaml makes"
        )
    if kind == "gcp":
        for name, node in config["available_node_types"].items():
            networks = node["node_config"].get("networkInterfaces") or []
            if not networks or any("/default" in str(net.get("subnetwork", "/default")) for net in networks):
                yield (
                    f"available_node_types.{name}.node_config.networkInterfaces: the default network has SSH open to the world; "
                    "expected a subnetwork of your own"
                )
    for option in (config.get("docker") or {}).get("run_options") or []:
        if re.match(r"(-p|--publish)\b", str(option)):
            yield f"docker.run_options: {option!r} publishes a port"
    starts = [c for c in config.get("head_start_ray_commands") or [] if "ray start" in c]
    for command in starts:
        host = re.search(r"--dashboard-host[= ](\S+)", command)
        if host and host[1] not in ("127.0.0.1", "localhost", "::1"):
            yield (
                f"head_start_ray_commands: --dashboard-host={host[1]}: whoever reaches the dashboard runs commands; expected "
                "127.0.0.1, and `ray dashboard` to reach it"
            )
    everything = json.dumps([config.get("docker"), starts, config.get("setup_commands")])
    if "RAY_AUTH_MODE=token" not in everything and "onprem.env" not in everything:
        yield "RAY_AUTH_MODE=token is nowhere: whoever reaches a port runs commands"
    if "auth_token" not in json.dumps(config.get("file_mounts")) + json.dumps(config.get("head_setup_commands")):
        yield "nothing brings a token to ~/.ray/auth_token of the machines"


def _loose_versions(config: Mapping[str, Any]) -> Iterator[str]:
    images = {key: (config.get("docker") or {}).get(key) for key in ("image", "head_image", "worker_image")}
    for key, image in images.items():
        if image and not _EXACT.search(str(image)):
            yield f"docker.{key}: {image}: changes from day to day; expected a tag with a version, or a digest"
    steps = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
    loose = {
        command: None
        for step in steps
        for command in config.get(step) or []
        if "pip install" in command and not re.search(r"(-c|--constraint)[= ]\S*constraints\.txt", command)
    }
    for command in loose:
        yield f"{command!r}: installs whatever is newest; expected -c ~/zeroflow/cluster/constraints.txt"
    tag = re.search(r":(\d+\.\d+\.\d+)", str(images["image"] or ""))
    if tag and (own := _ray_version()) and tag[1] != own:
        yield f"docker.image: Ray {tag[1]}, and Ray {own} here: one version does not talk to another"


def _ray_version() -> str | None:
    from importlib import metadata

    try:
        return metadata.version("ray")
    except metadata.PackageNotFoundError:
        return None


def _aws_node(node: Mapping[str, Any], where: str) -> Iterator[str]:
    if importlib.util.find_spec("botocore") is None:
        yield f"{where}: cannot be checked without boto3: pip install boto3"
        return
    import botocore.validate

    ec2 = _ec2()
    shape = ec2.operation_model("RunInstances").input_shape
    asked = {**{key: value for key, value in node.items() if key not in _RAYS_OWN}, "MinCount": 1, "MaxCount": 1}
    report = botocore.validate.ParamValidator().validate(asked, shape)
    for problem, name, details in report._errors:
        at = f"{where}{name}"
        if problem == "unknown field":
            yield str(unknown("key", details["unknown_param"], details["valid_names"], where=at))
        else:
            yield f"{at}: {problem}: {', '.join(f'{k} {v}' for k, v in details.items())}"
    known = ec2.shape_for("InstanceType").enum
    if node.get("InstanceType") not in known:
        yield str(unknown("kind of machine", node.get("InstanceType"), known, where=f"{where}.InstanceType"))
    if not node.get("ImageId"):
        yield f"{where}.ImageId: missing: Ray would take an image of 2023, whose driver is too old"
    if node.get("MetadataOptions", {}).get("HttpTokens") != "required":
        yield f"{where}.MetadataOptions: expected HttpTokens: required, or any request from a machine may read its credentials"


@functools.cache
def _ec2() -> Any:
    """AWS's own description of EC2, which takes more than a second to read."""
    import botocore.session

    return botocore.session.get_session().get_service_model("ec2")


def _gcp_node(node: Mapping[str, Any], where: str) -> Iterator[str]:
    for key in node:
        if key not in _GCP_INSTANCE:
            yield str(unknown("key", key, _GCP_INSTANCE, where=where))
    kind = str(node.get("machineType"))
    if not re.fullmatch(r"[a-z]\d*[a-z]*\d*(-[a-z0-9]+)+", kind):
        yield f"{where}.machineType: {kind!r}: expected a kind of machine such as g2-standard-4"


def _is_spot(node: Mapping[str, Any]) -> bool:
    market = (node.get("InstanceMarketOptions") or {}).get("MarketType")
    scheduling = node.get("scheduling") or {}
    return market == "spot" or (isinstance(scheduling, Mapping) and scheduling.get("provisioningModel") == "SPOT")


def _of_job(job: Mapping[str, Any], documents: list[Any]) -> Iterator[str]:
    yield from _left_to_edit(job, set())
    spec = job.get("spec") or {}
    cluster = spec.get("rayClusterSpec") or {}
    if (cluster.get("authOptions") or {}).get("mode") != "token":
        yield "spec.rayClusterSpec.authOptions: expected {mode: token}: whoever reaches a port runs commands"
    head = cluster.get("headGroupSpec") or {}
    if head.get("serviceType", "ClusterIP") != "ClusterIP" or head.get("enableIngress"):
        yield "spec.rayClusterSpec.headGroupSpec: reachable from outside; expected serviceType: ClusterIP, and no ingress"
    if not any(isinstance(d, Mapping) and d.get("kind") == "NetworkPolicy" for d in documents):
        yield "no NetworkPolicy: every pod of the cluster reaches the job port"
    if not spec.get("shutdownAfterJobFinishes") or not spec.get("activeDeadlineSeconds"):
        yield "spec: expected shutdownAfterJobFinishes: true and activeDeadlineSeconds: otherwise nothing ends what is paid for"
    groups = [
        ("headGroupSpec", head),
        *((f"workerGroupSpecs[{n}]", g) for n, g in enumerate(cluster.get("workerGroupSpecs", []))),
    ]
    for where, group in groups:
        for container in ((group.get("template") or {}).get("spec") or {}).get("containers") or []:
            if not _EXACT.search(str(container.get("image"))):
                yield f"spec.rayClusterSpec.{where}: image {container.get('image')}: expected a tag with a version, or a digest"
