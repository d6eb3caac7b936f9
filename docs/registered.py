"""Blocks of what is registered: optimizers, methods, classifiers, metrics, commands, the embedded backbone."""

from __future__ import annotations

import dataclasses
import json
import statistics
from typing import Any

import torch
from measurements import RESULTS, ROOT

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
from zeroflow.trial.metrics import DEFINITIONS

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
        [
            markdown_grid(Table.of(words("recipe", ""), facts)),
            "",
            "Class means of frozen features on the 100 unseen classes (SimpleCIL):",
            "",
            markdown_grid(Table.of(columns, measured)),
            "",
        ]
    )


def optimizer_list() -> str:
    """Every named optimizer with its forward passes per step and its options."""
    rows = []
    for info in list_optimizers(details=True):
        options = ", ".join(f"`{name}`" for name in info.options if name not in ENHANCEMENTS)
        rows.append((f"`{info.name}`", info.description, str(info.cost), options))
    grid = markdown_grid(Table.of(words("name", "what it is", "forward passes a step", "options"), rows))
    common = ", ".join(f"`{name}`" for name in ENHANCEMENTS)
    return "\n".join([grid, "", f"Options of all: {common}; `lr`, `eps`, `queries`, `seed`.", ""])


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
        *words("optimizer"),
        Column("lr", "g"),
        Column("forward passes", ","),
        Column("final training loss", ".4f"),
        Column("Avg, %", ".2f"),
    ]
    best = {name: min((r for r in rows if r[0] == name), key=lambda r: r[3]) for name in {r[0] for r in rows}}
    plain, ours = best["zo-sgd"], best["zo-per-example"]
    verdict = (
        f"At its best lr zo-per-example ends at {ours[3]:.4f} after {ours[2]:,} forward passes, zo-sgd at {plain[3]:.4f} after "
        f"{plain[2]:,}: {'lower' if ours[3] <= plain[3] else 'NOT lower'} with {ours[2] / plain[2]:.2f} of the forward passes."
    )
    return "\n".join([markdown_grid(Table.of(columns, rows)), "", verdict, ""])


def metric_definitions() -> str:
    """What the metrics of a cell mean."""
    rows = [(f"`{name}`", meaning) for name, meaning in DEFINITIONS.items()]
    return markdown_grid(Table.of(words("column of `trials`", "meaning"), rows)) + "\n"


def commands() -> str:
    """A line per command, from its help."""
    rows = [
        (f"`{name}`", command.short_help, f"`{command.examples[0][0]}`")
        for name, command in cli.main.commands.items()
        if isinstance(command, Command)
    ]
    return markdown_grid(Table.of(words("command", "what it does", "for example"), rows), SPACED) + "\n"


def doors() -> str:
    """What takes connections, how far it is reached, and what guards it."""
    known = json.loads((ROOT / "docs" / "doors.json").read_text())
    rows = [(after, f"`{name}`", *found) for after, names in known.items() for name, found in names.items()]
    return markdown_grid(Table.of(words("after", "process", "reached from", "guard"), rows)) + "\n"
