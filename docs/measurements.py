"""Blocks of what the benchmarks measured, apart from the optimizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zeroflow.methods.closed_form import NAMED
from zeroflow.results.rendering import Column, Table, markdown_grid, words

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"


def cell_overhead() -> str:
    return "```\n" + (RESULTS / "benchmarks" / "cell_overhead.txt").read_text().strip() + "\n```\n"


def data_loading() -> str:
    """Images a second, decoded every time and from the cache."""
    if absent := unmeasured("data_loading"):
        return absent
    found = measured("data_loading")
    first = ("torchvision's ImageFolder, in turn", 0, found["torchvision_images_per_second"], 1.0)
    rows = [(row["way"], row["threads"], row["images_per_second"], row["times_torchvision"]) for row in found["ways"]]
    columns = [*words("images"), "threads", Column("per second", ".0f"), Column("times torchvision", ".2f")]
    height, width = found["pixels"]
    # Measured since cached images have them.
    spent = found.get("checksum_microseconds")
    checked = f"; the checksum of a cached image takes {spent:.0f} microseconds whenever it is read" if spent else ""
    return "\n".join(
        [
            markdown_grid(Table.of(columns, [first, *rows])),
            "",
            f"Training crops of JPEG files of {width} x {height} pixels, {found['kib_per_file']:.0f} KiB, in memory; the first "
            f"opening, which checks and decodes all, takes {found['first_opening_images_per_second']:.0f} a second{checked}. "
            f"`{found['command']}`; {found['device']}, {found['cpus']} CPU cores, torch {found['torch_version']}; "
            f"commit {commit_of(found)}.",
            "",
        ]
    )


def features() -> str:
    """Seconds of a cell that computes frozen features, and of the next one."""
    if absent := unmeasured("features"):
        return absent
    found = measured("features")
    return (
        f"Class means of `{found['dataset']}`, {found['tasks_run']} tasks, in a warm process: {found['none_seconds']:.1f} s without "
        f"a cache, {found['first_to_none']:.2f} times that for the first cell with one, and for the second one "
        f"{found['second_seconds']:.2f} s, {found['second_to_first']:.3f} times the first one's; "
        f"{found['bytes'] / 2**20:.1f} MiB on disk, medians of {found['rounds']} rounds. `{found['command']}`; {found['device']}, "
        f"{found['threads']} thread, torch {found['torch_version']}; commit {commit_of(found)}.\n"
    )


def backbones() -> str:
    """Passes through a backbone in units of the same model of timm, called directly."""
    if absent := unmeasured("backbones"):
        return absent
    found = measured("backbones")
    columns = [*words("backbone"), "images", Column("features", ".3f"), Column("with adapters", ".3f")]
    rows = [(f"`{row['backbone']}`", row["images"], row["features"], row.get("adapted")) for row in found["rows"]]
    return (
        "\n".join(
            [
                markdown_grid(Table.of(columns, rows)),
                "",
                f"Times of the model called directly; medians of {found['rounds']} rounds in turns, adapters of inner width "
                f"{found['bottleneck']}. `{found['command']}`; {found['device']}, {found['threads']} thread, torch "
                f"{found['torch_version']}, timm {found['timm_version']}; commit {commit_of(found)}.",
            ]
        )
        + "\n"
    )


def measured(name: str) -> dict[str, Any]:
    """A committed measurement of the benchmark of this name."""
    return json.loads((RESULTS / "benchmarks" / f"{name}.json").read_text())


def unmeasured(name: str) -> str | None:
    """How to measure what a benchmark has not measured yet; None: it has."""
    if (RESULTS / "benchmarks" / f"{name}.json").is_file():
        return None
    return f"Not measured yet: `python benchmarks/{name}.py --output results/benchmarks/{name}.json`.\n"


def commit_of(result: dict[str, Any]) -> str:
    return (result["git_commit"] or "unknown")[:10] + ("+" if result["git_dirty"] else "")


def classifier_cost() -> str:
    """What learning and asking a classifier costs, in forward passes of the backbone over the same images."""
    if absent := unmeasured("classifiers"):
        return absent
    result = measured("classifiers")
    found, big = result["embedded"], result["published"]
    cells = {row["method"]: row["over_simplecil"] for row in result["cells"]}
    columns = [
        *words("classifier"),
        Column("learning a task", ".3f"),
        Column("scores", ".3f"),
        Column("MiB after the last task", ",.1f"),
        Column("whole cell over SimpleCIL's", ".2f"),
    ]
    rows = []
    for row in found["classifiers"]:
        name = row["classifier"]
        method = NAMED.get(name, "simplecil")
        costs = (row["learning_in_forwards"], row["scoring_in_forwards"], row["mib"])
        rows.append((f"`{name}`", *costs, cells.get(method)))
    what = (
        f"Learning and scores: in forward passes of the embedded backbone over the same {found['images']} images; medians over "
        "tasks. Whole cells: medians of cells in turns, features computed anew in each; targets: 1.1 for `slda` and `acil`, 1.6 "
        f"for `ranpac`. A task's random projection takes {found['random_projection_over_bound']:.2f} times the time of its floating "
        "point operations at the speed of a plain product."
    )
    size = (
        (
            f"At the published size (width {big['width']}, M = {big['size']:,}, {big['classes']} classes, {big['samples']:,} images), "
            f"one thread: update {big['update_seconds']:.0f} s, solution {big['solution_seconds']:.0f} s, choice of lambda "
            f"{big['choice_seconds']:.0f} s."
        )
        if big
        else ""
    )
    return "\n".join(
        [markdown_grid(Table.of(columns, rows)), "", what, *([size] if size else []), "", source(result), ""]
    )


def source(result: dict[str, Any]) -> str:
    return f"`{result['command']}`; {result['device']}, {result['threads']} thread(s) a process; commit {commit_of(result)}."


def query_workers() -> str:
    """What a second worker brings, and what the exchange costs."""
    result = measured("query_workers")
    names = {"one": "one worker", "queries": "share the queries", "data": "share the mini-batch"}
    columns = [
        "workers",
        *words(""),
        Column("ms a step", ".1f"),
        Column("steps per second", ".3f"),
        Column("speed-up", ".2f"),
        Column("exchange, ms", ".3f"),
        Column("% of a step", ".2f"),
    ]
    rows = [
        (
            row["workers"],
            names[row["way"]],
            1e3 * row["step_seconds"],
            row["steps_per_second"],
            row["speedup"],
            1e3 * row["exchange_seconds"],
            100 * row["exchange_share"],
        )
        for row in result["workers"]
    ]
    what = (
        f"`{result['optimizer']}`, q = {result['queries']}, mini-batches of {result['batch']}, the embedded backbone:"
    )
    return "\n".join([what, "", markdown_grid(Table.of(columns, rows)), "", source(result), ""])


def replay() -> str:
    """What it takes to go on from the log."""
    result = measured("query_workers")
    columns = [
        *words("optimizer"),
        Column("a step, ms", ".1f"),
        Column("replayed, ms", ".2f"),
        Column("times faster", ".0f"),
        Column("log of a task, bytes", ",.0f"),
        Column("full checkpoint, bytes", ","),
        Column("steps of a task", ","),
    ]
    rows = [
        (
            row["optimizer"],
            1e3 * row["step_seconds"],
            1e3 * row["replayed_seconds"],
            1 / row["ratio"],
            row["log_bytes_per_task"],
            row["checkpoint_bytes"],
            row["steps_per_task"],
        )
        for row in result["replay"]
    ]
    what = f"q = {result['queries']}, a log of {result['queries']} queries a step:"
    return "\n".join([what, "", markdown_grid(Table.of(columns, rows)), "", source(result), ""])


def forecast() -> str:
    """How many steps more workers would make; arithmetic, with what it assumes."""
    result = measured("query_workers")["forecast"]
    queries = sorted({row["queries"] for row in result["rows"]})
    rows = {(row["queries"], row["workers"]): row for row in result["rows"]}
    lines = []
    for workers in sorted({row["workers"] for row in result["rows"]}):
        cells = [rows[q, workers] for q in queries]
        texts = [
            f"{row['steps_per_second']:.2f} ({row['speedup']:.1f}"
            + (f", {row['shards']} slices" if row["shards"] > 1 else "")
            + ")"
            for row in cells
        ]
        lines.append((workers, *texts))
    grid = markdown_grid(Table.of(["workers", *(f"q = {q}: steps per second (speed-up)" for q in queries)], lines))
    return "\n".join([grid, "", "Assumed:", "", *(f"- {assumption}" for assumption in result["assumptions"]), ""])


def many_cells() -> str:
    """Whether late cells cost what early ones do."""
    result = measured("many_cells")
    return (
        f"{result['cells']} trivial cells, {result['concurrent']} at a time, {result['seconds_inside_a_cell']:.3f} s of work each: "
        f"{result['early_seconds_per_cell']:.3f} s from one to the next after the first ten, "
        f"{result['late_seconds_per_cell']:.3f} s at the end ({result['late_to_early']:.2f} times). {source(result)}\n"
    )


def packing() -> str:
    """How much faster a packed store loads."""
    if absent := unmeasured("packing"):
        return absent
    result = measured("packing")
    stores = result["stores"]
    heads = [
        f"{s['where']}, {s['cells']:,} cells: {what}"
        for s in stores
        for what in ("loose, s", "packed, s", "times faster")
    ]
    grid = Table.of(
        [*words("loading"), *heads],
        [
            (
                name,
                *(
                    format(s[kind][name], ".1f" if kind == "times_faster" else ".3f")
                    for s in stores
                    for kind in ("loose_seconds", "packed_seconds", "times_faster")
                ),
            )
            for name in stores[0]["times_faster"]
        ],
    )
    took = " and ".join(f"{s['packing_in_loading_all']:.1f} ({s['where']})" for s in stores)
    rounds = "One round" if result["rounds"] == 1 else f"Medians of {result['rounds']} rounds"
    return "\n".join(
        [
            markdown_grid(grid),
            "",
            f"{rounds}; packing takes {took} times as long as loading the four tables loose once. "
            f"`{result['command']}`; {result['device']}; commit {commit_of(result)}.",
            "",
        ]
    )


def kills() -> str:
    """What a hundred kills did to sweeps."""
    found = measured("kills")
    names = {
        "ImplicitFunc": "trials",
        "TrainController": "Ray Train's controllers",
        "RayTrainWorker": "Ray Train's workers",
        "Coordinator": "the coordinator",
        "sweep": "the sweep",
        "raylet/raylet": "the raylet",
        "gcs/gcs_server": "the GCS",
    }
    kinds = ", ".join(f"{names[kind]} {count}" for kind, count in found["kills"].items())
    return (
        f"{sum(found['kills'].values())} kills ({kinds}) in {found['sweeps']} sweeps: {found['cells']} cells done, none failed, none "
        f"lost, every one with the bits of an undisturbed run; {found['seconds'] / 60:.0f} minutes. "
        "`ZEROFLOW_KILLS=results/benchmarks/kills.json python -m pytest -m long tests/sweep/test_faults.py -k random_kills`; "
        f"{found['device']}; commit {commit_of(found)}.\n"
    )


def durability() -> str:
    """What it costs that work survives a power cut."""
    result = measured("durability")
    return (
        f"A record of a log costs {result['append_in_steps']:.1g} steps, with its sync {result['sync_in_steps']:.2f}; one sync a "
        f"second is {result['sync_share_of_time']:.2%} of the time. A file of 16 KiB that stays costs "
        f"{result['durable_file_in_steps']:.2f} steps, without its syncs {result['plain_file_in_steps']:.2g}. {source(result)}\n"
    )
