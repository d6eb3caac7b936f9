"""Blocks of what the benchmarks of optimizers measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measurements
from measurements import commit_of, measured, source

from zeroflow.results.rendering import Column, Table, markdown_grid, words


def optimizer_columns(result: dict[str, Any], part: str, cell: Callable[[dict[str, Any]], str]) -> str:
    """A table with a row for each optimizer and a column for each model and number of queries."""
    cells = {
        (row["optimizer"], model["model"], row["queries"]): cell(row)
        for model in result["models"]
        for row in model[part]
    }
    names = list(dict.fromkeys(name for name, _, _ in cells))
    columns = [
        (model["model"], q)
        for model in result["models"]
        for q in sorted({q for _, m, q in cells if m == model["model"]})
    ]
    heads = [*words("optimizer"), *(f"{model} q = {queries}" for model, queries in columns)]
    rows = [(name, *(cells.get((name, *column), "") for column in columns)) for name in names]
    return markdown_grid(Table.of(heads, rows))


def optimizer_source(result: dict[str, Any]) -> str:
    return (
        f"`{result['command']}`; {result['device']}, {result['threads']} thread(s), {result['dtype']}, torch "
        f"{result['torch_version']}; commit {commit_of(result)}."
    )


def optimizer_targets(result: dict[str, Any]) -> str:
    """The limits that the measurement is held against."""
    parts = []
    for what, most in result["targets"].items():
        by_model = most if isinstance(most, dict) else {"": most}
        parts.append(f"{what} <= " + ", ".join(f"{value} {model}".strip() for model, value in by_model.items()))
    return f"Targets: {'; '.join(parts)}."


def optimizer_time() -> str:
    """Plain forward passes that a step takes, and what one perturbation costs."""
    result = measured("optimizers")

    def cell(row: dict[str, Any]) -> str:
        return f"{row['in_forwards']:.2f}" + (f" ({row['per_query']:.2f})" if row["queries"] > 1 else "")

    models = []
    for model in result["models"]:
        prefix = model["prefix_share"]
        models.append(
            [
                model["model"],
                f"{model['size']:,} in {model['tensors']}",
                model["forward_seconds"] * 1e3,
                100 * prefix,
                f"{2 - prefix:.2f} / {2 - 1.75 * prefix:.2f}",
                *(100 * share for share in model["perturbation"].values()),
            ]
        )
    ways = list(result["models"][0]["perturbation"])
    columns = [
        *words("model"),
        "d in tensors",
        Column("forward, ms", ".1f"),
        Column("prefix, % of it", ".1f"),
        "two-sided limit by query, q = 1 / 4",
        *(Column(f"one perturbation ({way}), % of a forward", ".2f") for way in ways),
    ]
    return "\n".join(
        [
            f"Time of a step in plain no-grad forwards of a mini-batch of {result['batch']}; in brackets: by query.",
            "",
            optimizer_columns(result, "time", cell),
            "",
            markdown_grid(Table.of(columns, models)),
            "",
            optimizer_targets(result),
            "",
            optimizer_source(result),
            "",
        ]
    )


def optimizer_peers() -> str:
    """How many times faster a step is than others'."""
    found = next((name for name in ("peers", "optimizers") if _file(name).exists() and _peers(measured(name))), None)
    command = (
        f"python benchmarks/optimizers.py --peers --output {_file('peers').relative_to(measurements.RESULTS.parent)}"
    )
    if found is None:
        return f"Not measured yet: `{command}`.\n"
    result = measured(found)
    columns = [
        *words("model", "ours", "theirs"),
        "q",
        Column("times faster", ".2f"),
        Column("target", ".2f"),
        Column("their peak memory over ours", ".2f"),
    ]
    rows = [
        (
            model,
            row["ours"],
            row["theirs"],
            row["queries"],
            row["faster"],
            "" if row["target"] is None else row["target"],
            row["memory"],
        )
        for model, row in _peers(result)
    ]
    version = result.get("infty_version")
    return "\n".join(
        [
            f"Mini-batch of {result['batch']}; medians over rounds in which both had their turn; authors' package: "
            f"{f'infty {version}' if version else 'absent'}.",
            "",
            markdown_grid(Table.of(columns, rows)),
            "",
            optimizer_source(result),
            "",
        ]
    )


def _file(benchmark: str) -> Path:
    return measurements.RESULTS / "benchmarks" / f"{benchmark}.json"


