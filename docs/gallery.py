"""The pictures of ``docs/gallery.md``, drawn from the committed stores.

``python docs/gallery.py`` renders them into ``docs/gallery/`` with kaleido, which needs Chrome or Chromium (``chromium`` on the
path, or ``BROWSER_PATH``); ``--check`` renders nothing and ends with status 1 if the results behind a picture have changed
since. The page itself is filled by ``python docs/generate.py``, as all pages are.
"""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import plotly.graph_objects as go
import plotly.io
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, PngImagePlugin

from zeroflow.results import figures
from zeroflow.results.named_stores import named_stores
from zeroflow.results.report import Results, read
from zeroflow.results.report_figures import Entry, choose
from zeroflow.results.summary import summary

ROOT = Path(__file__).resolve().parent.parent
RESULTS, FOLDER = ROOT / "results", ROOT / "docs" / "gallery"
DATASET = "quickdraw100-marker"
WIDTH, SCALE = 850, 1.6  # pixels of the layout, and of the file for each of them
COLORS = 256  # a file of so few is less than half as long
STAMP = "results"  # the key in a file's text that says which results it shows


@dataclass(frozen=True)
class Picture:
    """A figure of the report: ``title`` as there; of ``stores`` the first that has something for it is shown."""

    name: str
    title: str
    stores: tuple[str, ...]


PICTURES = (
    Picture("settings", "All settings beside each other", ("table1_quickdraw", "optimizers")),
    Picture("stream", "Accuracy along the stream", ("quick",)),
    Picture("tasks", "Accuracy per task", ("quick",)),
    Picture("last-task", "Accuracy on the last task", ("quick",)),
    Picture("queries", "Accuracy against queries", ("figure5_quickdraw", "quick")),
    Picture("work", "Accuracy against work", ("figure5_quickdraw", "quick")),
    Picture("costs", "What it costs", ("quick",)),
    Picture("memory", "Accuracy against memory", ("optimizers",)),
    Picture("history", "History (Table 3)", ("table3_quickdraw",)),
    Picture("sparsity", "Sparsity (Table 4)", ("table4_quickdraw",)),
    Picture("hybrid", "Hybrid training", ("hybrid_quickdraw",)),
    Picture("function-values", "Function values of old and new tasks", ("families_quickdraw", "table1_quickdraw")),
    Picture("effects", "What one change does, ours beside the paper's", ("table1_quickdraw", "optimizers")),
    Picture("grid", "The whole grid", ("table1_quickdraw", "optimizers")),
)  # fmt: skip
LANDSCAPES = ("two-parameters", "adapter")


@dataclass(frozen=True)
class Shown:
    """A picture that there are results for: its file's name, the store, what of it is shown, and the figure with its caption."""

    name: str
    store: str
    stamp: str
    entry: Entry


def shown(results: Path = RESULTS, dataset: str = DATASET) -> Iterator[Shown]:
    """Every picture that a store has something for, drawn from its cells of one data set."""
    opened: dict[str, tuple[Results, list[Entry]]] = {}

    def entries(name: str) -> tuple[Results, list[Entry]]:
        if name not in opened:
            here, _ = named_stores(results, [name])
            found = read(*here) if here else Results((), {})
            tables = dict(found.tables)
            if tables:
                tables["trials"] = tables["trials"].filter(pc.field("dataset") == dataset)
            sections = choose(tables, summary(tables["trials"]), None).sections if tables else []
            opened[name] = found, [entry for section in sections if section.dataset for entry in section.entries]
        return opened[name]

    for picture in PICTURES:
        for store in picture.stores:
            found, own = entries(store)
            entry = next((entry for entry in own if entry.title == picture.title), None)
            if entry is not None:
                yield Shown(picture.name, store, _stamp(found.tables["trials"], "cell_id", "finished_at"), entry)
                break
    yield from _landscapes(results)


