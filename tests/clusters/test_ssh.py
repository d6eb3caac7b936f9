"""The page on clusters, typed in: `ray up` over SSH, jobs with a token and without, results, `ray down`.

All of it in a little world of its own: namespaces of processes, network and mounts. So it takes the usual ports whatever else
runs here, sees and ends no process but its own, and is gone with its first one.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

import zeroflow.results
from zeroflow.grid.grid_file import load_grid

WORLD = ["unshare", "--pid", "--net", "--mount", "--ipc", "--fork", "--kill-child", "--mount-proc"]

GRID = """
base: {checkpoint: none, image_size: 7, tasks: 2, stop_after: 1}
grid: [{method: simplecil, class_order_seed: [%s]}]
placement: {gpus_per_worker: 0}
"""


def commands(name: str) -> str:
    """The commands of the page under a name."""
    page = (ROOT / "docs" / "cluster.md").read_text()
    (block,) = re.findall(rf"<!-- commands: {name} -->\n```bash\n(.*?)```", page, re.DOTALL)
    return str(block)


def why_not() -> str | None:
    if not (shutil.which("sshd") or Path("/usr/sbin/sshd").exists()):
        return "no SSH server is installed (openssh-server)"
    for program in ("ssh", "ssh-keygen", "rsync", "git", "ip"):
        if not shutil.which(program):
            return f"{program} is not installed"
    try:
        made = subprocess.run([*WORLD, "ip", "link", "set", "lo", "up"], capture_output=True, timeout=60)
    except OSError as error:
        return str(error)
    return None if made.returncode == 0 else f"no namespaces can be made here: {made.stderr.decode().strip()}"


SSHD = """
Port 22
ListenAddress 127.0.0.1
HostKey {home}/host_key
AuthorizedKeysFile {home}/.ssh/id_ed25519.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
Subsystem sftp internal-sftp
ForceCommand {home}/enter
PidFile none
"""

ENTER = """#!/bin/bash
# What an account of its own would be: another home.
export HOME={home} TMPDIR={home}/tmp
cd $HOME
exec bash -c "${{SSH_ORIGINAL_COMMAND:-bash}}"
"""

# `ray down` types `ray stop` on the head. Here it ends what end_ray.sh ends, by process ids, and is noted.
RAY = """#!/bin/sh
if [ "$1" = stop ]; then
    echo stop >>{home}/stopped
    exec sh {home}/zeroflow/cluster/end_ray.sh /tmp/zeroflow-ray
fi
exec {bin}/ray "$@"
"""

SCRIPT = """
set -eu
ip link set lo up
for folder in /tmp/zeroflow-ray /tmp/ray /run; do mkdir -p $folder; mount -t tmpfs tmpfs $folder; done
mkdir -p /run/sshd $TMPDIR
/usr/sbin/sshd -f $HOME/sshd_config -E $HOME/sshd.log
cd $HOME/checkout
python -c 'import socket; socket.create_connection(("127.0.0.1", 22), 10)'
said() {{ echo; echo "== $1"; }}
said listening-before; ss -Hltn | awk '{{print $4}}'
said up
{onprem}
said listening; ss -Hltn | awk '{{print $4}}'
said dashboard
({dashboard}) >$HOME/dashboard.log 2>&1 &
dashboard=$!
{export}
for try in $(seq 60); do ray job list >$HOME/list.log 2>&1 && break; sleep 1; done
said submit
{submit}
said refused
if RAY_AUTH_MODE=disabled ray job submit -- touch $HOME/unasked >$HOME/refused.log 2>&1; then echo "not refused"; fi
python - <<'END'
import json, urllib.error, urllib.request
for headers in ({{}}, {{"Authorization": "Bearer wrong"}}):
    job = json.dumps({{"entrypoint": "touch $HOME/unasked"}}).encode()
    request = urllib.request.Request("http://127.0.0.1:8265/api/jobs/", job, {{"Content-Type": "application/json", **headers}})
    try:
        urllib.request.urlopen(request)
        print("not refused")
    except urllib.error.HTTPError as error:
        print(error.code)
