"""What an AWS account says to a cluster file, asked before anything is started. Starts nothing, changes nothing."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from zeroflow.clusters.cluster_file import WORLD, ClusterFile, Machines

_QUOTAS = {
    ("standard", False): "L-1216C47A", ("standard", True): "L-34B43A08",
    ("g", False): "L-DB2E81BA", ("g", True): "L-3819A6DF",
    ("p", False): "L-417A185B", ("p", True): "L-7212CCBC",
}  # fmt: skip
"""AWS's codes of how many CPUs an account may have at a time: by family of machines, and whether spot."""


@dataclass
class Findings:
    """``problems``: what would go wrong, a line each. ``facts``: what was looked at and is right, or worth knowing."""

    problems: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)


def ask_account(cluster: ClusterFile) -> Findings:
    """Credentials, kinds of machines, quotas, image, security group and roles. Without credentials nothing else is asked."""
    found = Findings()
    if importlib.util.find_spec("boto3") is None:
        found.problems.append("the account cannot be asked without boto3: pip install boto3")
        return found
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    region = str(cluster.config["provider"].get("region"))
    session = boto3.session.Session(region_name=region)

    def asked(what: str, question: Callable[[], Any]) -> Any:
        """An answer; None, and a problem, where there was none."""
        try:
            return question()
        except ClientError as error:
            # Its text may repeat what was sent; the code says what it is.
            found.problems.append(f"{what}: AWS says {error.response['Error']['Code']}")
        except BotoCoreError as error:
            found.problems.append(f"{what}: {error}")
        return None

    who = asked("credentials", lambda: session.client("sts").get_caller_identity())
    if who is None:
        found.problems[-1] += "; `aws configure` or AWS_PROFILE gives credentials"
        return found
    found.facts.append(f"account {who['Account']} in {region}")
    ec2 = session.client("ec2")
    _machines(cluster, ec2, session.client("service-quotas"), found, asked)
    for image in sorted({node["node_config"]["ImageId"] for node in _nodes(cluster)}):
        _image(image, ec2, session.client("ssm"), found)
    _group(cluster, ec2, found, asked)
    roles = {
        str(profile["Name"])
        for node in _nodes(cluster)
        if (profile := node["node_config"].get("IamInstanceProfile", {})).get("Name")
    }
    for role in sorted(roles):
        try:
            session.client("iam").get_instance_profile(InstanceProfileName=role)
        except ClientError as error:
            if error.response["Error"]["Code"] == "NoSuchEntity":
                found.problems.append(f"role {role}: not in this account; cluster/aws.yaml makes it")
            else:
                found.facts.append(f"role {role}: could not be looked up ({error.response['Error']['Code']})")
    return found


def _nodes(cluster: ClusterFile) -> list[Any]:
    return list(cluster.config["available_node_types"].values())


def _machines(cluster: ClusterFile, ec2: Any, quotas: Any, found: Findings, asked: Any) -> None:
    types = sorted({machines.type for machines in cluster.machines})
    zones = [z.strip() for z in str(cluster.config["provider"].get("availability_zone") or "").split(",") if z.strip()]

    def offered() -> dict[str, set[str]]:
        where: dict[str, set[str]] = defaultdict(set)
        pages = ec2.get_paginator("describe_instance_type_offerings").paginate(
            LocationType="availability-zone", Filters=[{"Name": "instance-type", "Values": types}]
        )
        for page in pages:
            for offer in page["InstanceTypeOfferings"]:
                where[offer["InstanceType"]].add(offer["Location"])
        return where

    where = asked("kinds of machines", offered)
    if where is None:
        return
    for name in types:
        if not where.get(name):
            found.problems.append(f"{name}: not offered in {cluster.config['provider'].get('region')}")
        elif zones and not where[name] & set(zones):
            found.problems.append(f"{name}: in none of {', '.join(zones)}, but in {', '.join(sorted(where[name]))}")
    known = [name for name in types if where.get(name)]
    sizes = asked("kinds of machines", lambda: ec2.describe_instance_types(InstanceTypes=known)) if known else None
    if not sizes:
        return
    cpus = {size["InstanceType"]: size["VCpuInfo"]["DefaultVCpus"] for size in sizes["InstanceTypes"]}
    may_start: dict[bool, list[str]] = {True: [], False: []}
    for machines in cluster.machines:
        if machines.type in cpus and machines.count:
            may_start[machines.name == cluster.config["head_node_type"]].append(
                _quota(machines, cpus[machines.type], quotas, found)
            )
    for head, lines in may_start.items():
        if lines and all(lines):  # of several kinds of workers one is enough
            found.problems += lines
        else:
            found.facts += [line for line in lines if line and not head]