def _landscapes(results: Path) -> Iterator[Shown]:
    here, _ = named_stores(results, ["trajectories"])
    for store in here:
        runs = figures.trajectories(store.load("trajectories"))
        for surface in figures.surfaces(store.load("surfaces")):
            if surface.landscape not in LANDSCAPES or not any(r.landscape_id == surface.landscape_id for r in runs):
                continue
            for objective, how in (("both", "both tasks at once"), ("old-then-new", "the old task, then the new one")):
                title = f"{surface.landscape}: {how}"
                caption = (
                    "Contours are the losses of the old task (solid) and of the new one (dotted); each line is the way of one "
                    "optimizer ([how it is made](trajectories.md))."
                )
                figure = figures.draw_trajectories(surface, runs, title, objective=objective)
                stamp = hashlib.sha256(surface.landscape_id.encode()).hexdigest()[:16]
                yield Shown(f"{surface.landscape}-{objective}", "trajectories", stamp, Entry(title, caption, figure))


def _stamp(table: pa.Table, *columns: str) -> str:
    """Tells one content of a store from another."""
    rows = sorted(map(str, table.select(list(columns)).to_pylist()))
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]


def page(results: Path = RESULTS) -> str:
    """The body of the gallery: a heading, a picture and how to read it, and what is not there yet."""
    lines: list[str] = []
    there = list(shown(results))
    for each in there:
        lines += [f"## {each.entry.title}", "", f"![{each.entry.title}](gallery/{each.name}.png)", ""]
        lines += [f"{each.entry.caption} Results: [`results/{each.store}`](../results/{each.store}).", ""]
    wanted = dict.fromkeys([store for picture in PICTURES for store in picture.stores] + ["trajectories"])
    _, missing = named_stores(results, list(wanted))
    if missing:
        lines += ["## Not there yet", "", *(f"- {sentence}" for sentence in missing), ""]
    return "\n".join(lines)


def render(pictures: list[Shown], folder: Path) -> None:
    """Write the pictures as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{picture.name}.png" for picture in pictures]
    drawn = [_sized(picture.entry.figure) for picture in pictures]
    plotly.io.write_images(drawn, files, width=WIDTH, height=[f.layout.height for f in drawn], scale=SCALE)
    for picture, file in zip(pictures, files, strict=True):
        text = PngImagePlugin.PngInfo()
        text.add_text(STAMP, picture.stamp)
        small = io.BytesIO()
        with Image.open(file) as image:
            image.convert("RGB").quantize(COLORS, kmeans=2, dither=Image.Dither.NONE).save(
                small, "png", optimize=True, pnginfo=text
            )
        file.write_bytes(small.getvalue())


def _sized(figure: go.Figure) -> go.Figure:
    """The figure as it is at first in a report, but of rows to choose from the one with the best Avg, named in the title."""
    still = go.Figure(figure).update_layout(width=WIDTH)
    if figure.layout.meta.get("choose"):
        best = max((trace.meta for trace in figure.data), key=lambda meta: meta["rank"] or 0.0)
        still.for_each_trace(lambda trace: trace.update(visible=trace.meta["group"] == best["group"]))
        still.update_layout(title=f"{figure.layout.title.text}: {best['label']}")
    return still


def stale(pictures: list[Shown], folder: Path) -> list[str]:
    """Names of pictures that are missing or show other results, and of files that no picture has."""
    files = {file.stem: file for file in folder.glob("*.png")}
    names = [picture.name for picture in pictures]
    old = [picture.name for picture in pictures if _stamp_of(files.get(picture.name)) != picture.stamp]
    return old + sorted(set(files) - set(names))


def _stamp_of(file: Path | None) -> str | None:
    if file is None:
        return None
    with Image.open(file) as image:
        return str(image.info.get(STAMP))


@click.command(help=__doc__)
@click.option("--check", is_flag=True, help="Change nothing; fail if a picture is out of date.")
def main(check: bool) -> None:
    pictures = list(shown())
    if check:
        old = stale(pictures, FOLDER)
        for name in old:
            click.echo(f"out of date: docs/gallery/{name}.png; `python docs/gallery.py` renders it")
        sys.exit(1 if old else 0)
    for file in FOLDER.glob("*.png"):
        file.unlink()
    render(pictures, FOLDER)
    size = sum(file.stat().st_size for file in FOLDER.glob("*.png"))
    click.echo(f"written: {len(pictures)} pictures, {size / 2**20:.2f} MiB, in {FOLDER.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
