"""Write the numbers into the documents: every one comes from a committed store or a committed measurement.

``python docs/generate.py`` fills the blocks between ``<!-- generated: NAME -->`` and ``<!-- end -->`` in the Markdown files
of the project; ``--check`` changes nothing and ends with status 1 if a block is out of date.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bans
import click
import findings
import front
import gallery
import reproduction
import torch

from zeroflow import cli, options
from zeroflow.classifiers import classifiers
from zeroflow.cli.command import Command
from zeroflow.methods import MethodInfo, methods
from zeroflow.methods.closed_form import NAMED
from zeroflow.models.backbone import Backbone
from zeroflow.models.factory import create_backbone
from zeroflow.models.tuning import tunings
from zeroflow.optim import ENHANCEMENTS, list_optimizers
from zeroflow.results import load
from zeroflow.results.rendering import SPACED, Column, Table, markdown_grid, words
from zeroflow.results.schema import markdown
from zeroflow.results.searches import render_searches, search_rows
from zeroflow.results.summary import render_markdown, summary
from zeroflow.trial.metrics import DEFINITIONS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
BLOCK = re.compile(r"(<!-- generated: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def sweep_table(store: str) -> str:
    """The result table of a committed store, and where it comes from."""
    trials = load(RESULTS / store, "trials")
    rows = trials.to_pylist()
    commits = sorted({commit_of(row) for row in rows})
    hours = sum(row["seconds"] for row in rows) / 3600
    devices = ", ".join(sorted({f"{row['device']}, {row['threads']} thread(s)" for row in rows}))
    source = (
        f"{len(rows)} cells, {hours:.2f} hours of one cell at a time on {devices}; commit {', '.join(commits)}; "
        f"torch {rows[0]['torch_version']}, timm {rows[0]['timm_version']}, Ray {rows[0]['ray_version']}."
    )
    return f"{render_markdown(summary(trials))}\n\n{source}\n"


def terminal(*arguments: str) -> str:
    """A command, and what it prints when it is run in the checkout."""
    run = subprocess.run(
        [sys.executable, "-m", "zeroflow.cli", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = [line.rstrip().replace(f"{ROOT}/", "") for line in run.stdout.strip().splitlines()]
    return "\n".join(["```console", f"$ zeroflow {' '.join(arguments)}", *lines, "```", ""])


def captured(store: str, table: str) -> str:
    """What the terminal showed while a store was filled; ``table``: stands for the result table."""
    lines = (RESULTS / store / "terminal.txt").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("dataset "))
    last = next(i for i, line in enumerate(lines) if line.startswith("gain:"))
    return "\n".join(["```console", *lines[:first], table, *lines[last + 1 :], "```", ""])


def cell_overhead() -> str:
    return "```\n" + (RESULTS / "benchmarks" / "cell_overhead.txt").read_text().strip() + "\n```\n"


def data_loading() -> str:
    """Images a second, decoded every time and from the cache."""
    file = RESULTS / "benchmarks" / "data_loading.json"
    if not file.exists():
        return f"Not measured yet: `python benchmarks/data_loading.py --output {file.relative_to(RESULTS.parent)}`.\n"
    found = measured("data_loading")
    first = ("torchvision's ImageFolder, in turn", 0, found["torchvision_images_per_second"], 1.0)
    rows = [(row["way"], row["threads"], row["images_per_second"], row["times_torchvision"]) for row in found["ways"]]
    columns = [*words("images"), "threads", Column("per second", ".0f"), Column("times torchvision", ".2f")]
    height, width = found["pixels"]
    return "\n".join(
        [
            markdown_grid(Table.of(columns, [first, *rows])),
            "",
            f"Training crops of JPEG files of {width} x {height} pixels, {found['kib_per_file']:.0f} KiB, in memory; the first "
            f"opening, which checks and decodes all, takes {found['first_opening_images_per_second']:.0f} a second. "
            f"`{found['command']}`; {found['device']}, {found['cpus']} CPU cores, torch {found['torch_version']}; "
            f"commit {commit_of(found)}.",
            "",
        ]
    )


def model_card() -> str:
    """Recipe and measured numbers of the embedded backbone."""
    recipe = json.loads((ROOT / "zeroflow/models/embedded/quickdraw_vit.json").read_text())
    trials = load(RESULTS / "backbone", "trials").to_pylist()
    trained = next(row for row in trials if row["checkpoint"] is None)
    random = next(row for row in trials if row["checkpoint"] == "none")
    keys = ("classes", "drawings", "epochs", "batch_size", "lr", "seed", "steps", "torch")
    facts = [(key.replace("_", " "), str(recipe[key])) for key in keys]
    losses = recipe["loss_per_epoch"]
    facts.append(("training loss, first and last epoch", f"{losses[0]:.3f}, {losses[-1]:.3f}"))
    facts.append(("minutes on the machine that trained it", f"{recipe['seconds'] / 60:.0f}"))
    measured = [
        (name, row["last"], row["avg"])
        for name, row in (("this checkpoint", trained), ("random initialisation", random))
    ]
    columns = [*words("weights"), Column("all 100 classes, %", ".2f"), Column("mean over ten stages, %", ".2f")]
    return "\n".join(
        [markdown_grid(Table.of(words("recipe", ""), facts)), "",
         "Class means of frozen features on the 100 unseen classes (SimpleCIL):", "",
         markdown_grid(Table.of(columns, measured)), ""]
    )  # fmt: skip


def features() -> str:
    """Seconds of a cell that computes frozen features, and of the next one."""
    file = RESULTS / "benchmarks" / "features.json"
    if not file.exists():
        return f"Not measured yet: `python benchmarks/features.py --output {file.relative_to(RESULTS.parent)}`.\n"
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
    file = RESULTS / "benchmarks" / "backbones.json"
    if not file.is_file():
        return f"Not measured yet: `python benchmarks/backbones.py --output {file.relative_to(RESULTS.parent)}`.\n"
    found = measured("backbones")
    columns = [*words("backbone"), "images", Column("features", ".3f"), Column("with adapters", ".3f")]
    rows = [(f"`{row['backbone']}`", row["images"], row["features"], row.get("adapted")) for row in found["rows"]]
    return "\n".join(
        [
            markdown_grid(Table.of(columns, rows)), "",
            f"Times of the model called directly; medians of {found['rounds']} rounds in turns, adapters of inner width "
            f"{found['bottleneck']}. `{found['command']}`; {found['device']}, {found['threads']} thread, torch "
            f"{found['torch_version']}, timm {found['timm_version']}; commit {commit_of(found)}.",
        ]
    ) + "\n"  # fmt: skip


def measured(name: str) -> dict[str, Any]:
    """A committed measurement of the benchmark of this name."""
    return json.loads((RESULTS / "benchmarks" / f"{name}.json").read_text())


def commit_of(result: dict[str, Any]) -> str:
    return (result["git_commit"] or "unknown")[:10] + ("+" if result["git_dirty"] else "")


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
        models.append([
            model["model"], f"{model['size']:,} in {model['tensors']}", model["forward_seconds"] * 1e3, 100 * prefix,
            f"{2 - prefix:.2f} / {2 - 1.75 * prefix:.2f}", *(100 * share for share in model["perturbation"].values()),
        ])  # fmt: skip
    ways = list(result["models"][0]["perturbation"])
    columns = [
        *words("model"), "d in tensors", Column("forward, ms", ".1f"), Column("prefix, % of it", ".1f"),
        "two-sided limit by query, q = 1 / 4", *(Column(f"one perturbation ({way}), % of a forward", ".2f") for way in ways),
    ]  # fmt: skip
    return "\n".join([
        f"Time of a step in plain no-grad forwards of a mini-batch of {result['batch']}; in brackets: by query.", "",
        optimizer_columns(result, "time", cell), "", markdown_grid(Table.of(columns, models)), "",
        optimizer_targets(result), "", optimizer_source(result), "",
    ])  # fmt: skip


def optimizer_peers() -> str:
    """How many times faster a step is than others'."""
    found = next((name for name in ("peers", "optimizers") if _file(name).exists() and _peers(measured(name))), None)
    command = f"python benchmarks/optimizers.py --peers --output {_file('peers').relative_to(RESULTS.parent)}"
    if found is None:
        return f"Not measured yet: `{command}`.\n"
    result = measured(found)
    columns = [
        *words("model", "ours", "theirs"), "q", Column("times faster", ".2f"), Column("target", ".2f"),
        Column("their peak memory over ours", ".2f"),
    ]  # fmt: skip
    rows = [
        (
            model, row["ours"], row["theirs"], row["queries"], row["faster"], "" if row["target"] is None else row["target"],
            row["memory"],
        )
        for model, row in _peers(result)
    ]  # fmt: skip
    version = result.get("infty_version")
    return "\n".join([
        f"Mini-batch of {result['batch']}; medians over rounds in which both had their turn; authors' package: "
        f"{f'infty {version}' if version else 'absent'}.", "",
        markdown_grid(Table.of(columns, rows)), "", optimizer_source(result), "",
    ])  # fmt: skip