def _quota(machines: Machines, cpus: int, quotas: Any, found: Findings) -> str:
    """Why not one such machine can be started; empty: it can, as far as anybody knows."""
    from botocore.exceptions import BotoCoreError, ClientError

    family = machines.type[0] if machines.type[0] in "gp" else "standard"
    code = _QUOTAS[family, machines.spot]
    try:
        allowed = quotas.get_service_quota(ServiceCode="ec2", QuotaCode=code)["Quota"]["Value"]
    except (ClientError, BotoCoreError) as error:
        said = getattr(error, "response", {}).get("Error", {}).get("Code") or type(error).__name__
        found.facts.append(f"{machines.name}: quota {code} could not be looked up ({said})")
        return ""
    sort = "spot" if machines.spot else "on demand"
    if allowed < cpus:
        return (
            f"{machines.name}: {machines.type} {sort} needs {cpus} CPUs, the account may have {allowed:g}; ask for more: aws "
            f"service-quotas request-service-quota-increase --service-code ec2 --quota-code {code} --desired-value "
            f"{machines.count * cpus}"
        )
    most = min(machines.count, int(allowed // cpus))
    found.facts.append(
        f"{machines.name}: up to {most} of {machines.count} {machines.type} {sort} by the account's quota"
    )
    return ""


def _image(image: str, ec2: Any, ssm: Any, found: Findings) -> None:
    from botocore.exceptions import BotoCoreError, ClientError

    name = image.removeprefix("resolve:ssm:")
    try:
        if name == image:
            if not ec2.describe_images(ImageIds=[image])["Images"]:
                found.problems.append(f"image {image}: not in this region")
        else:
            found.facts.append(f"image today: {ssm.get_parameter(Name=name)['Parameter']['Value']}")
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if code in ("ParameterNotFound", "InvalidAMIID.NotFound", "InvalidAMIID.Malformed"):
            found.problems.append(f"image {image}: not in this region ({code})")
        else:
            found.facts.append(f"image {image}: could not be looked up ({code})")
    except BotoCoreError as error:
        found.facts.append(f"image {image}: could not be looked up ({type(error).__name__})")


def _group(cluster: ClusterFile, ec2: Any, found: Findings, asked: Any) -> None:
    """The security group that Ray will use must be there, have rules, and not be open to the world."""
    name = (cluster.config["provider"].get("security_group") or {}).get("GroupName")
    if name is None:
        return
    answer = asked(
        f"security group {name}",
        lambda: ec2.describe_security_groups(Filters=[{"Name": "group-name", "Values": [name]}]),
    )
    if answer is None:
        return
    if not answer["SecurityGroups"]:
        found.problems.append(
            f"security group {name}: not there: Ray would make it, with SSH open to the world; cluster/aws.yaml makes a closed one"
        )
    for group in answer["SecurityGroups"]:
        if not group["IpPermissions"]:
            found.problems.append(
                f"security group {name}: has no rules: Ray would add some, with SSH open to the world"
            )
        for rule in group["IpPermissions"]:
            ranges = [
                r.get("CidrIp") or r.get("CidrIpv6") for r in [*rule.get("IpRanges", []), *rule.get("Ipv6Ranges", [])]
            ]
            if any(r in WORLD for r in ranges):
                ports = f"port {rule['FromPort']}" if rule.get("FromPort") not in (None, -1) else "every port"
                found.problems.append(f"security group {name}: {ports} is open to the world")
