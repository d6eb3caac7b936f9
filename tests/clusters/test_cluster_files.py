"""Cluster files as they lie here: what they are, what they cost at most, and what goes to a cluster."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from places import ROOT

from zeroflow.clusters.cluster_file import read_cluster
from zeroflow.clusters.prices import hourly_price
from zeroflow.errors import ConfigError

CLUSTER = ROOT / "cluster"
FILES = ("gpu.yaml", "gcp.yaml", "onprem.yaml", "kuberay-job.yaml")


def constraints() -> dict[str, str]:
    lines = (CLUSTER / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


# What the files are.


@pytest.mark.parametrize("name", FILES)
def test_what_is_left_to_edit_is_told_each_once(name: str) -> None:
    problems = [problem for problem in read_cluster(CLUSTER / name).problems if "mount" not in problem]
    assert problems and all(problem.endswith("is yours to edit") for problem in problems if "Ray 2" not in problem)
    assert len(set(problems)) == len(problems)


@pytest.mark.parametrize("name", ["gpu.yaml", "gcp.yaml"])
def test_the_maximum_spend_in_the_comment_is_what_machines_and_prices_make(name: str) -> None:
    (line,) = [line for line in (CLUSTER / name).read_text().splitlines() if "At most" in line]
    terms = re.findall(r"(\d+) x ([\d.]+)", line)
    total = sum(int(count) * float(price) for count, price in terms)
    hourly = hourly_price(read_cluster(CLUSTER / name))
    assert hourly is not None and hourly[1] in line and hourly[0] == pytest.approx(total)
    content = yaml.safe_load((CLUSTER / name).read_text())
    assert {int(count) for count, _ in terms} == {content["max_workers"], 1}


def test_versions_are_pinned_and_the_same_everywhere() -> None:
    pinned = constraints()
    wanted = {re.split(r"[\[;<>=! ]", r)[0].lower() for r in metadata.requires("zeroflow") or [] if "extra ==" not in r}
    assert wanted <= {name.lower() for name in pinned}
    images = {
        image
        for f in (*FILES, "Dockerfile")
        for image in re.findall(r"rayproject/ray:(\S+)", (CLUSTER / f).read_text())
    }
    assert images and {re.split("-", tag)[0] for tag in images} == {pinned["ray"]}
    job = list(yaml.safe_load_all((CLUSTER / "kuberay-job.yaml").read_text()))[1]
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == pinned["ray"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{a: 1, b", "no YAML"),
        ("[1, 2]", "expected one mapping"),
        ("cluster_name: z\nprovider: {type: awz}", "unknown provider type 'awz'; did you mean 'aws'"),
        (
            "cluster_name: z\nprovider: {type: local, head_ip: a, worker_ips: []}\nmax_wokers: 3",
            "'max_wokers' was unexpected",
        ),
        ("cluster_name: !!python/object/apply:os.system ['touch ran']\n", "no YAML"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_error(
    text: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(told)):
        read_cluster(Path("c.yaml"))
    assert not Path("ran").exists()
    with pytest.raises(ConfigError, match="cannot be read"):
        read_cluster(Path("none.yaml"))


# Kubernetes.


def test_the_kubernetes_file_is_what_kuberay_and_kubernetes_publish() -> None:
    import kubernetes_validate
    from jsonschema import Draft7Validator

    policy, job = yaml.safe_load_all((CLUSTER / "kuberay-job.yaml").read_text())
    schema = Draft7Validator(json.loads((Path(__file__).parent / "kuberay" / "rayjob-v1.json").read_text()))
    assert not [error.message for error in schema.iter_errors(job)]
    kubernetes_validate.validate(policy, "1.30", strict=True)
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    templates = [job["spec"]["submitterPodTemplate"], *(group["template"] for group in groups)]
    for template in templates:
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "z", **template["metadata"]},
            "spec": template["spec"],
        }
        kubernetes_validate.validate(pod, "1.30", strict=True)
        assert template["metadata"]["labels"].items() >= policy["spec"]["podSelector"]["matchLabels"].items()
    # They do find what is misspelt.
    wrong = copy.deepcopy(job)
    wrong["spec"]["rayClusterSpec"]["authOption"] = {}
    wrong["spec"]["submissionMode"] = "K8SJobMode"
    assert len(list(schema.iter_errors(wrong))) == 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**pod, "spec": {**pod["spec"], "volume": []}}, "1.30", strict=True)


# AWS.


def test_the_template_refuses_the_world() -> None:
    template = yaml.load((CLUSTER / "aws.yaml").read_text(), Loader=_Formation)
    pattern = template["Parameters"]["SshFrom"]["AllowedPattern"]
    assert re.fullmatch(pattern, "198.51.100.7/32") and not re.fullmatch(pattern, "0.0.0.0/0")


class _Formation(yaml.SafeLoader):
    """CloudFormation's short forms as plain text."""


_Formation.add_multi_constructor("!", lambda loader, suffix, node: f"{suffix} {getattr(node, 'value', '')}")


# The machine that a cluster is started from.


@pytest.mark.slow
def test_pack_takes_the_commit_and_a_token_that_nobody_else_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, clone = tmp_path / "home", tmp_path / "checkout"
    home.mkdir()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(clone)]
    shutil.copytree(CLUSTER, clone / "cluster", ignore=shutil.ignore_patterns("mount"))
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    subprocess.run(["sh", str(clone / "cluster" / "pack.sh")], check=True, capture_output=True, timeout=120)
    mount = clone / "cluster" / "mount"
    assert (mount / "auth_token").read_text() == (home / ".ray" / "auth_token").read_text() != ""
    assert {path.stat().st_mode & 0o077 for path in mount.iterdir()} == {0}
    subprocess.run(["git", "clone", "-q", str(mount / "zeroflow.bundle"), str(tmp_path / "there")], check=True)
    commits = [
        subprocess.run(["git", "-C", str(p), "rev-parse", "HEAD"], capture_output=True).stdout
        for p in (clone, tmp_path / "there")
    ]
    assert commits[0] == commits[1] != b""
