"""The table a reader looks at first: a row per configuration, averaged over seeds, with what it cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from zeroflow.results.differences import DEFAULT, USUAL, Differences, named
from zeroflow.results.estimates import Estimate, measured
from zeroflow.results.rendering import EXPLICIT, Cell, Column, Mark, Table, escape_bars, markdown_grid, text_grid
from zeroflow.results.schema import CONFIG_KEYS, SCHEMAS
from zeroflow.trial.config import branched

BASELINE = "simplecil"

_MEASURED = (
    "avg",
    "last",
    "fgt",
    "trainable_parameters",
    "forward_passes",
    "forward_equivalents",
    "peak_memory_bytes",
    "seconds",
)
FILTERS = ("dataset", "method", "optimizer", "queries")
"""The keys that a reader of a report filters by."""

_ALWAYS_SHOWN = ("method", "optimizer", "queries")
PROBLEM = (
    "dataset", "transform", "image_size", "tasks", "base_classes", "increments", "class_order_seed", "fixed_class_order",
    "stop_after", "validation", "backbone", "checkpoint", "dtype", "access", "preprocessing",
)  # fmt: skip
"""Accuracies are comparable only where all of these agree."""


@dataclass(frozen=True)
class Row:
    """A configuration over its seeds.

    Attributes:
        config: every key but the seed.
        shown: the keys that tell this row from others, and those that are always shown, as text.
        unnamed: of these, what a label leaves out, since all rows have it.
        cells: ids, by seed.
        avg: percent.
        last: percent.
        fgt: percent.
        vs_simplecil: Avg minus that of SimpleCIL on the same problem, percentage points; None where there is none, and
            for SimpleCIL itself.
        trainable_parameters: values trained in a task, mean over cells; None where there is none.
        forward_passes: mean over cells, or None.
        forward_equivalents: mean over cells, or None.
        peak_memory: MiB of a training step, mean over cells, or None.
        seconds: mean over cells, or None.
    """

    config: Mapping[str, Any]
    shown: Mapping[str, str]
    unnamed: frozenset[str]
    cells: tuple[str, ...]
    avg: Estimate | None
    last: Estimate | None
    fgt: Estimate | None
    vs_simplecil: float | None
    trainable_parameters: float | None
    forward_passes: float | None
    forward_equivalents: float | None
    peak_memory: float | None
    seconds: float | None

    @property
    def seeds(self) -> int:
        return len(self.cells)

    @property
    def is_baseline(self) -> bool:
        return is_baseline(self.config)

    @property
    def label(self) -> str:
        """A short name for figures: method and optimizer by name, other keys that tell rows apart with values that are not usual."""
        return self.name()

    @property
    def filters(self) -> dict[str, str]:
        """What a reader filters by; ``none``: the key does not apply."""
        return {key: "none" if self.config[key] is None else str(self.config[key]) for key in FILTERS}

    def name(self, *, without: Sequence[str] = ()) -> str:
        """The same without some keys."""
        shown = {
            key: " ".join(word for word in text.split(" ") if not word.endswith(f"={DEFAULT}")) or "-"
            for key, text in self.shown.items()
        }
        return " ".join(
            named(key, text)
            for key, text in sorted(shown.items(), key=lambda item: (item[0] == "later", item[0] == "queries"))
            if text not in ("-", USUAL.get(key)) and key not in self.unnamed.union(without)
        )


def is_baseline(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is the row to beat: SimpleCIL with class means."""
    return bool(config["method"] == BASELINE and config.get("classifier") is None)


def gradients(config: Mapping[str, Any]) -> str:
    """What a configuration is trained with: ``none``, ``exact`` gradients, ``forward`` passes alone, or ``both``, some steps each."""
    found, later = set(), json.loads(config.get("later") or "{}")
    for part in (config, branched({**config, "later": later})):
        if part["optimizer"] is None:
            continue
        options = part["optimizer_options"] or {}
        options = json.loads(options) if isinstance(options, str) else options
        if str(part["optimizer"]).startswith("fo-") or part["hybrid_epochs"] or options.get("hybrid"):
            found.add("exact")
        if not str(part["optimizer"]).startswith("fo-") and part["hybrid_epochs"] < part["epochs"]:
            found.add("forward")
    return "both" if len(found) > 1 else next(iter(found), "none")


def summary(trials: pa.Table) -> list[Row]:
    """Rows over seeds: data set by data set, SimpleCIL (the row to beat) first, then by method, optimizer, queries.

    Args:
        trials: the table ``trials``, or some rows of it.
    """
    keys = [key for key in CONFIG_KEYS if key != "seed"]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for trial in trials.select([*CONFIG_KEYS, "cell_id", *_MEASURED]).sort_by("seed").to_pylist():
        groups.setdefault(tuple(trial[key] for key in keys), []).append(trial)
    found = [(dict(zip(keys, group, strict=True)), members) for group, members in groups.items()]

    differences = Differences([config for config, _ in found])
    telling = {*_ALWAYS_SHOWN, *differences.named}
    shown = [key for key in keys if key in telling or differences.varies(key)]
    shown.sort(key=lambda key: FILTERS.index(key) if key in FILTERS else len(FILTERS))
    unnamed = frozenset(key for key in ("queries",) if not differences.varies(key))
    baselines = {same_problem(config): _mean(members, "avg") for config, members in found if is_baseline(config)}
    rows = (
        _row(
            config,
            members,
            {key: differences.text(key, config) for key in shown},
            unnamed,
            baselines.get(same_problem(config)),
        )
        for config, members in found
    )
    return sorted(rows, key=_order)


