"""Grid files: what of YAML they may hold, included ones, overrides, settings taken from another one."""

from __future__ import annotations

from pathlib import Path

import pytest

from zeroflow.errors import ConfigError
from zeroflow.grid.grid_file import load_grid
from zeroflow.grid.yaml_loader import parse_yaml
from zeroflow.optim import optimizers
from zeroflow.trial.config import TrialConfig


def put(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


def test_an_included_grid_brings_its_cells_as_its_own_file_has_them(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    put(tmp_path / "parts", one="base: {epochs: 3, tasks: 5}\ngrid: [{method: ease, seed: [0, 1]}]\ndata_dir: /there")
    put(
        tmp_path,
        two="grid: [{method: simplecil}, {method: ease, epochs: 7}]\nplacement: {cpus_per_worker: 4}",
        inner="include: [parts/one.yaml]",
        union="include: [two.yaml, inner.yaml, parts/one.yaml]\nbase: {epochs: 7}\n"
        "grid: [{method: ease}, {method: ease, seed: 5}]",
    )
    grid = load_grid(tmp_path / "union.yaml")
    parts = [load_grid(tmp_path / "two.yaml"), load_grid(tmp_path / "parts" / "one.yaml")]
    assert list(grid.cells) == [*parts[0].cells, *parts[1].cells, TrialConfig.from_dict({"epochs": 7, "seed": 5})]
    assert [(c.tasks, c.epochs) for c in grid.cells] == [(10, None), (10, 7), (5, 3), (5, 3), (10, 7)]
    assert len({c.cell_id for c in grid.cells}) == len(grid.cells) == 5
    assert grid.placement.cell.cpus_per_worker == 1 and grid.data_dir is None, "an included file's count for it alone"
    assert [c.seed for c, _ in grid.own] == [0, 5]


def test_overrides_hold_for_included_cells_too(tmp_path: Path) -> None:
    put(
        tmp_path,
        one="grid: [{method: ease, epochs: 3}]",
        two="grid: [{method: simplecil}, {method: ease}]",
        both="include: [one.yaml, two.yaml]",
        nothing="grid: [{method: simplecil}]",
        mixed="include: [nothing.yaml]\ngrid: [{method: ease}]",
    )
    cells = load_grid(tmp_path / "both.yaml", {"epochs": 2, "seed": [4, 5]}).cells
    assert sorted((c.method, c.epochs, c.seed) for c in cells) == [
        ("ease", 2, 4),
        ("ease", 2, 5),
        ("simplecil", None, 0),
    ]
    # An option that only some of the files know is dropped elsewhere, as within one file.
    ease, frozen = sorted(
        load_grid(tmp_path / "mixed.yaml", {"method_options.alpha": 0.5}).cells, key=lambda c: c.method
    )
    assert (dict(ease.method_options), dict(frozen.method_options)) == ({"alpha": 0.5}, {})
    with pytest.raises(ConfigError, match="--set: unknown option in method_options 'alfa'; did you mean 'alpha'"):
        load_grid(tmp_path / "mixed.yaml", {"method_options.alfa": 0.5})


def test_settings_are_taken_from_another_grid_before_the_own_ones(tmp_path: Path) -> None:
    put(
        tmp_path,
        first="grid: [{method: ease}]\nsettings: [{when: {optimizer: zo-sgd}, set: {lr: 0.1, epochs: 3}}]",
        second="settings_from: [first.yaml]\ngrid: [{method: ease}]\n"
        "settings: [{when: {optimizer: zo-sgd}, set: {lr: 0.2}}]",
        third="settings_from: [second.yaml]\ngrid: [{optimizer: [zo-sgd, fo-sgd]}]\n"
        "settings: [{when: {optimizer: zo-sgd}, set: {eps: 0.5}}]",
    )
    zo, fo = load_grid(tmp_path / "third.yaml").cells
    assert (zo.lr, zo.epochs, zo.eps) == (0.2, 3, 0.5)
    assert (fo.lr, fo.epochs) == (optimizers.get("fo-sgd").default_lr, TrialConfig.epochs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("include: [a.yaml]", r"a.yaml: include: .*a.yaml leads back to itself: .*a.yaml -> .*a.yaml"),
        ("include: [b.yaml]", r"b.yaml: include: .*a.yaml leads back to itself: .*a.yaml -> .*b.yaml -> .*a.yaml"),
        ("grid: [{}]\nsettings_from: [c.yaml]", r"c.yaml: settings_from: .*a.yaml leads back to itself"),
        ("include: [tabel.yaml]", r"a.yaml: include: .*tabel.yaml: cannot be read: No such file.*did you mean 'table.yaml'"),
        ("include: table.yaml", "include: expected a list of grid files, got 'table.yaml'"),
        ("include: []", "include: expected a list of grid files"),
        ("include: [1]", "include: expected a list of grid files"),
        ("include: [list.yaml]", r"list.yaml: expected a mapping with a 'grid' list, got list"),
        ("include: [bad.yaml]", r"bad.yaml: grid\[0\]: unknown key 'metod'"),
        ("include: [table.yaml]\nbase: {epochs: 1}", "base: concerns the cells of this file's own 'grid'"),
        ("name: a", "grid: expected a list of mappings .* or an 'include' list"),
        ("grid: [{}]\nsettings_from: [list.yaml]", "list.yaml: expected a mapping"),
        ("include: [sub]", "sub: cannot be read"),
    ],
)  # fmt: skip
def test_bad_references_to_other_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "sub").mkdir()
    put(
        tmp_path,
        a=text,
        b="include: [a.yaml]",
        c="grid: [{}]\nsettings_from: [a.yaml]",
        table="grid: [{method: ease}]",
        list="- 1",
        bad="grid: [{metod: ease}]",
    )
    with pytest.raises(ConfigError, match=message):
        load_grid(tmp_path / "a.yaml")