def _file(benchmark: str) -> Path:
    return RESULTS / "benchmarks" / f"{benchmark}.json"


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
                f"{row['cosine']:.4f} ± {row['standard_error']:.4f}", f"{row['expected']:.4f}" if row["expected"] else "",
            )
        ]  # fmt: skip
        lines.append((name, queries, rows[0]["forwards"], rows[0]["seeds"], *cells))
    heads = [*words("optimizer"), "q", "forward passes", "seeds", *(h for state in states for h in (state, "expected"))]
    ratios = " and ".join(f"{state['per_example_over_spsa']:.1f} ({state['state']})" for state in quality["states"])
    return "\n".join([
        f"Cosine to the gradient of the same mini-batch of {quality['batch']} by backpropagation, embedded backbone, "
        f"d = {quality['size']:,}: mean and standard error over the seeds. A direction for each example is worth "
        f"{ratios} times SPSA's cosine for the same two forward passes.", "",
        markdown_grid(Table.of(heads, lines)), "", optimizer_source(result), "",
    ])  # fmt: skip


def own_model() -> str:
    """Accuracy of every optimizer with lr and eps from ``tune`` on a network that is none of ours."""
    file = RESULTS / "benchmarks" / "own_model.json"
    if not file.exists():
        return f"Not measured yet: `python benchmarks/own_model.py --output {file.relative_to(RESULTS.parent)}`.\n"
    result = measured("own_model")
    rows = sorted(result["rows"], key=lambda row: -row["accuracy"])
    first = max(row["accuracy"] for row in rows if row["optimizer"].startswith("fo-"))
    short = [f"`{row['optimizer']}`" for row in rows if row["accuracy"] < 0.85 * first]
    lines = []
    for row in rows:
        lr, eps = (" ".join(f"{run[key]:.2g}" for run in row["runs"]) for key in ("lr", "eps"))
        lines.append((row["optimizer"], 100 * row["accuracy"], lr, eps))
    return "\n".join([
        f"scikit-learn's digits, a network of one hidden layer, {result['passes']:,} forward passes with those of `tune` (an exact "
        f"gradient counts three), {result['seeds']} seeds; less than 85 % of first order's accuracy: {', '.join(short) or 'none'}.",
        "", markdown_grid(Table.of([*words("optimizer"), Column("accuracy, %", ".1f"), *words("lr", "eps")], lines)), "",
        source(result), "",
    ])  # fmt: skip


