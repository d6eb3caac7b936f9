"""Cluster files once they are edited: what Ray says to them, what it overlooks, what an account says, and what a launch costs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from places import ROOT
from pyarrow import fs

from zeroflow.cli import main
from zeroflow.clusters.aws import Findings, _group, _quota
from zeroflow.clusters.cluster_file import Machines, read_cluster
from zeroflow.clusters.data_sync import synchronise
from zeroflow.errors import ConfigError
from zeroflow.grid.grid_file import load_grid
from zeroflow.results.copying import copy_cell
from zeroflow.results.store import Store

CLUSTER = ROOT / "cluster"
FILES = ("gpu.yaml", "gcp.yaml", "onprem.yaml", "kuberay-job.yaml")


def constraints() -> dict[str, str]:
    lines = (CLUSTER / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@pytest.fixture
def edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the cluster files as someone edits them, with what ``pack.sh`` makes, beside the working folder."""
    shutil.copytree(CLUSTER, tmp_path / "cluster", ignore=shutil.ignore_patterns("mount"))
    (tmp_path / "cluster" / "mount").mkdir()
    for file in (tmp_path / "cluster").glob("*.yaml"):
        text = file.read_text().replace("zeroflow-CHANGE-ME/", "bucket/")
        file.write_text(text.replace("CHANGE-ME", "mine"))
    monkeypatch.chdir(tmp_path)
    # Ray's version here need not be the pinned one.
    monkeypatch.setattr("zeroflow.clusters.cluster_file._ray_version", lambda: constraints()["ray"])
    return tmp_path / "cluster"


# What Ray says to them, and overlooks.


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_right_once_it_is_edited(name: str, edited: Path) -> None:
    assert read_cluster(edited / name).problems == ()


def changed(file: Path, *edits: tuple[str, str]) -> Path:
    text = file.read_text()
    for old, new in edits:
        assert old in text, old
        text = text.replace(old, new)
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("name", "old", "new", "told"),
    [
        ("gpu.yaml", "g6.xlarge", "g6.xlrage", "unknown kind of machine 'g6.xlrage'; did you mean 'g6.xlarge'"),
        ("gpu.yaml", "InstanceMarketOptions:", "InstanceMarketOption:", "did you mean 'InstanceMarketOptions'"),
        ("gpu.yaml", "VolumeSize", "Volumesize", "BlockDeviceMappings[0].Ebs: unknown key 'Volumesize'; did you mean 'VolumeSize'"),
        ("gpu.yaml", "  region:", "  regoin:", "unknown key of provider aws 'regoin'; did you mean 'region'"),
        ("gpu.yaml", "GroupName: zeroflow", "IpPermissions: []", "SSH open to the world"),
        (
            "gpu.yaml", "GroupName: zeroflow",
            "GroupName: z\n    IpPermissions: [{IpProtocol: tcp, FromPort: 8265, ToPort: 8265, IpRanges: [{CidrIp: 0.0.0.0/0}]}]",
            "IpPermissions[0]: open to the world",
        ),
        ("gpu.yaml", "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "whoever reaches the dashboard runs commands"),
        ("gpu.yaml", "ray:2.60.0-py311-gpu", "ray:latest-gpu", "changes from day to day"),
        ("gpu.yaml", "ray:2.60.0-py311", "ray:2.59.0-py311", "one version does not talk to another"),
        ("gpu.yaml", "pip install -q -c ~/zeroflow/cluster/constraints.txt -e", "pip install -e", "installs whatever is newest"),
        ("gpu.yaml", "cluster/mount", "cluster/moutn", "cluster/moutn: not here"),
        ("gpu.yaml", "    - --env RAY_AUTH_MODE=token", "    - --env A=b", "RAY_AUTH_MODE=token is nowhere"),
        ("gpu.yaml", "~/zeroflow-mount/auth_token", "~/none", None),
        ("gpu.yaml", "HttpTokens: required", "HttpTokens: optional", "any request from a machine may read its credentials"),
        ("gpu.yaml", "ImageId: resolve", "ImageID: resolve", "ImageId: missing"),
        ("gpu.yaml", "prices: {g6.xlarge: 0.8048, m6i", "prices: {m6i", "no price of g6.xlarge"),
        ("gpu.yaml", "    - --ulimit", "    - --publish 8265:8265 --ulimit", "publishes a port"),
        ("gcp.yaml", "subnetworks/zeroflow", "subnetworks/default", "the default network has SSH open to the world"),
        ("gcp.yaml", "machineType:", "machinetype:", "did you mean 'machineType'"),
        ("onprem.yaml", "  worker_ips:", "  workers_ips:", "worker_ips"),
        ("kuberay-job.yaml", "authOptions: {mode: token}", "authOptions: {mode: disabled}", "expected {mode: token}"),
        ("kuberay-job.yaml", "serviceType: ClusterIP", "serviceType: LoadBalancer", "reachable from outside"),
        ("kuberay-job.yaml", "mine/zeroflow:1", "mine/zeroflow:latest", "expected a tag with a version, or a digest"),
        ("kuberay-job.yaml", "  activeDeadlineSeconds: 86400", "  suspend: false", "nothing ends what is paid for"),
    ],
)  # fmt: skip
def test_what_ray_overlooks_is_told(name: str, old: str, new: str, told: str | None, edited: Path) -> None:
    file = changed(edited / name, (old, new))
    try:
        problems = read_cluster(file).problems
    except ConfigError as error:
        problems = (str(error),)
    if told is None:
        assert problems == ()  # a command may be anything
    else:
        assert any(told in problem for problem in problems), problems