def test_a_file_may_include_one_that_takes_its_settings(tmp_path: Path) -> None:
    put(
        tmp_path,
        a="include: [b.yaml]\ngrid: [{method: ease}]\nsettings: [{when: {}, set: {lr: 0.7}}]",
        b="settings_from: [a.yaml]\ngrid: [{method: ease, seed: 1}]",
    )
    assert [c.lr for c in load_grid(tmp_path / "a.yaml").cells] == [0.7, 0.7]


def test_merge_keys_and_anchors_work() -> None:
    """What YAML 1.1 says of ``<<``: own keys before merged ones, the first of several mappings before the others."""
    text = """
base: &common {optimizer: fo-sgd, options: &own {bottleneck: 4, scale: 0.1}}
one: {<<: *common, optimizer: zo-sgd, options: {<<: *own, scale: 1.0}}
two: &two {<<: [{lr: 1e-3}, *common], epochs: 2}
three: {<<: *two, lr: 2.0}
"""
    found = parse_yaml(text, "grid.yaml")
    assert found["one"] == {"optimizer": "zo-sgd", "options": {"bottleneck": 4, "scale": 1.0}}
    assert found["two"] == {"lr": 1e-3, "optimizer": "fo-sgd", "options": {"bottleneck": 4, "scale": 0.1}, "epochs": 2}
    assert found["three"] == {**found["two"], "lr": 2.0}


@pytest.mark.parametrize(
    ("text", "said", "line", "column"),
    [
        ("a: &a [1, *a]", "an anchor is used inside its own value", 1, 4),
        ("x: 1\na: &a {b: {c: *a}}", "an anchor is used inside its own value", 2, 4),
        ("a: {b: 1, b: 2}", "key 'b' is given twice", 1, 11),
        ("a: {<<: {b: 1}, <<: {c: 1}}", "key '<<' is given twice", 1, 17),
        ("on: 1", "key True is not a string", 1, 1),
        ("a: 1\nb: 2026-11-29", "a timestamp is not allowed here", 2, 4),
        ("a: !!binary aGk=", "a binary is not allowed here", 1, 4),
        ("a: !!set {b}", "a set is not allowed here", 1, 4),
        ("a: !!python/object:os.system {}", "could not determine a constructor", 1, 4),
        ("a: *b", "found undefined alias 'b'", 1, 4),
    ],
)
def test_other_yaml_is_refused_by_name_and_place(text: str, said: str, line: int, column: int) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "grid.yaml")
    assert str(caught.value).startswith("grid.yaml: not valid YAML: ") and said in str(caught.value)
    assert f"line {line}, column {column}" in str(caught.value), str(caught.value)
