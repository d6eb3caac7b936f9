"""The blocks of ``findings.md``: what the small grids found, with intervals, from the stores that hold them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zeroflow.classifiers import classifiers
from zeroflow.methods import methods
from zeroflow.methods.closed_form import NAMED
from zeroflow.results import load
from zeroflow.results.estimates import Estimate, estimate, holm
from zeroflow.results.rendering import SPACED, Column, Table, markdown_grid, words
from zeroflow.results.summary import BASELINE, is_baseline

Cell = dict[str, Any]
Key = tuple[Any, ...]
LEVEL = 0.05
NOT_RUN = "Not run yet: `python sweeps/full_grid.py --grid sweeps/{name}.yaml --results results/{name}`.\n"

NAMES = {
    "method": "method", "optimizer": "optimizer", "queries": "q", "epochs": "epochs", "hybrid_epochs": "exact epochs",
    "history": "history", "sparsity": "sparsity", "lr": "lr", "access": "access", "loss": "loss", "tune": "tune", "start": "head from",
    "schedule": "schedule", "sign": "sign", "history_of": "history of", "classifier": "classifier", "dataset": "data set", "subspace": "subspace", "class_order_seed": "class order",
    "trainable_parameters": "values trained", "forward_passes": "forward passes", "forward_equivalents": "forward-equivalents",
}  # fmt: skip
USUAL = {"access": "white-box", "loss": "cross-entropy", "start": "class means"}


@dataclass(frozen=True)
class Group:
    """The cells of one configuration by seed; ``values``: of the keys that tell it from others."""

    values: Mapping[str, Any]
    seeds: Mapping[int, Cell]  # or whatever the replicates are

    @property
    def is_baseline(self) -> bool:
        """Whether it is SimpleCIL with class means."""
        return is_baseline(self.values)

    @property
    def fixed(self) -> bool:
        """Whether it is the same whatever the seed."""
        cell = next(iter(self.seeds.values()))
        build = methods.get(cell["method"]).build
        return not build.trains and not classifiers.get(cell["classifier"] or str(build.own_classifier)).draws

    def estimate(self, metric: str) -> Estimate:
        return estimate([cell[metric] for cell in self.seeds.values()])

    def minus(self, other: Group, metric: str = "avg") -> Estimate | None:
        """The difference seed by seed; what neither trains nor draws is the same whatever the seed."""
        own = self.seeds.keys()
        if len(other.seeds) == 1 and other.fixed:
            (fixed,) = other.seeds.values()
            return estimate([self.seeds[seed][metric] - fixed[metric] for seed in own])
        both = own & other.seeds.keys()
        pairs = [(self.seeds[seed][metric], other.seeds[seed][metric]) for seed in sorted(both)]
        return estimate([mine - theirs for mine, theirs in pairs]) if pairs else None


def groups(store: Path, keys: Sequence[str], replicate: str = "seed") -> list[Group]:
    """The finished cells of a store by some keys of their configuration, in the order of those.

    Args:
        store: the folder of a store.
        keys: of the configuration, which tell groups apart.
        replicate: the key that intervals are over.
    """
    found: dict[Key, dict[int, Cell]] = {}
    for cell in load(store, "trials").to_pylist():
        options = json.loads(cell["optimizer_options"] or "{}")
        cell |= {"history": options.get("history", 0.0), "sparsity": options.get("sparsity", 0.0)}
        cell |= {key: options.get(key) for key in ("sign", "history_of")}
        method = json.loads(cell["method_options"] or "{}")
        cell |= {"tune": method.get("tune"), "start": "random" if method.get("imprint") is False else None}
        cell |= {"subspace": method.get("subspace")}
        replicates = found.setdefault(tuple(cell[key] for key in keys), {})
        if cell[replicate] in replicates:
            raise ValueError(f"{store}: two cells with {replicate}={cell[replicate]} and alike in {', '.join(keys)}")
        replicates[cell[replicate]] = cell
    ordered = sorted(
        found.items(),
        key=lambda item: [
            (value is not None, value or 0) if not isinstance(value, str) else (True, value) for value in item[0]
        ],
    )
    return [Group(dict(zip(keys, key, strict=True)), seeds) for key, seeds in ordered]


def signed(value: Estimate | None) -> str:
    return "-" if value is None else ("+" if value.mean >= 0 else "") + str(value)


def verdicts(differences: Sequence[Estimate | None]) -> list[str]:
    """``gain``, ``loss`` or ``n.s.`` for each, at the 5 % level with Holm's correction for their number; ``-``: no interval."""
    tested = {number: d.p_value for number, d in enumerate(differences) if d and d.p_value is not None}
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    found = []
    for number, difference in enumerate(differences):
        if difference is None or number not in adjusted:
            found.append("-")
        elif adjusted[number] >= LEVEL:
            found.append("n.s.")
        else:
            found.append("gain" if difference.mean > 0 else "loss")
    return found