def _row(
    config: dict[str, Any],
    trials: list[dict[str, Any]],
    shown: dict[str, str],
    unnamed: frozenset[str],
    baseline: float | None,
) -> Row:
    avg = _mean(trials, "avg")
    # What trains nothing has no steps: its peak is that of computing features, of other batches.
    memory = None if config["optimizer"] is None else _mean(trials, "peak_memory_bytes")
    gain = None if avg is None or baseline is None or is_baseline(config) else avg - baseline
    return Row(
        config=config,
        shown=shown,
        unnamed=unnamed,
        cells=tuple(trial["cell_id"] for trial in trials),
        avg=measured(trial["avg"] for trial in trials),
        last=measured(trial["last"] for trial in trials),
        fgt=measured(trial["fgt"] for trial in trials),
        vs_simplecil=gain,
        trainable_parameters=_mean(trials, "trainable_parameters"),
        forward_passes=_mean(trials, "forward_passes"),
        forward_equivalents=_mean(trials, "forward_equivalents"),
        peak_memory=None if memory is None else memory / 2**20,
        seconds=_mean(trials, "seconds"),
    )


def _mean(trials: list[dict[str, Any]], name: str) -> float | None:
    found = measured(trial[name] for trial in trials)
    return found.mean if found else None


def same_problem(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two configurations must have in common for their accuracies to be compared."""
    # Older files may say where weights come from anyway.
    return tuple(None if (key, config[key]) == ("checkpoint", "hub") else config[key] for key in PROBLEM)


def setting(config: Mapping[str, Any], *, without: Sequence[str] = ()) -> tuple[Any, ...]:
    """The values of a configuration's keys but for some, with null for what says no more than that."""
    return tuple(
        None if value in ("", "{}", USUAL.get(key)) else value for key, value in config.items() if key not in without
    )


def problem_names(configs: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, ...], str]:
    """The problems of some configurations of one data set, in their order, by what tells them apart; of a single one nothing."""
    differences = Differences(configs)
    telling = [key for key in PROBLEM if key != "dataset" and differences.varies(key)]
    return {same_problem(config): differences.label(config, telling) for config in configs}


def _order(row: Row) -> tuple[Any, ...]:
    config = row.config
    stream = [str(config[key]) for key in ("dataset", "backbone", "checkpoint")]
    named = (config["method"], config["optimizer"] or "", config["queries"] or 0)
    # Numbers by size, null first, whatever the key.
    rest = [(value is not None, isinstance(value, str), value or 0) for value in config.values()]
    return (stream, not row.is_baseline, named, rest)


LEGEND = (
    "q: queries per step. n: seeds. Avg, Last, Fgt: percent, ± half width of the 95 % t-interval over seeds.",
    "gain: Avg minus SimpleCIL's. values: trained in a task. forwards: in training.",
    "MiB: peak memory of a training step, with what the classifier keeps.",
    "seconds: of a whole cell, imports and features that later cells of a process find included.",
)


def shared(rows: Sequence[Row]) -> tuple[str, ...]:
    """Sentences on what rows have in common and their labels leave out: options, and that no test sample was looked at."""
    found = Differences([row.config for row in rows]).shared()
    return (
        *([f"Options that rows do not show: {'; '.join(found)}."] if found else []),
        *([HELD_OUT] if rows and all(row.config["validation"] for row in rows) else []),
    )


HELD_OUT = "Accuracies of all rows are on held-out training samples, not on test samples: they choose settings and are no results."


def summary_table(rows: Sequence[Row]) -> Table:
    """A line per row; ``-`` for what was not measured."""
    shown = list(rows[0].shown) if rows else list(_ALWAYS_SHOWN)
    columns = (
        *(Column({"queries": "q"}.get(key, key), left=is_text(key)) for key in shown),
        Column("n"),
        Column("Avg"),
        Column("Last"),
        Column("Fgt"),
        Column("gain", "+.2f"),
        Column("values", ",.0f"),
        Column("forwards", ",.0f"),
        Column("MiB", ",.1f"),
        Column("seconds", ",.1f"),
    )
    return Table.of(
        columns,
        [
            (
                *(Cell(text, row.config[key]) for key, text in row.shown.items()),
                row.seeds,
                row.avg,
                row.last,
                row.fgt,
                row.vs_simplecil,
                row.trainable_parameters,
                row.forward_passes,
                row.peak_memory,
                row.seconds,
            )
            for row in rows
        ],
        name="summary",
        title="All settings, averaged over seeds",
        above=shared(rows),
        notes=LEGEND,
        marks=[Mark(row.filters, same_problem(row.config), row.is_baseline, row.cells) for row in rows],
    )


def render_text(rows: Sequence[Row]) -> str:
    """The table for a terminal, with a legend."""
    return "\n".join([text_grid(summary_table(rows)), "", *shared(rows), *LEGEND]) + "\n"


def render_markdown(rows: Sequence[Row]) -> str:
    """The table in GitHub's Markdown, with a legend."""
    grid = markdown_grid(summary_table(rows), EXPLICIT, escape=escape_bars)
    return f"{grid}\n\n{' '.join([*shared(rows), *LEGEND])}\n"


def is_text(key: str) -> bool:
    """Whether a key of the configuration holds words (set flush left) and not numbers."""
    return key in CONFIG_KEYS and bool(SCHEMAS["trials"].field(key).type == pa.string())
