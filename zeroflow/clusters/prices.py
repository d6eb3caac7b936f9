"""What a cluster costs: the most in an hour, and for what is missing of a grid."""

from __future__ import annotations

from typing import Any

from zeroflow.clusters.cluster_file import ClusterFile, Machines
from zeroflow.grid.plan import Plan


def hourly_price(cluster: ClusterFile) -> tuple[float, str] | None:
    """What a cluster costs at most in an hour on demand.

    Returns:
        The price, and the sum that it is as a string; None: the file does not say all prices.
    """
    prices = cluster.metadata.get("prices") or {}
    if not cluster.machines or any(machines.type not in prices for machines in cluster.machines):
        return None
    head, *workers = cluster.machines
    left, terms = int(cluster.config["max_workers"]), [(1, float(prices[head.type]))]
    for kind in sorted(workers, key=lambda kind: -prices[kind.type]):
        taken = min(kind.count, left)
        left -= taken
        if taken:
            terms.append((taken, float(prices[kind.type])))
    total = sum(count * price for count, price in terms)
    words = " + ".join(f"{count} x {price:g}" for count, price in reversed(terms))
    return total, f"{words} = {total:.2f}"


def grid_price(plan: Plan, cluster: ClusterFile) -> tuple[float | None, float | None]:
    """What the missing cells of a plan take and cost on demand, the head included.

    Returns:
        Hours on all machines that may come, and their price; each None where it is unknown.
    """
    prices: dict[str, Any] = dict(cluster.metadata.get("prices") or {})
    workers: list[Machines] = [m for m in cluster.machines[1:] if m.count]
    if plan.estimate.seconds is None or not workers:
        return None, None
    worker = max(workers, key=lambda m: prices.get(m.type, 0.0))
    gpus, cpus = worker.resources.get("GPU", 0), worker.resources.get("CPU", 1)
    machine_hours = plan.estimate.gpu_hours / gpus if gpus else 0.0
    machine_hours += plan.estimate.cpu_hours / (gpus or cpus)  # what ran without a GPU so far takes a whole one there
    hours = machine_hours / min(int(cluster.config["max_workers"]), sum(m.count for m in workers))
    if worker.type not in prices:
        return hours, None
    return hours, machine_hours * float(prices[worker.type]) + hours * float(prices.get(cluster.machines[0].type, 0.0))