def compared(
    results: Path,
    name: str,
    keys: Sequence[str],
    references: Mapping[str, Callable[[Mapping[str, Any]], Mapping[str, Any]]],
    where: Callable[[Mapping[str, Any]], bool] = lambda values: True,
    costs: Sequence[str] = ("forward_equivalents",),
    by_accuracy: bool = False,
    replicate: str = "seed",
) -> str:
    """A table of a small grid: accuracies, the gain over SimpleCIL, and what each row has over its references.

    SimpleCIL is the one on the backbone as it was reached for the row.

    Args:
        results: where stores are.
        name: of the grid.
        keys: that tell rows apart.
        references: by heading: from a row's keys to those of the row it is held against.
        where: which rows, by their keys.
        costs: the columns at the end, means over seeds.
        by_accuracy: the best row first.
        replicate: see ``groups``.
    """
    store = results / name
    if not (store / "trials").is_dir():
        return NOT_RUN.format(name=name)
    found = [
        group
        for group in groups(store, ["method", *(key for key in keys if key != "method")], replicate)
        if where(group.values)
    ]
    baselines = {_problem(group): group for group in found if group.is_baseline}
    rows = [group for group in found if not group.is_baseline]
    if by_accuracy:
        rows.sort(key=lambda row: -row.estimate("avg").mean)
    by_key = {tuple(group.values.items()): group for group in found}
    differences: dict[str, list[Estimate | None]] = {
        "over SimpleCIL": [row.minus(baselines[_problem(row)]) if _problem(row) in baselines else None for row in rows]
    }
    for head, reference in references.items():
        others = [by_key.get(tuple({**row.values, **reference(row.values)}.items())) for row in rows]
        differences[head] = [
            row.minus(other) if other and other is not row else None for row, other in zip(rows, others, strict=True)
        ]
    judged = {head: verdicts(found) for head, found in differences.items()}
    heads = [NAMES[key] for key in keys]
    gains = [column for head in differences for column in (Column(head), *words(""))]
    columns = [*words(*heads), "n", "Avg", "Last", "Fgt", *gains, *(NAMES[cost] for cost in costs)]
    lines = []
    label = "method" if "method" in keys else keys[0]
    for baseline in baselines.values():
        own = {key: _text(key, baseline.values.get(key)) for key in ("access", "dataset")} | {label: "SimpleCIL"}
        first = [own.get(key, "") for key in keys]
        lines.append([*first, *_accuracies(baseline), *["", ""] * len(differences), *_costs(baseline, costs)])
    for number, row in enumerate(rows):
        gained = [part for head in differences for part in (signed(differences[head][number]), judged[head][number])]
        lines.append([*(_shown(row, key) for key in keys), *_accuracies(row), *gained, *_costs(row, costs)])
    grid = markdown_grid(Table.of(columns, lines), SPACED)
    return "\n".join([_counted(judged), "", grid, "", source(results, name)])


def _shown(row: Group, key: str) -> str:
    """What a row's cell says of a key; what trains nothing has no loss."""
    return "-" if key == "loss" and row.values.get("optimizer") is None else _text(key, row.values[key])


def _problem(group: Group) -> tuple[Any, ...]:
    return group.values.get("access"), group.values.get("dataset")


def _accuracies(group: Group) -> list[str]:
    return [str(len(group.seeds)), *(str(group.estimate(metric)) for metric in ("avg", "last", "fgt"))]


