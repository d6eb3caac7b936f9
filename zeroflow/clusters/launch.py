"""What to know before a cluster is started: everything that would go wrong, and what the sweep will take and cost on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zeroflow.clusters.cluster_file import ClusterFile
from zeroflow.clusters.prices import grid_price, hourly_price
from zeroflow.data import datasets
from zeroflow.errors import ConfigError
from zeroflow.grid.grid_file import Grid
from zeroflow.grid.plan import Plan, make_plan
from zeroflow.results.store import Store


@dataclass(frozen=True)
class Launch:
    """What was found.

    Attributes:
        problems: a line each; nothing should be started before they are gone.
        facts: what else is worth knowing.
        plan: of the grid on the store that the cluster will write to; None: no grid was named, or no store is reached.
        hours: that the missing cells take on all machines that may come.
        cost: of that; each None: unknown.
        hourly: what the cluster costs at most in an hour, in the currency of the file's prices.
    """

    problems: Sequence[str]
    facts: Sequence[str]
    plan: Plan | None
    hours: float | None
    cost: float | None
    hourly: float | None


def check_launch(cluster: ClusterFile, grid: Grid | None, results: str | None, *, ask: bool = True) -> Launch:
    """Look at everything that a launch needs.

    Args:
        cluster: see ``read_cluster``.
        grid: what is to run; None: the cluster alone is looked at.
        results: the store; None: the folder of the grid's name in the file's ``ZEROFLOW_RESULTS``.
        ask: the account and the buckets; otherwise only files are read.
    """
    problems, facts = list(cluster.problems), []
    if hourly := hourly_price(cluster):
        facts.append(f"at most {hourly[1]} an hour on demand")
    if ask and cluster.kind == "aws":
        from zeroflow.clusters.aws import ask_account

        found = ask_account(cluster)
        problems += found.problems
        facts += found.facts
    root = results or cluster.setting("ZEROFLOW_RESULTS")
    plan = None
    if root and not results and grid:
        root = f"{root.rstrip('/')}/{grid.name}"
    if cluster.kind != "local" and (root is None or "://" not in root):
        problems.append(f"results {root!r}: would end with the machines; expected a bucket (s3://..., gs://...)")
    elif ask and root and "CHANGE-ME" not in root:
        try:
            store = Store(root)
            store.check_writable()
            facts.append(f"results {root}: can be written")
            plan = make_plan(grid, store, None, elsewhere=True) if grid else None
        except ConfigError as error:
            problems.append(str(error))
    source = cluster.setting("ZEROFLOW_DATA_SOURCE")
    if grid and ask:
        problems += _absent(grid, source)
    hours = cost = None
    if plan:
        facts.append(plan.describe(None))
        hours, cost = grid_price(plan, cluster)
        if hours is not None:
            facts.append(
                f"on all machines that may come: {hours:.1f} hours"
                + ("" if cost is None else f", {cost:,.2f} on demand at most")
            )
    return Launch(problems, facts, plan, hours, cost, hourly[0] if hourly else None)


def _absent(grid: Grid, source: str | None) -> list[str]:
    """The data sets of a grid that are not where machines will get them from."""
    import pyarrow as pa
    from pyarrow import fs

    wanted = {
        name: [str(path) for path in datasets.get(name).missing(Path("/"))]
        for name in sorted({c.dataset for c in grid.cells})
    }
    wanted = {name: paths for name, paths in wanted.items() if paths}
    if not wanted or (source and "CHANGE-ME" in source):
        return []
    if source is None:
        return [f"data set {name}: ZEROFLOW_DATA_SOURCE is empty, machines would not have it" for name in wanted]
    problems = []
    try:
        filesystem, base = fs.FileSystem.from_uri(source)
        for name, paths in wanted.items():
            found = filesystem.get_file_info([base + path for path in paths])
            if gone := [
                f"{source}{path}" for path, info in zip(paths, found, strict=True) if info.type == fs.FileType.NotFound
            ]:
                problems.append(f"data set {name}: missing {', '.join(gone)}. {datasets.get(name).where}")
    except (pa.ArrowException, OSError, ValueError) as error:
        problems.append(f"data {source!r}: cannot be read: {error}")
    return problems
