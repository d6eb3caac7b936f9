"""The blocks of ``findings.md``: what the small grids found, with intervals, from the stores that hold them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zeroflow.results import load
from zeroflow.results.tables import BASELINE, Estimate, estimate

Cell = dict[str, Any]
Key = tuple[Any, ...]
NOT_RUN = "Not run yet: `python sweeps/full_grid.py --grid sweeps/{name}.yaml --results results/{name}`.\n"

NAMES = {
    "method": "method", "optimizer": "optimizer", "queries": "q", "epochs": "epochs", "hybrid_epochs": "exact epochs",
    "history": "history", "sparsity": "sparsity", "lr": "lr", "access": "access", "loss": "loss", "tune": "tune", "start": "head from",
}  # fmt: skip
USUAL = {"access": "white-box", "loss": "cross-entropy", "start": "class means"}


@dataclass(frozen=True)
class Group:
    """The cells of one configuration by seed; ``values``: of the keys that tell it from others."""

    values: Mapping[str, Any]
    seeds: Mapping[int, Cell]

    def estimate(self, metric: str) -> Estimate:
        return estimate([cell[metric] for cell in self.seeds.values()])

    def minus(self, other: Group, metric: str = "avg") -> Estimate | None:
        """The difference seed by seed; a method that does not train is the same whatever the seed."""
        own = self.seeds.keys()
        if len(other.seeds) == 1:
            (fixed,) = other.seeds.values()
            return estimate([self.seeds[seed][metric] - fixed[metric] for seed in own])
        both = own & other.seeds.keys()
        pairs = [(self.seeds[seed][metric], other.seeds[seed][metric]) for seed in sorted(both)]
        return estimate([mine - theirs for mine, theirs in pairs]) if pairs else None


def groups(store: Path, keys: Sequence[str]) -> list[Group]:
    """The finished cells of a store by some keys of their configuration, in the order of those."""
    found: dict[Key, dict[int, Cell]] = {}
    for cell in load(store, "trials").to_pylist():
        options = json.loads(cell["optimizer_options"] or "{}")
        cell |= {"history": options.get("history", 0.0), "sparsity": options.get("sparsity", 0.0)}
        method = json.loads(cell["method_options"] or "{}")
        cell |= {"tune": method.get("tune"), "start": "random" if method.get("imprint") is False else None}
        found.setdefault(tuple(cell[key] for key in keys), {})[cell["seed"]] = cell
    ordered = sorted(
        found.items(),
        key=lambda item: [
            (value is not None, value or 0) if not isinstance(value, str) else (True, value) for value in item[0]
        ],
    )
    return [Group(dict(zip(keys, key, strict=True)), seeds) for key, seeds in ordered]


def signed(value: Estimate | None) -> str:
    return "-" if value is None else ("+" if value.mean >= 0 else "") + str(value)


def verdict(value: Estimate | None) -> str:
    """Whether a difference is told from none by its 95 % interval."""
    if value is None or value.half_width is None:
        return "-"
    if abs(value.mean) <= value.half_width:
        return "none told"
    return "gain" if value.mean > 0 else "loss"


def compared(
    results: Path,
    name: str,
    keys: Sequence[str],
    references: Mapping[str, Callable[[Mapping[str, Any]], Mapping[str, Any]]],
) -> str:
    """A table of a small grid: accuracies, the gain over SimpleCIL, and what each row has over its references.

    SimpleCIL is the one on the backbone as it was reached for the row.

    Args:
        results: where stores are. name: of the grid. keys: that tell rows apart.
        references: by heading: from a row's keys to those of the row it is held against.
    """
    store = results / name
    if not (store / "trials").is_dir():
        return NOT_RUN.format(name=name)
    found = groups(store, ["method", *(key for key in keys if key != "method")])
    baselines = {group.values.get("access"): group for group in found if group.values["method"] == BASELINE}
    by_key = {tuple(group.values.items()): group for group in found}
    heads = [NAMES[key] for key in keys]
    lines = [
        f"| {' | '.join([*heads, 'n', 'Avg', 'Last', 'Fgt'])} | over SimpleCIL | told? | "
        + " | ".join(f"{head} | told?" for head in references) + (" | " if references else "") + "forward-equivalents |",
        f"|{'---|' * len(heads)}---:|---:|---:|---:|---:|---|" + "---:|---|" * len(references) + "---:|",
    ]  # fmt: skip
    verdicts: dict[str, list[str]] = {"over SimpleCIL": [], **{head: [] for head in references}}
    label = "method" if "method" in keys else keys[0]
    for baseline in baselines.values():
        metrics = [str(baseline.estimate(metric)) for metric in ("avg", "last", "fgt")]
        own = {"access": _text("access", baseline.values.get("access")), label: "SimpleCIL"}
        cells = [*(own.get(key, "") for key in keys), "1", *metrics, *[""] * (2 + 2 * len(references)), "0"]
        lines.append(f"| {' | '.join(cells)} |")
    for group in found:
        if group.values["method"] == BASELINE:
            continue
        over = group.minus(baselines[access]) if (access := group.values.get("access")) in baselines else None
        cells = [_text(key, group.values[key]) for key in keys]
        cells += [str(len(group.seeds)), *(str(group.estimate(metric)) for metric in ("avg", "last", "fgt"))]
        cells += [signed(over), verdict(over)]
        verdicts["over SimpleCIL"].append(verdict(over))
        for head, reference in references.items():
            other = by_key.get(tuple({**group.values, **reference(group.values)}.items()))
            difference = group.minus(other) if other and other is not group else None
            cells += [signed(difference), verdict(difference)]
            verdicts[head].append(verdict(difference))
        cells.append(f"{group.estimate('forward_equivalents').mean:,.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([_counted(verdicts), "", *lines, "", source(results, name)])


def _counted(verdicts: Mapping[str, Sequence[str]]) -> str:
    """How many rows gain and lose in each comparison, as one line."""
    parts = []
    for head, found in verdicts.items():
        told = [each for each in found if each != "-"]
        if told:
            counts = [f"{told.count(each)} {word}" for each, word in (("gain", "gain"), ("loss", "lose"), ("none told", "not told"))]  # fmt: skip
            parts.append(f"{head}: of {len(told)} rows {', '.join(counts)}")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def source(results: Path, name: str) -> str:
    trials = load(results / name, "trials").to_pylist()
    commits = sorted({(row["git_commit"] or "unknown")[:10] + ("+" if row["git_dirty"] else "") for row in trials})
    return (
        f"{len(trials)} cells: `python sweeps/full_grid.py --grid sweeps/{name}.yaml --results results/{name}`; commit "
        f"{', '.join(commits)}.\n"
    )


def _text(key: str, value: Any) -> str:
    return USUAL.get(key, "-") if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def share_of_first_order(results: Path) -> str:
    """How much of what first order gains over no training each forward-pass optimizer gains, as sentences."""
    store = results / "table1_quickdraw"
    if not (store / "trials").is_dir():
        return NOT_RUN.format(name="table1_quickdraw")
    found = groups(store, ["method", "optimizer"])
    baseline = next(group for group in found if group.values["method"] == BASELINE)
    lines = []
    for method in dict.fromkeys(group.values["method"] for group in found):
        own = {group.values["optimizer"]: group.minus(baseline) for group in found if group.values["method"] == method}
        exact = {name: gain for name, gain in own.items() if name and name.startswith("fo-") and gain}
        forward = {name: gain for name, gain in own.items() if name and not name.startswith("fo-") and gain}
        if not exact or not forward:
            continue
        best, first = max(forward, key=lambda name: forward[name].mean), max(exact, key=lambda name: exact[name].mean)
        told = [name for name, gain in forward.items() if verdict(gain) == "gain"]
        worse = [name for name, gain in forward.items() if verdict(gain) == "loss"]
        gain, whole = forward[best].mean, exact[first].mean
        lines.append(
            f"- {method}: first order gains {signed(exact[first])} points of Avg over SimpleCIL ({first}); the best forward-pass "
            f"optimizer, {best}, {signed(forward[best])}"
            + (f", {100 * gain / whole:.0f} % of it" if whole > 0 and gain > 0 else "")
            + f". Of {len(forward)} forward-pass optimizers {len(told)} gain ({', '.join(told) or 'none'}), {len(worse)} lose "
            f"({', '.join(worse) or 'none'}), and {len(forward) - len(told) - len(worse)} cannot be told from no training."
        )
    return "\n".join([*lines, ""])


def blocks(results: Callable[[], Path]) -> dict[str, Callable[[], str]]:
    """The blocks by name; ``results``: where the stores are."""

    def first_order(values: Mapping[str, Any]) -> dict[str, Any]:
        return {"optimizer": "fo-sgd", **({"queries": None} if "queries" in values else {})}

    def fewest(values: Mapping[str, Any]) -> dict[str, Any]:
        return {"queries": 1}

    return {
        "findings-optimizers": lambda: compared(
            results(), "table1_quickdraw", ["method", "optimizer"], {"over fo-sgd": first_order}
        ),
        "findings-share": lambda: share_of_first_order(results()),
        "findings-queries": lambda: compared(
            results(), "figure5_quickdraw", ["optimizer", "epochs", "queries"], {"over q = 1": fewest}
        ),
        "findings-history": lambda: compared(
            results(), "table3_quickdraw", ["optimizer", "history"], {"over no history": lambda values: {"history": 0.0}}
        ),
        "findings-sparsity": lambda: compared(
            results(), "table4_quickdraw", ["optimizer", "sparsity"], {"over dense": lambda values: {"sparsity": 0.0}}
        ),
        "findings-hybrid": lambda: compared(
            results(), "hybrid_quickdraw", ["optimizer", "epochs", "hybrid_epochs"],
            {
                "over first order, as many epochs": lambda values: {"optimizer": "fo-sgd", "hybrid_epochs": 0},
                "over its exact epochs alone": lambda values: {
                    "optimizer": "fo-sgd", "hybrid_epochs": 0, "epochs": values["hybrid_epochs"],
                },
            },
        ),
        "findings-families": lambda: compared(
            results(), "families_quickdraw", ["method", "optimizer"], {"over fo-sgd": first_order}
        ),
        "findings-black-box": lambda: compared(results(), "blackbox_quickdraw", ["method", "tune", "start", "optimizer", "access"], {}),
        "findings-int8": lambda: compared(
            results(), "int8_quickdraw", ["access", "method", "optimizer"], {"over float": lambda values: {"access": None}}
        ),
        "findings-nondifferentiable": lambda: compared(
            results(), "nondifferentiable_quickdraw", ["access", "loss", "method", "optimizer"], {"over fo-sgd": first_order}
        ),
    }  # fmt: skip
