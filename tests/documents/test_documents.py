"""The documents: examples run, links lead somewhere, pictures show the committed results, the API reference builds."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import yaml
from PIL import Image
from places import ROOT

from zeroflow.grid.grid_file import load_grid

DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *ROOT.glob("zeroflow/**/*.md")])

FENCE = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^()\s]+)\)")

CHECKS = {
    "optimizer": """
from zeroflow.optim.testing import run_conformance, subject
assert all(after < 0.7 * before for before, after in zip(losses[::10], losses[10::10])), "it falls, as the page says"
assert [outcome for outcome in run_conformance(subject("zo-steepest")) if outcome.passed is False] == []
""",
    "method that trains nothing": """
def mine(**settings):
    return run_trial(TrialConfig.from_dict({"tasks": 50, "stop_after": 2, "image_size": 14, **settings})).summary["avg"]
assert mine(method="power-means", method_options={"power": 1.0}) == mine(method="simplecil")
assert mine(method="power-means") != mine(method="simplecil")
""",
    "method": """
import math
def result(**settings):
    cell = dict(method="scaled-features", tasks=50, stop_after=2, epochs=1, image_size=14, **settings)
    return run_trial(TrialConfig.from_dict(cell))
for training in ({"optimizer": "zo-sgd", "lr": 1e-3}, {"optimizer": "fo-adam", "lr": 0.05}):
    held, free = (result(method_options={"alpha": a}, **training) for a in (1.0, 0.0))
    assert all(math.isfinite(step.loss) for step in held.steps)
    assert [step.loss for step in free.steps] != [step.loss for step in held.steps]
assert free.accuracy_matrix[0, 0] > 70, "it learns two classes"
""",
    "file": """
from zeroflow.classifiers import classifiers
features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) + torch.arange(2).repeat(20)[:, None]
halves = [classifiers.get("diagonal").build() for _ in range(3)]
for half, part in zip(halves, (slice(0, 20), slice(20, 40), slice(0, 40))):
    half.begin_task(range(2), 6, None)
    half.add(features[part], torch.arange(2).repeat(20)[part])
halves[0].merge(halves[1])
torch.testing.assert_close(halves[0].scores(features), halves[2].scores(features))
def average(power):
    own = {**cell, "classifier": "diagonal", "classifier_options": {"power": power}, "stop_after": 2}
    return run_trial(TrialConfig.from_dict(own)).summary["avg"]
assert result.summary["avg"] > 46 and average(1.0) != average(2.0)
""",
    "tuning": """
assert result.summary["trainable_parameters"] > 192 and result.summary["last"] > 50
""",
    "data set": """
found = run_trial(TrialConfig.from_dict(cell))
assert found.accuracy_matrix.shape == (5, 5) and found.summary["last"] > 40, found.summary
assert found.class_names[0] == load().class_names[found.class_order[0]]
""",
    "backbone": """
assert (backbone.width, backbone.depth) == (64, 2)
assert run_trial(TrialConfig.from_dict({**cell, "method": "simplecil"})).summary["forward_passes"] == 0
""",
    "exported program": """