def _peers(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(model, comparison with a peer); measurements from before there were peers have none."""
    return [(model["model"], row) for model in result["models"] for row in model.get("peers", [])]


def optimizer_memory() -> str:
    """Peak bytes of a step beside the model's own."""
    result = measured("optimizers")
    grid = optimizer_columns(result, "memory", lambda row: f"{row['mib']:.1f} ({row['ratio']:.2f})")
    models = "; ".join(
        f"{model['model']}: {model['model_mib']:.1f} MiB, a plain forward {model['forward_mib']:.1f} MiB beside it"
        for model in result["models"]
    )
    what = "Peak MiB of a step beside the model's parameters and buffers; in brackets: over a plain no-grad forward's."
    return "\n".join(
        [
            f"{what} Mini-batch of {result['batch']}; {models}.",
            "",
            grid,
            "",
            optimizer_targets(result),
            "",
            optimizer_source(result),
            "",
        ]
    )


def optimizer_quality() -> str:
    """Cosine to the true gradient at equal numbers of forward passes."""
    result = measured("optimizers")
    quality = result["quality"]
    states = [state["state"] for state in quality["states"]]
    found = {(row["optimizer"], row["queries"], row["state"]): row for row in quality["quality"]}
    lines = []
    for name, queries in dict.fromkeys((name, queries) for name, queries, _ in found):
        rows = [found[name, queries, state] for state in states]
        cells = [
            text
            for row in rows
            for text in (
                f"{row['cosine']:.4f} ± {row['standard_error']:.4f}",
                f"{row['expected']:.4f}" if row["expected"] else "",
            )
        ]
        lines.append((name, queries, rows[0]["forwards"], rows[0]["seeds"], *cells))
    heads = [*words("optimizer"), "q", "forward passes", "seeds", *(h for state in states for h in (state, "expected"))]
    ratios = " and ".join(f"{state['per_example_over_spsa']:.1f} ({state['state']})" for state in quality["states"])
    return "\n".join(
        [
            f"Cosine to the gradient of the same mini-batch of {quality['batch']} by backpropagation, embedded backbone, "
            f"d = {quality['size']:,}: mean and standard error over the seeds. A direction for each example is worth "
            f"{ratios} times SPSA's cosine for the same two forward passes.",
            "",
            markdown_grid(Table.of(heads, lines)),
            "",
            optimizer_source(result),
            "",
        ]
    )


def own_model() -> str:
    """Accuracy of every optimizer with lr and eps from ``tune`` on a network that is none of ours."""
    if absent := measurements.unmeasured("own_model"):
        return absent
    result = measured("own_model")
    rows = sorted(result["rows"], key=lambda row: -row["accuracy"])
    first = max(row["accuracy"] for row in rows if row["optimizer"].startswith("fo-"))
    short = [f"`{row['optimizer']}`" for row in rows if row["accuracy"] < 0.85 * first]
    lines = []
    for row in rows:
        lr, eps = (" ".join(f"{run[key]:.2g}" for run in row["runs"]) for key in ("lr", "eps"))
        lines.append((row["optimizer"], 100 * row["accuracy"], lr, eps))
    return "\n".join(
        [
            f"scikit-learn's digits, a network of one hidden layer, {result['passes']:,} forward passes with those of `tune` (an exact "
            f"gradient counts three), {result['seeds']} seeds; less than 85 % of first order's accuracy: {', '.join(short) or 'none'}.",
            "",
            markdown_grid(Table.of([*words("optimizer"), Column("accuracy, %", ".1f"), *words("lr", "eps")], lines)),
            "",
            source(result),
            "",
        ]
    )


def training_curves() -> str:
    """Loss along training at equal forward passes, each optimizer with the lr and eps of its own search."""
    result = measured("training_curves")
    places = (2, 4, 6, 8)  # of the curves' eighths

    def mean(row: dict[str, Any], place: int, what: str) -> float:
        return statistics.fmean(curve[place][what] for curve in row["curves"])

    columns = [
        *words("optimizer", "options"),
        Column("lr", ".2g"),
        Column("eps", "g"),
        *(Column(f"loss, {result['passes'] * place // 8:,}", ".2f") for place in places),
        Column("accuracy %", ".1f"),
    ]
    rows = [
        (
            f"`{row['optimizer']}`",
            ", ".join(f"`{key}={value}`" for key, value in row["options"].items()),
            row["lr"],
            row["eps"],
            *(mean(row, place, "loss") for place in places),
            mean(row, -1, "accuracy"),
        )
        for row in sorted(result["curves"], key=lambda row: mean(row, -1, "loss"))
    ]
    what = f"Means over {len(result['curves'][0]['curves'])} seeds, by number of forward passes: `{result['command']}`."
    return "\n".join([markdown_grid(Table.of(columns, rows)), "", what, ""])