def optimizer_list() -> str:
    """Every named optimizer with its forward passes per step and its options."""
    rows = []
    for info in list_optimizers(details=True):
        options = ", ".join(f"`{name}`" for name in info.options if name not in ENHANCEMENTS)
        rows.append((f"`{info.name}`", info.description, str(info.cost), options))
    grid = markdown_grid(Table.of(words("name", "what it is", "forward passes a step", "options"), rows))
    common = ", ".join(f"`{name}`" for name in ENHANCEMENTS)
    return "\n".join([grid, "", f"Options of all: {common}; `lr`, `eps`, `queries`, `seed`.", ""])


def training_curves() -> str:
    """Loss along training at equal forward passes, each optimizer with the lr and eps of its own search."""
    result = measured("training_curves")
    places = (2, 4, 6, 8)  # of the curves' eighths

    def mean(row: dict[str, Any], place: int, what: str) -> float:
        return statistics.fmean(curve[place][what] for curve in row["curves"])

    columns = [
        *words("optimizer", "options"), Column("lr", ".2g"), Column("eps", "g"),
        *(Column(f"loss, {result['passes'] * place // 8:,}", ".2f") for place in places), Column("accuracy %", ".1f"),
    ]  # fmt: skip
    rows = [
        (
            f"`{row['optimizer']}`", ", ".join(f"`{key}={value}`" for key, value in row["options"].items()), row["lr"],
            row["eps"], *(mean(row, place, "loss") for place in places), mean(row, -1, "accuracy"),
        )
        for row in sorted(result["curves"], key=lambda row: mean(row, -1, "loss"))
    ]  # fmt: skip
    what = f"Means over {len(result['curves'][0]['curves'])} seeds, by number of forward passes: `{result['command']}`."
    return "\n".join([markdown_grid(Table.of(columns, rows)), "", what, ""])