def test_all_problems_are_told_at_once_and_the_status_says_so(edited: Path) -> None:
    file = changed(
        edited / "gpu.yaml", ("g6.xlarge", "g6.xlrage"), ("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0")
    )
    run = CliRunner().invoke(main, ["check-cluster", str(file), "--offline", "--json"])
    told = json.loads(run.stdout)
    assert run.exit_code == 2
    assert len([p for p in told["problems"] if "g6.xlrage" in p]) == 2 and any(
        "dashboard" in p for p in told["problems"]
    )
    fine = CliRunner().invoke(main, ["check-cluster", str(edited / "gcp.yaml"), "--offline"])
    assert fine.exit_code == 0 and "at most 8 x 0.7069 + 1 x 0.134 = 5.79 an hour" in fine.output, fine.output


# AWS, as moto plays it.


@pytest.fixture
def account(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """An account with nothing in it, and ``cluster/aws.yaml`` deployed on demand."""
    import boto3

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    region, stacks = "us-west-2", []

    def deploy(bucket: str) -> None:
        formation = boto3.client("cloudformation", region)
        formation.create_stack(
            StackName="zeroflow",
            TemplateBody=(CLUSTER / "aws.yaml").read_text(),
            Capabilities=["CAPABILITY_NAMED_IAM"],
            Parameters=[
                {"ParameterKey": "Bucket", "ParameterValue": bucket},
                {"ParameterKey": "SshFrom", "ParameterValue": "198.51.100.7/32"},
            ],
        )
        stacks.append(formation)

    yield deploy
    for formation in stacks:
        formation.delete_stack(StackName="zeroflow")
        iam = boto3.client("iam")  # moto leaves it behind
        for policy in iam.list_policies(Scope="Local")["Policies"]:
            iam.delete_policy(PolicyArn=policy["Arn"])
    for group in boto3.client("ec2", region).describe_security_groups()["SecurityGroups"]:
        if group["GroupName"] != "default":
            boto3.client("ec2", region).delete_security_group(GroupId=group["GroupId"])


def ingress(region: str = "us-west-2") -> dict[str, set[tuple[Any, ...]]]:
    import boto3

    groups = boto3.client("ec2", region).describe_security_groups()["SecurityGroups"]
    return {
        group["GroupName"]: {
            (rule["IpProtocol"], rule.get("FromPort"), r["CidrIp"])
            for rule in group["IpPermissions"]
            for r in rule["IpRanges"]
        }
        for group in groups
    }


def bootstrapped(file: Path) -> dict[str, Any]:
    """What ``ray up`` makes of a file before it starts machines."""
    from ray.autoscaler._private.commands import _bootstrap_config

    return dict(_bootstrap_config(yaml.safe_load(file.read_text()), no_config_cache=True))


@pytest.mark.slow
def test_ray_takes_the_closed_group_and_both_roles(account: Any, edited: Path) -> None:
    account("zeroflow-closed")
    config = bootstrapped(edited / "gpu.yaml")
    assert ingress()["zeroflow"] == {("tcp", 22, "198.51.100.7/32")}
    kinds = config["available_node_types"]
    assert len({tuple(kind["node_config"]["SecurityGroupIds"]) for kind in kinds.values()}) == 1
    # What AWS says such machines have.
    assert (
        kinds["gpu_spot"]["resources"].items() >= {"CPU": 4, "GPU": 1}.items()
        and kinds["head"]["resources"]["CPU"] == 0
    )
    roles = {name: kind["node_config"]["IamInstanceProfile"]["Name"] for name, kind in kinds.items()}
    assert roles == {"head": "zeroflow-head", "gpu_spot": "zeroflow-worker", "gpu_on_demand": "zeroflow-worker"}
    assert not any("0.0.0.0/0" in rule for rules in ingress().values() for rule in rules)


def test_a_group_without_rules_is_told_because_ray_would_add_some(account: Any, edited: Path) -> None:
    import boto3

    boto3.client("ec2", "us-west-2").create_security_group(GroupName="zeroflow", Description="empty")
    run = CliRunner().invoke(main, ["check-cluster", str(edited / "gpu.yaml"), "--json"])
    assert any("security group zeroflow: has no rules" in p for p in json.loads(run.stdout)["problems"]), run.stdout


def test_without_the_group_ray_opens_ssh_to_the_world_which_is_told_before(account: Any, edited: Path) -> None:
    run = CliRunner().invoke(main, ["check-cluster", str(edited / "gpu.yaml"), "--json"])
    problems = json.loads(run.stdout)["problems"]
    assert run.exit_code == 2
    assert any(p.startswith("security group zeroflow: not there") for p in problems), problems
    assert {p for p in problems if p.startswith("role ")} == {
        "role zeroflow-head: not in this account; cluster/aws.yaml makes it",
        "role zeroflow-worker: not in this account; cluster/aws.yaml makes it",
    }
    import boto3
    from ray.autoscaler._private.aws.config import bootstrap_aws

    bootstrap_aws(dict(read_cluster(edited / "gpu.yaml").config))
    assert ("tcp", 22, "0.0.0.0/0") in ingress()["zeroflow"], "or the check would warn of nothing"
    found = Findings()
    _group(
        read_cluster(edited / "gpu.yaml"), boto3.client("ec2", "us-west-2"), found, lambda what, question: question()
    )
    assert found.problems == ["security group zeroflow: port 22 is open to the world"]


@pytest.mark.slow
def test_a_whole_launch_is_checked_with_data_hours_and_price(account: Any, edited: Path, tmp_path: Path) -> None:
    account("zeroflow-test-bucket")
    s3 = fs.FileSystem.from_uri("s3://zeroflow-test-bucket")[0]
    store, quick = Store("s3://zeroflow-test-bucket/runs/quick"), Store(ROOT / "results" / "quick")
    cells = [c for c in load_grid(ROOT / "sweeps" / "quick.yaml").cells if c.method == "aper-adapter" and c.seed < 2]
    for cell in cells:
        assert copy_cell(store, cell.cell_id, quick)
    import boto3

    image = boto3.client("ec2", "us-west-2").describe_images()["Images"][0]["ImageId"]  # moto has none under AWS's name
    (named,) = set(re.findall(r"resolve:ssm:\S+", (edited / "gpu.yaml").read_text()))
    file = changed(edited / "gpu.yaml", ("s3://bucket/", "s3://zeroflow-test-bucket/"), (named, image))
    command = ["check-cluster", str(file), "--grid", str(ROOT / "sweeps" / "quick.yaml"), "--json"]
    photos = [*command, "--set", "dataset=cifar100"]
    run = CliRunner().invoke(main, photos)
    (absent,) = json.loads(run.stdout)["problems"]
    assert run.exit_code == 2 and "missing s3://zeroflow-test-bucket/data/cifar-100-python/train" in absent
    for part in ("train", "test", "meta"):
        with s3.open_output_stream(f"zeroflow-test-bucket/data/cifar-100-python/{part}") as stream:
            stream.write(part.encode())
    run = CliRunner().invoke(main, [*command, "--set", "method=aper-adapter", "--set", "seed=[0,1,2]"])
    told = json.loads(run.stdout)
    assert run.exit_code == 0 and told["hourly"] == pytest.approx(6.6304), told
    assert any(fact.startswith("account 123456789012 in us-west-2") for fact in told["facts"])
    assert told["missing"] > 0 and told["hours"] > 0
    # Eight machines of one GPU each, and a head.
    assert told["cost"] == pytest.approx(told["hours"] * (8 * 0.8048 + 0.192))
    # And machines get it from there, once.
    assert synchronise("s3://zeroflow-test-bucket/data", tmp_path / "here") == 3
    assert (tmp_path / "here" / "cifar-100-python" / "meta").read_text() == "meta"
    assert synchronise("s3://zeroflow-test-bucket/data", tmp_path / "here") == 0
    (tmp_path / "here" / "cifar-100-python" / "test").write_text("cut")
    again = CliRunner().invoke(
        main, ["sync-data", "s3://zeroflow-test-bucket/data", "--data-dir", str(tmp_path / "here")]
    )
    assert again.exit_code == 0 and again.stdout.startswith("1 file(s) copied"), again.output
    assert sorted(p.name for p in (tmp_path / "here").rglob("*") if p.is_file()) == ["meta", "test", "train"]


def test_no_credentials_and_no_bucket_are_two_problems(edited: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    run = CliRunner().invoke(main, ["check-cluster", str(edited / "gpu.yaml"), "--json"])
    problems = json.loads(run.stdout)["problems"]
    assert run.exit_code == 2 and len(problems) == 2, problems
    assert problems[0].startswith("credentials: Unable to locate credentials") and "aws configure" in problems[0]
    assert problems[1].startswith("results 's3://bucket/runs'")


def test_a_quota_that_allows_no_machine_is_told_with_the_command_that_asks_for_more(account: Any, edited: Path) -> None:
    class Quotas:
        def get_service_quota(self, ServiceCode: str, QuotaCode: str) -> Any:  # noqa: N803
            return {"Quota": {"Value": {"L-3819A6DF": 0.0, "L-DB2E81BA": 9.0}[QuotaCode]}}

    found = Findings()
    spot = _quota(Machines("gpu_spot", "g6.xlarge", 8, True, {}), 4, Quotas(), found)
    assert "needs 4 CPUs, the account may have 0" in spot and "--quota-code L-3819A6DF --desired-value 32" in spot
    assert _quota(Machines("gpu_on_demand", "g6.xlarge", 8, False, {}), 4, Quotas(), found) == ""
    assert found.facts == ["gpu_on_demand: up to 2 of 8 g6.xlarge on demand by the account's quota"]