END
tail -n 3 $HOME/refused.log
said submit-here
{submit_here}
said results
{results}
kill $dashboard
said down
{down}
cat $HOME/stopped
said left
for try in $(seq 20); do pgrep -x raylet >/dev/null || break; sleep 0.5; done
pgrep -l raylet || pgrep -l gcs_server || echo nothing
"""


@pytest.fixture
def home() -> Iterator[Path]:
    """A home folder with a short name: those of sockets have little room."""
    folder = Path(tempfile.mkdtemp(prefix="zf"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def checked_out(home: Path) -> tuple[Path, str]:
    """A checkout as a user edits it, and its commit: a grid of two small cells under the name of the big one."""
    checkout = home / "checkout"
    checkout.mkdir()
    for name in ("zeroflow", "sweeps", "cluster"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__", "mount"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, checkout / name)
    grid = checkout / "sweeps" / "full_grid.yaml"
    grid.write_text(GRID % "1")
    file = checkout / "cluster" / "onprem.yaml"
    text = file.read_text().replace("head_ip: CHANGE-ME", "head_ip: 127.0.0.1").replace("[CHANGE-ME]", "[]")
    # SSH asks for the home folder elsewhere than in the environment.
    file.write_text(text.replace("ssh_user: CHANGE-ME", "ssh_user: root").replace("~/.ssh", f"{home}/.ssh"))
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(checkout)]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    (checkout / "sweeps" / "quick.yaml").write_text(GRID % "2")  # not committed: goes along with an upload alone
    return checkout, commit


def with_ssh(home: Path) -> str:
    """Keys, a server's settings and programs in a home; the path that finds them."""
    bin_folder = Path(sys.executable).parent
    (home / ".ssh").mkdir(mode=0o700)
    for key in (home / "host_key", home / ".ssh" / "id_ed25519"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    shims = home / "shims"
    shims.mkdir()
    path = f"{shims}:{bin_folder}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
    for name, content in {
        "sshd_config": SSHD,
        "enter": ENTER,
        "shims/ray": RAY,
        ".bash_profile": f"export PATH={path}\n",
        ".bashrc": "",
    }.items():
        (home / name).write_text(content.format(home=home, bin=bin_folder))
        (home / name).chmod(0o755)
    (home / "zeroflow-venv").symlink_to(bin_folder.parent)  # installed there already
    return path.removeprefix(f"{shims}:")


def script_of(home: Path) -> str:
    """The page's commands, with this machine in place of the cluster."""

    def here(name: str) -> str:
        return textwrap.dedent(
            commands(name)
            .replace("cluster/gpu.yaml", "cluster/onprem.yaml")
            .replace("s3://my-zeroflow/runs", f"{home}/zeroflow-runs")
        )

    export, submit = here("submit").split("\n", 1)
    return SCRIPT.format(
        onprem=here("onprem"),
        dashboard=here("dashboard"),
        export=export,
        submit=submit,
        submit_here=here("submit-here"),
        results=here("results"),
        down=here("down"),
    )


def run_in_a_world(home: Path, script: str, path: str) -> tuple[int, str]:
    """The exit status and the output of a script where addresses, processes and files are its own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHON", "ZEROFLOW_"))}
    kept["PATH"] = path
    environment = {
        **kept,
        "HOME": str(home),
        "TMPDIR": f"{home}/tmp",
        "OMP_NUM_THREADS": "1",
        "TERM": "dumb",
        "PYTHONPATH": str(ROOT),
    }
    log = home / "log"
    with log.open("w") as file_of_log:
        world = subprocess.Popen(
            [*WORLD, "bash", "-c", script],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file_of_log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        world.wait(timeout=300)
    except subprocess.TimeoutExpired:
        pytest.fail(f"it hangs: {log.read_text()}")
    finally:
        if world.poll() is None:
            os.killpg(world.pid, signal.SIGKILL)
    return world.returncode, log.read_text()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(bool(why_not()), reason=str(why_not()))
def test_the_page_from_up_to_down(home: Path) -> None:
    checkout, commit = checked_out(home)
    path = with_ssh(home)
    status, output = run_in_a_world(home, script_of(home), path)
    parts = {part.split("\n", 1)[0]: part.split("\n", 1)[1] for part in output.split("\n== ")[1:]}
    assert status == 0, output

    # One door, and its key.
    assert parts["listening-before"].split() == ["127.0.0.1:22"]
    assert "*:8265" not in parts["listening"] and re.search(r"^127\.0\.0\.1:8265$", parts["listening"], re.MULTILINE)
    assert "not refused" not in parts["refused"] and not (home / "unasked").exists()
    assert parts["refused"].split()[:2] == ["401", "403"] and "oken" in parts["refused"], parts["refused"]
    # Both ways of submission, each with its commit, in one place.
    for name, expected, seed in (("full_grid", commit, 1), ("quick", f"{commit}-dirty", 2)):
        trials = zeroflow.results.load(home / "zeroflow-runs" / name, "trials").to_pylist()
        assert [t["git_commit"] for t in trials] == [expected.removesuffix("-dirty")], (trials, output)
        assert [t["class_order_seed"] for t in trials] == [seed]
    cells = {config.cell_id for config in load_grid(checkout / "sweeps" / "full_grid.yaml").cells}
    assert set(zeroflow.results.load(home / "zeroflow-runs" / "full_grid", "trials")["cell_id"].to_pylist()) == cells
    assert (checkout / "report.html").stat().st_size > 10_000
    token = (home / ".ray" / "auth_token").read_text()
    written = [p for p in (home / "zeroflow-runs").rglob("*") if p.is_file()]
    assert token and not any(token.encode() in p.read_bytes() for p in written) and token not in output
    assert "stop" in parts["down"] and parts["left"].strip() == "nothing", output