FAMILIES = {
    "reference": ("simplecil", "finetune", "joint"),
    "closed form": ("slda", "acil", "ranpac", "fecam"),
    "memory": ("replay", "generative-replay"),
    "regularisation": ("ewc", "lwf", "l2-sp"),
    "extension": (
        "ease", "adapter-per-task", "shared-adapter", "aper-adapter", "aper-vpt-shallow", "aper-vpt-deep", "aper-ssf",
        "aper-finetune", "aper-input-prompt", "aper-input-filter", "aper-block-shift", "aper-norm-affine", "foro",
    ),
}  # fmt: skip


def method_list() -> str:
    """Every built-in method with its family, options, and how much a task trains."""
    assert sorted(name for names in FAMILIES.values() for name in names) == sorted(methods.names())
    common = {field.name for field in dataclasses.fields(methods.get("finetune").options)}
    rows = []
    backbone = create_backbone(checkpoint="none")
    for family, names in FAMILIES.items():
        for name in names:
            info = methods.get(name)
            own = [
                f
                for f in dataclasses.fields(info.options)
                if name == "finetune" or f.name not in common or not info.build.one_head
            ]
            options = ", ".join(f"`{field.name}: {json.dumps(field.default)}`" for field in own)
            if info.build.one_head and name != "finetune":
                options = ", ".join(filter(None, ("as `finetune`", options)))
            sizes = " / ".join(f"{size:,}" for size in trained_values(info, backbone))
            rows.append((family, f"`{name}`", info.description, sizes, options))
    columns = [*words("family", "name", "what it is"), "trained values, first and second task", *words("options")]
    return "\n".join(
        [
            markdown_grid(Table.of(columns, rows)),
            "",
            "Trained values: on the embedded backbone, ten classes a task, options as they stand here.",
            "",
        ]
    )


def classifier_list() -> str:
    """Every built-in classifier with its options and the method that is SimpleCIL with it."""
    rows = []
    for name, info in classifiers.items():
        own = ", ".join(f"`{key}: {json.dumps(value)}`" for key, value in options.defaults(info.options).items())
        rows.append((f"`{name}`", info.description, own, f"`{NAMED.get(name, 'simplecil')}`"))
    return markdown_grid(Table.of(words("classifier", "what it is", "options", "on frozen features"), rows)) + "\n"