assert (backbone.width, backbone.image_size) == (24, 28)
torch.testing.assert_close(backbone(images[:1]), model(images[:1]))
""",
}
"""What must hold after each example of the two pages on extending, in its own names."""

EXAMPLE = re.compile(r"^## (?:An?|1\. The) (\w[\w ]*)\n(.*?)(?=^## |\Z)", re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_the_examples_of_extending_run(tmp_path: Path) -> None:
    """Each alone in a fresh namespace, as a reader runs it, and then in use."""
    pages = "\n".join((DOCS / name).read_text() for name in ("own_method.md", "extending.md"))
    blocks = {
        heading: re.findall(r"```python\n(.*?)```", section, re.DOTALL) for heading, section in EXAMPLE.findall(pages)
    }
    assert set(blocks) == set(CHECKS) and all(len(found) == 1 for found in blocks.values())
    assert all(found[0].count("\n") <= 44 for found in blocks.values())
    programs = [blocks[heading][0] + check for heading, check in CHECKS.items()]
    program = f"for text in {programs!r}: exec(text, {{'__name__': '__main__'}})"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_the_grid_of_an_own_method_can_be_planned(tmp_path: Path) -> None:
    """The page's file and grid, with the part that trains, side by side as it says; nothing is run."""
    page = (DOCS / "own_method.md").read_text()
    (tmp_path / "my_classifier.py").write_text(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0])
    grid, training = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "my_grid.yaml").write_text(grid + training)
    command = [sys.executable, "-m", "zeroflow", "plan", "--grid", "my_grid.yaml", "--import", "my_classifier.py"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert run.returncode == 0 and "11 cells: 0 done, 0 failed, 11 to run" in run.stdout, run.stdout + run.stderr


@pytest.mark.slow
def test_a_package_may_bring_a_backbone(tmp_path: Path) -> None:
    """Found by its entry point, as an installed one would be."""
    page = (DOCS / "extending.md").read_text()
    text = re.findall(r"```python\n(.*?)```", page[page.index("## A backbone") :], re.DOTALL)[0]
    (tmp_path / "mine.py").write_text(text[: text.index("if __name__")])
    (tmp_path / "mine-1.dist-info").mkdir()
    (tmp_path / "mine-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
    (tmp_path / "mine-1.dist-info" / "entry_points.txt").write_text("[zeroflow.backbones]\nmine = mine\n")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from zeroflow.trial.config import TrialConfig; "
        "print(TrialConfig.from_dict({'backbone': 'my_small_vit', 'checkpoint': 'none'}).backbone)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert run.stdout.strip() == "my_small_vit", run.stderr


def test_the_grids_in_the_pages_are_right(tmp_path: Path) -> None:
    found = 0
    for page in (ROOT / "README.md", DOCS / "getting_started.md", DOCS / "grids.md"):
        for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL):
            if "grid" in yaml.safe_load(block):
                file = tmp_path / f"grid{found}.yaml"
                file.write_text(block)
                assert len(load_grid(file).cells) > 5
                found += 1
    assert found >= 2


def test_the_readme_is_short_and_begins_with_what_to_type() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 900
    commands = [line.split() for line in text.splitlines() if line.startswith("    ")]
    assert text.startswith("# zeroflow\n\n    make") and [line[1] for line in commands[:2]] == ["sweep", "test"]


@pytest.mark.slow
def test_the_front_page_has_the_best_row_of_each_kind() -> None:
    import front

    best, compared = front.best_rows(ROOT / "results")
    assert list(best) == list(front.KINDS), "none is missing"
    for name, row in best.items():
        assert front.kind(row) == name
        assert not [other for other in compared if front.kind(other) == name and other.avg.mean > row.avg.mean + 0.005]
    assert best["closed form"].trainable_parameters == best["no training"].forward_passes == 0
    assert best["a few values by forward passes"].trainable_parameters < front.MANY
    assert not str(best["tens of thousands by forward passes"].config["optimizer"]).startswith("fo-")


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#+ +(.+?) *#*$", FENCE.sub("", page.read_text()), re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        kept = "".join(c for c in text if c in " -_" or unicodedata.category(c)[0] in "LN").replace(" ", "-")
        number = found[kept] = found.get(kept, -1) + 1
        names.add(f"{kept}-{number}" if number else kept)
    return names


def dead_links(page: Path) -> list[str]:
    """Relative links of a page that lead nowhere."""
    dead = []
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        file = page if not target else (page.parent / target).resolve()
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert dead_links(page) == []


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# What, `now`?\n[a](#what-now) [b](#what) [c](other.md) [d](https://example.org)\n```\n[e](no.md)\n```\n"
    )
    assert dead_links(page) == ["#what", "other.md"]


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "index.md").read_text()
    assert [page.name for page in DOCS.glob("*.md") if page.name != "index.md" and f"({page.name})" not in index] == []


def test_notebooks_link_to_what_is_there() -> None:
    import nbformat

    for file in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in nbformat.read(file, as_version=4).cells:
            for link in LINK.findall(cell.source) if cell.cell_type == "markdown" else ():
                assert (file.parent / link.partition("#")[0]).exists(), f"{file.name}: {link}"


# Pictures


@pytest.mark.slow
def test_the_gallery_shows_the_committed_results() -> None:
    run = subprocess.run([sys.executable, DOCS / "gallery.py", "--check"], capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stdout + run.stderr


def test_pictures_are_small_light_and_all_used() -> None:
    files = sorted((DOCS / "gallery").glob("*.png"))
    assert files and sum(file.stat().st_size for file in files) < 1.5e6
    used = {Path(link).name for page in PAGES for link in LINK.findall(page.read_text())}
    assert [file.name for file in files if file.name not in used] == []
    for file in files:
        with Image.open(file) as image:
            assert image.width >= 1000 and image.convert("RGB").getpixel((2, 2)) == (255, 255, 255), file.name


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium: apt-get install chromium")
def test_a_picture_is_rendered_and_is_out_of_date_once_its_results_change(tmp_path: Path) -> None:
    import dataclasses

    import gallery
    from everything import everything

    from zeroflow.results import Store

    everything(Store(tmp_path / "results" / "quick"))
    gallery_of = list(gallery.shown(tmp_path / "results", dataset="quickdraw100"))
    (picture,) = (each for each in gallery_of if each.name == "tasks")
    gallery.render([picture], tmp_path / "pictures")
    with Image.open(tmp_path / "pictures" / "tasks.png") as image:
        assert len(set(image.convert("RGB").getdata())) > 10, "something is drawn"
    assert gallery.stale([picture], tmp_path / "pictures") == []
    assert gallery.stale([dataclasses.replace(picture, stamp="other")], tmp_path / "pictures") == ["tasks"]
    assert gallery.stale([], tmp_path / "pictures") == ["tasks"]


# The reference


@pytest.mark.slow
def test_the_api_reference_builds_without_warnings(tmp_path: Path) -> None:
    rooms = ["zeroflow.optim", "zeroflow.optim.factory", "zeroflow.results", "zeroflow.data", "zeroflow.methods"]
    # Types that only a class's own module imports are shown as they are written.
    warnings = ["-W", "error::UserWarning", "-W", "ignore:Error parsing type annotation"]
    command = [sys.executable, *warnings, "-m", "pdoc", "--docformat", "google", "--no-show-source"]
    run = subprocess.run([*command, "-o", tmp_path, *rooms], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and "Warn" not in run.stderr, run.stderr
    text = (tmp_path / "zeroflow" / "optim" / "factory.html").read_text()
    assert "create_optimizer" in text and "Arguments:" in text