def _costs(group: Group, costs: Sequence[str]) -> list[str]:
    return [f"{group.estimate(cost).mean:,.0f}" for cost in costs]


def _counted(judged: Mapping[str, Sequence[str]]) -> str:
    """How many rows gain and lose in each comparison, as one line."""
    parts = []
    for head, found in judged.items():
        tested = [each for each in found if each != "-"]
        if tested:
            words = {"gain": "gain", "loss": "lose", "n.s.": "n.s."}
            parts.append(
                f"{head}: of {len(tested)} rows {', '.join(f'{tested.count(each)} {word}' for each, word in words.items())}"
            )
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}".rstrip(".") + "." if text else ""


def source(results: Path, name: str) -> str:
    trials = load(results / name, "trials").to_pylist()
    commits = sorted({(row["git_commit"] or "unknown")[:10] + ("+" if row["git_dirty"] else "") for row in trials})
    return (
        f"{len(trials)} cells: `python sweeps/full_grid.py --grid sweeps/{name}.yaml --results results/{name}`; commit "
        f"{', '.join(commits)}.\n"
    )


def _text(key: str, value: Any) -> str:
    return USUAL.get(key, "-") if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def untrained(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of a row's keys those of the row without training that classifies alike; a head of one's own has none."""
    own = values.get("classifier") or methods.get(values["method"]).build.own_classifier
    return {**dict.fromkeys(values), "method": NAMED.get(own) if own else None, "dataset": values.get("dataset")}


Gains = dict[tuple[Any, Key], Estimate | None]


def shift_gains(store: Path) -> tuple[Gains, Gains, dict[Any, Group]]:
    """Gains in Avg by stream and row, of the rows that were run on every stream.

    Over SimpleCIL, and what training adds to the same classifier on frozen features (None: nothing is trained); and SimpleCIL
    by stream.
    """
    found = groups(store, ["dataset", "method", "classifier", "optimizer"])
    by_key = {tuple(group.values.values()): group for group in found}
    rows = dict.fromkeys(key[1:] for key in by_key)
    wanted = [key for key in rows if key[0] != BASELINE and all((data, *key) in by_key for data in _streams(found))]
    gains, trained = {}, {}
    for data in _streams(found):
        for key in wanted:
            group = by_key[data, *key]
            gains[data, key] = group.minus(by_key[data, BASELINE, None, None])
            reference = by_key.get(tuple(untrained(group.values).values()))
            trained[data, key] = group.minus(reference) if key[2] and reference else None
    return gains, trained, {data: by_key[data, BASELINE, None, None] for data in _streams(found)}


def shifts(results: Path, name: str) -> str:
    """What some rows gain on every stream: over SimpleCIL, and training over none with the same classifier."""
    if not (results / name / "trials").is_dir():
        return NOT_RUN.format(name=name)
    gains, trained, bases = shift_gains(results / name)
    wanted = list(dict.fromkeys(key for _, key in gains))
    judged = dict(zip(gains, verdicts(list(gains.values())), strict=True))
    judged_training = dict(zip(trained, verdicts(list(trained.values())), strict=True))
    heads = [" ".join(filter(None, key)) for key in wanted]
    lines, own = [], []
    for data, group in bases.items():
        lines.append([data, group.estimate("avg"), *(_marked(gains[data, key], judged[data, key]) for key in wanted)])
    learned = [key for key in wanted if key[2]]
    for data in bases:
        own.append([data, *(_marked(trained[data, key], judged_training[data, key]) for key in learned)])
    first = markdown_grid(Table.of([*words("stream"), "SimpleCIL", *heads], lines), SPACED)
    second = markdown_grid(Table.of([*words("stream"), *(" ".join(filter(None, key)) for key in learned)], own), SPACED)
    return "\n".join(
        ["Gain in Avg over SimpleCIL:", "", first, "", "Of it, what training adds to the same classifier on frozen features:", "", second, "", source(results, name)]
    )  # fmt: skip


def _streams(found: Sequence[Group]) -> list[str]:
    return sorted({group.values["dataset"] for group in found})


def _marked(gain: Estimate | None, verdict: str) -> str:
    return (
        "-"
        if gain is None
        else signed(gain) + {"gain": " **gain**", "loss": " **loss**", "n.s.": " n.s."}.get(verdict, "")
    )


def share_of_first_order(results: Path) -> str:
    """How much of what first order gains over no training each forward-pass optimizer gains, as sentences."""
    store = results / "table1_quickdraw"
    if not (store / "trials").is_dir():
        return NOT_RUN.format(name="table1_quickdraw")
    found = groups(store, ["method", "optimizer"])
    baseline = next(group for group in found if group.values["method"] == BASELINE)
    gains = {
        (group.values["method"], group.values["optimizer"]): group.minus(baseline)
        for group in found
        if group is not baseline
    }
    judged = dict(zip(gains, verdicts(list(gains.values())), strict=True))  # of the whole table, as there
    lines = []
    for method in dict.fromkeys(method for method, _ in gains):
        own = {optimizer: gain for (trained, optimizer), gain in gains.items() if trained == method}
        exact = {name: gain for name, gain in own.items() if name.startswith("fo-") and gain}
        forward = {name: gain for name, gain in own.items() if not name.startswith("fo-") and gain}
        if not exact or not forward:
            continue
        best, first = max(forward, key=lambda name: forward[name].mean), max(exact, key=lambda name: exact[name].mean)
        gained = [name for name in forward if judged[method, name] == "gain"]
        worse = [name for name in forward if judged[method, name] == "loss"]
        gain, whole = forward[best].mean, exact[first].mean
        lines.append(
            f"- {method}: first order has {signed(exact[first])} points of Avg over SimpleCIL ({first}, {judged[method, first]}); the best forward-pass "
            f"optimizer, {best}, {signed(forward[best])} ({judged[method, best]})"
            + (f", {100 * gain / whole:.0f} % of it" if whole > 0 and gain > 0 else "")
            + f". Of {len(forward)} forward-pass optimizers {len(gained)} gain ({', '.join(gained) or 'none'}), {len(worse)} lose "
            f"({', '.join(worse) or 'none'}), and {len(forward) - len(gained) - len(worse)} do not differ significantly from no training."
        )
    return "\n".join([*lines, ""])


def blocks(results: Callable[[], Path]) -> dict[str, Callable[[], str]]:
    """The blocks by name; ``results``: where the stores are."""

    def first_order(values: Mapping[str, Any]) -> dict[str, Any]:
        return {"optimizer": "fo-sgd", **({"queries": None} if "queries" in values else {})}

    def fewest(values: Mapping[str, Any]) -> dict[str, Any]:
        return {"queries": 1}

    few = ("trainable_parameters", "forward_passes", "forward_equivalents")
    return {
        "findings-forward-only": lambda: compared(
            results(), "forward_only", ["method", "classifier", "optimizer", "dataset"], {"over no training, same classifier": untrained},
            where=lambda values: values["dataset"] == "quickdraw100-marker", costs=few, by_accuracy=True,
        ),
        "findings-shifts": lambda: shifts(results(), "forward_only"),
        "findings-class-orders": lambda: compared(
            results(), "class_orders", ["method", "classifier", "optimizer"], {}, by_accuracy=True, replicate="class_order_seed",
        ),
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
        "findings-authors": lambda: compared(
            results(), "authors_quickdraw", ["optimizer", "schedule", "sign", "history", "history_of"],
            {
                "over the paper's schedule, sign or history": lambda values: (
                    {"history_of": None} if values["history"] else {"schedule": "cosine", "sign": None}
                )
            },
        ),
        "findings-black-box": lambda: compared(results(), "blackbox_quickdraw", ["method", "tune", "start", "optimizer", "access"], {}),
        "findings-int8": lambda: compared(
            results(), "int8_quickdraw", ["access", "method", "optimizer"], {"over float": lambda values: {"access": None}}
        ),
        "findings-nondifferentiable": lambda: compared(
            results(), "nondifferentiable_quickdraw", ["access", "loss", "method", "optimizer"], {"over fo-sgd": first_order}
        ),
    }  # fmt: skip