def classifier_cost() -> str:
    """What learning and asking a classifier costs, in forward passes of the backbone over the same images."""
    file = RESULTS / "benchmarks" / "classifiers.json"
    if not file.exists():
        return f"Not measured yet: `python benchmarks/classifiers.py --output results/benchmarks/{file.name}`.\n"
    result = json.loads(file.read_text())
    found, big = result["embedded"], result["published"]
    cells = {row["method"]: row["over_simplecil"] for row in result["cells"]}
    columns = [
        *words("classifier"), Column("learning a task", ".3f"), Column("scores", ".3f"), Column("MiB after the last task", ",.1f"),
        Column("whole cell over SimpleCIL's", ".2f"),
    ]  # fmt: skip
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
        f"At the published size (width {big['width']}, M = {big['size']:,}, {big['classes']} classes, {big['samples']:,} images), "
        f"one thread: update {big['update_seconds']:.0f} s, solution {big['solution_seconds']:.0f} s, choice of lambda "
        f"{big['choice_seconds']:.0f} s."
    ) if big else ""  # fmt: skip
    return "\n".join(
        [markdown_grid(Table.of(columns, rows)), "", what, *([size] if size else []), "", source(result), ""]
    )


def trained_values(info: MethodInfo, backbone: Backbone) -> list[int]:
    """How many numbers the first and the second task of ten classes train."""
    method, generator, sizes = info.build(backbone), torch.Generator().manual_seed(0), []
    for classes in (range(10), range(10, 20)):
        method.begin_task(classes, generator)
        sizes.append(sum(value.numel() for value in method.trainable().values()))
        method.freeze()
    return sizes


def method_refusals() -> str:
    """Which optimizers are refused by which methods, also for options other than the default, and the reasons."""
    variants: dict[str, list[tuple[str, dict[str, Any]]]] = {name: [("", {})] for name in methods.names()}
    for name, cases in variants.items():
        known = {field.name for field in dataclasses.fields(methods.get(name).options)}
        if "tune" in known:
            cases += [(f", `tune: {tuning}`", {"tune": tuning}) for tuning in tunings.names()]
        if "fisher" in known:
            cases.append((", `fisher: backpropagation`", {"fisher": "backpropagation"}))
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, cases in variants.items():
        info, always = methods.get(name), set()
        for text, own in cases:
            refused: dict[str, list[str]] = {}
            for optimizer in list_optimizers(details=True):
                if (optimizer.name, name) not in always and (why := info.build.refusal(optimizer, info.parse(own))):
                    refused.setdefault(why, []).append(optimizer.name)
            for why, names in refused.items():
                always |= {(one, name) for one in names if not own}
                reasons.setdefault((why, ", ".join(f"`{one}`" for one in names)), []).append(f"`{name}`{text}")
    rows = [(names, "; ".join(cells), why) for (why, names), cells in reasons.items()]
    return markdown_grid(Table.of(words("optimizer", "cannot train", "because"), rows)) + "\n"


def estimators() -> str:
    """Training loss of the last epoch against forward passes, and whether a third of them is enough."""
    trials = {row["cell_id"]: row for row in load(RESULTS / "estimators", "trials").to_pylist()}
    final: dict[str, list[float]] = {}
    for step in load(RESULTS / "estimators", "steps").to_pylist():
        if step["epoch"] == trials[step["cell_id"]]["epochs"] - 1:
            final.setdefault(step["cell_id"], []).append(step["loss"])
    rows = sorted(
        (row["optimizer"], row["lr"], row["forward_passes"], statistics.mean(final[cell]), row["avg"])
        for cell, row in trials.items()
    )
    columns = [
        *words("optimizer"), Column("lr", "g"), Column("forward passes", ","), Column("final training loss", ".4f"),
        Column("Avg, %", ".2f"),
    ]  # fmt: skip
    best = {name: min((r for r in rows if r[0] == name), key=lambda r: r[3]) for name in {r[0] for r in rows}}
    plain, ours = best["zo-sgd"], best["zo-per-example"]
    verdict = (
        f"At its best lr zo-per-example ends at {ours[3]:.4f} after {ours[2]:,} forward passes, zo-sgd at {plain[3]:.4f} after "
        f"{plain[2]:,}: {'lower' if ours[3] <= plain[3] else 'NOT lower'} with {ours[2] / plain[2]:.2f} of the forward passes."
    )
    return "\n".join([markdown_grid(Table.of(columns, rows)), "", verdict, ""])


def source(result: dict[str, Any]) -> str:
    return f"`{result['command']}`; {result['device']}, {result['threads']} thread(s) a process; commit {commit_of(result)}."


def query_workers() -> str:
    """What a second worker brings, and what the exchange costs."""
    result = measured("query_workers")
    names = {"one": "one worker", "queries": "share the queries", "data": "share the mini-batch"}
    columns = [
        "workers", *words(""), Column("ms a step", ".1f"), Column("steps per second", ".3f"), Column("speed-up", ".2f"),
        Column("exchange, ms", ".3f"), Column("% of a step", ".2f"),
    ]  # fmt: skip
    rows = [
        (
            row["workers"], names[row["way"]], 1e3 * row["step_seconds"], row["steps_per_second"], row["speedup"],
            1e3 * row["exchange_seconds"], 100 * row["exchange_share"],
        )
        for row in result["workers"]
    ]  # fmt: skip
    what = (
        f"`{result['optimizer']}`, q = {result['queries']}, mini-batches of {result['batch']}, the embedded backbone:"
    )
    return "\n".join([what, "", markdown_grid(Table.of(columns, rows)), "", source(result), ""])


def replay() -> str:
    """What it takes to go on from the log."""
    result = measured("query_workers")
    columns = [
        *words("optimizer"), Column("a step, ms", ".1f"), Column("replayed, ms", ".2f"), Column("times faster", ".0f"),
        Column("log of a task, bytes", ",.0f"), Column("full checkpoint, bytes", ","), Column("steps of a task", ","),
    ]  # fmt: skip
    rows = [
        (
            row["optimizer"], 1e3 * row["step_seconds"], 1e3 * row["replayed_seconds"], 1 / row["ratio"],
            row["log_bytes_per_task"], row["checkpoint_bytes"], row["steps_per_task"],
        )
        for row in result["replay"]
    ]  # fmt: skip
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
    file = RESULTS / "benchmarks" / "packing.json"
    if not file.is_file():
        return f"Not measured yet: `python benchmarks/packing.py --output {file.relative_to(RESULTS.parent)}`.\n"
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
    return "\n".join([
        markdown_grid(grid), "",
        f"Medians of {result['rounds']} rounds; packing takes {took} times as long as loading the four tables loose once. "
        f"`{result['command']}`; {result['device']}; commit {commit_of(result)}.", "",
    ])  # fmt: skip


def metric_definitions() -> str:
    """What the metrics of a cell mean."""
    rows = [(f"`{name}`", meaning) for name, meaning in DEFINITIONS.items()]
    return markdown_grid(Table.of(words("column of `trials`", "meaning"), rows)) + "\n"


def searches(store: str) -> str:
    """The searches of a committed store."""
    rows = load(RESULTS / store, "searches").to_pylist() if (RESULTS / store).is_dir() else []
    if not rows:
        return (
            f"Not run yet: `zeroflow search sweeps/{store.removesuffix('_search')}.yaml --results results/{store}`.\n"
        )
    return render_searches(search_rows(rows))


def landscape(name: str) -> str:
    """Where the runs on a landscape ended, in the middle of it and at the end."""
    folder = RESULTS / "trajectories"
    rows = (
        [row for row in load(folder, "trajectories").to_pylist() if row["landscape"] == name] if folder.is_dir() else []
    )
    if not rows:
        return "Not run yet.\n"
    points = [row for row in load(folder, "surfaces").to_pylist() if row["landscape"] == name]
    columns = [
        *words("optimizer"), "q", Column("lr", "g"), *words("objective", "at the end of"), Column("x", ".2f"),
        Column("y", ".2f"), Column("from the plane", ".2f"), Column("old loss", ".3f"), Column("new loss", ".3f"),
    ]  # fmt: skip
    lines: list[tuple[Any, ...]] = [
        (f"*{each['point']}*", *[""] * 4, each["x"], each["y"], "", each["loss_old"], each["loss_new"])
        for each in points
        if each["point"]
    ]
    runs: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        runs.setdefault((row["optimizer"], row["queries"], row["lr"], row["seed"], row["objective"]), []).append(row)
    for (optimizer, queries, lr, _, objective), path in runs.items():
        switch = [row for before, row in itertools.pairwise(path) if before["task"] != row["task"]]
        for what, row in [*(("the old task", row) for row in switch), ("all", path[-1])]:
            place = (row[key] for key in ("x", "y", "distance", "loss_old", "loss_new"))
            lines.append((optimizer, queries or "-", lr, objective, what, *place))
    first = points[0]
    return "\n".join(
        [
            f"**{name}**: losses of the points and runs.", "", markdown_grid(Table.of(columns, lines)), "",
            f"Commit {commit_of(first)}; {first['device']}, torch {first['torch_version']}.", "",
        ]
    )  # fmt: skip


def commands() -> str:
    """A line per command, from its help."""
    rows = [
        (f"`{name}`", command.short_help, f"`{command.examples[0][0]}`")
        for name, command in cli.main.commands.items()
        if isinstance(command, Command)
    ]
    return markdown_grid(Table.of(words("command", "what it does", "for example"), rows), SPACED) + "\n"


BLOCKS: dict[str, Callable[[], str]] = {
    "optimizer-list": optimizer_list,
    "method-list": method_list,
    "classifier-list": classifier_list,
    "classifier-cost": classifier_cost,
    "method-refusals": method_refusals,
    "estimators": estimators,
    "optimizers": lambda: sweep_table("optimizers"),
    "training-curves": training_curves,
    "optimizers-search": lambda: sweep_table("optimizers_search"),
    "quick-table": lambda: sweep_table("quick"),
    "quick-terminal": lambda: captured("quick", "(the table above)"),
    "search": lambda: sweep_table("search"),
    "room-search": lambda: sweep_table("room_search"),
    "room-table": lambda: sweep_table("room"),
    "table1-search": lambda: searches("table1_quickdraw_search"),
    "families-search": lambda: searches("families_quickdraw_search"),
    "figure6-search": lambda: searches("figure6_quickdraw_search"),
    "trajectories-two-parameters": lambda: landscape("two-parameters"),
    "trajectories-adapter": lambda: landscape("adapter"),
    "cell-overhead": cell_overhead,
    "data-loading": data_loading,
    "features": features,
    "backbones": backbones,
    "query-workers": query_workers,
    "replay": replay,
    "forecast": forecast,
    "many-cells": many_cells,
    "commands": commands,
    "schema": markdown,
    "gallery": lambda: gallery.page(RESULTS),
    "plan": lambda: terminal(
        "plan", "--grid", "sweeps/quick.yaml", "--results", "results/quick", "--set", "seed=[0,1,2,3,4]"
    ),
    "packing": packing,
    "metrics": metric_definitions,
    "model-card": model_card,
    "optimizer-time": optimizer_time,
    "optimizer-memory": optimizer_memory,
    "optimizer-peers": optimizer_peers,
    "optimizer-quality": optimizer_quality,
    "own-model": own_model,
    **reproduction.blocks(lambda: RESULTS),
    **findings.blocks(lambda: RESULTS),
    **front.blocks(lambda: RESULTS),
    **bans.blocks(lambda: RESULTS),
}


@click.command(help=__doc__)
@click.option("--check", is_flag=True, help="Change nothing; fail if a block is out of date.")
def main(check: bool) -> None:
    stale = []
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("zeroflow/**/*.md")]):
        text = path.read_text()
        filled = BLOCK.sub(lambda found: found[1] + BLOCKS[found["name"]]() + found[3], text)
        if filled != text:
            stale.append(path.relative_to(ROOT))
            if not check:
                path.write_text(filled)
    for name in stale:
        click.echo(f"{'out of date' if check else 'written'}: {name}")
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()
