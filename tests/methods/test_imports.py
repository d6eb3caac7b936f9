"""Methods of one's own in a Python file that the command line names: they run in every process, and travel as text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner
from real_sweeps import Sweep

import zeroflow
from zeroflow import ConfigError, TrialConfig
from zeroflow.cli import main
from zeroflow.data import datasets
from zeroflow.grid.grid_file import parse_grid
from zeroflow.grid.plan import make_plan
from zeroflow.imports import SourceFile, imports_of, run_source
from zeroflow.methods import methods
from zeroflow.optim import NonFiniteLoss, optimizers
from zeroflow.results import Store, merge, rows
from zeroflow.results.agreement import several_versions

METHOD = """
from dataclasses import dataclass
from zeroflow.methods.aper import APERAdapter
from zeroflow.methods.method import register_method
from zeroflow.methods.simplecil import SimpleCIL

@register_method("my-means", "class means, most of their scores halved")
class MyMeans(SimpleCIL):
    @dataclass(frozen=True)
    class Options(SimpleCIL.Options):
        factor: float = 0.5

    def scores(self, features):
        scores = super().scores(features)
        return scores * self.options.factor if FIRST else -scores

@register_method("my-aper", "as aper-adapter")
class MyAPER(APERAdapter): ...

FIRST = True
"""

GRID = """
imports: [own/my_method.py]
base: {checkpoint: none, image_size: 7, tasks: 20, stop_after: 2, epochs: 1, batch_size: 100, lr: 1e-4}
grid:
  - {method: [my-means, simplecil]}
  - {method: [my-aper, aper-adapter], optimizer: zo-sgd}
placement: {gpus_per_worker: 0, max_concurrent: 1}
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A grid that needs a file in another folder."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "my_method.py").write_text(METHOD)
    (tmp_path / "grid.yaml").write_text(GRID)
    return tmp_path


def command(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "zeroflow.cli", *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.ray
@pytest.mark.slow
def test_a_method_in_a_file_runs_in_all_processes_of_a_sweep(own: Path) -> None:
    """Its rows are those of the method that it repeats, and say which file they come from."""
    file, out = own / "own" / "my_method.py", own / "out"
    sweep = Sweep(own / "grid.yaml", out, "--import", str(file))
    assert "4 of 4 cells done" in sweep.wait(), sweep.output()
    rows = {row["method"]: row for row in zeroflow.results.load(out, "trials").to_pylist()}
    for mine, other in (("my-means", "simplecil"), ("my-aper", "aper-adapter")):
        for key in ("avg", "last", "fgt", "final_loss", "forward_passes"):
            assert rows[mine][key] == rows[other][key], key
        assert json.loads(rows[mine]["imports"]) == {"my_method.py": SourceFile(str(file), METHOD).digest}
        assert rows[other]["imports"] is None
    # Another text of the file is another method: its rows must not stand beside those of the first.
    file.write_text(METHOD.replace("FIRST = True", "FIRST = False"))
    again = command("sweep", "--grid", "grid.yaml", "--results", out, "--import", file, folder=own)
    assert again.returncode == 2 and "was computed with another my_method.py (" in again.stderr, again.stderr
    elsewhere = command("plan", "--grid", "grid.yaml", "--results", own / "new", "--import", file, folder=own)
    assert elsewhere.returncode == 0 and "4 to run" in elsewhere.stdout


FORGOTTEN = """
from dataclasses import dataclass
from zeroflow.classifiers import register_classifier
from zeroflow.classifiers.class_means import ClassMeans

@register_classifier("{name}", "made by a test")
class Mine(ClassMeans):
    {decorator}
    class Options{base}:
        share: float = 0.5
{scores}
"""


@pytest.mark.parametrize(("decorator", "base"), [("", ""), ("", "(ClassMeans.Options)")])
def test_options_without_a_dataclass_are_refused(tmp_path: Path, decorator: str, base: str) -> None:
    """Python would see no field of theirs, and a grid's options would be unknown."""
    file = tmp_path / f"forgotten{len(base)}.py"
    file.write_text(FORGOTTEN.format(name="forgotten", decorator=decorator, base=base, scores=""))
    expected = (
        r"classifier 'forgotten': class Mine\.Options is not a dataclass; write @dataclass\(frozen=True\) above it"
    )
    with pytest.raises(ConfigError, match=expected):
        zeroflow.import_file(file)


def test_a_classifier_that_lacks_a_method_is_refused_where_it_is_registered(tmp_path: Path) -> None:
    file = tmp_path / "vote.py"
    file.write_text(
        "from zeroflow.classifiers import Classifier, register_classifier\n"
        "@register_classifier('vote', 'made by a test')\nclass Vote(Classifier):\n"
        "    def begin_task(self, classes, width, generator): ...\n    def add(self, features, labels): ...\n"
        "    def scores(self, features): ...\n"
    )
    with pytest.raises(ConfigError, match=r"classifier 'vote': Vote must also define end_task, merge"):
        zeroflow.import_file(file)


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ("features", r"SimpleCIL with classifier 'wrong-\d': scores of shape \(\d+, 192\), expected \(\d+, 5\)"),
        ("cosine * float('nan')", r"with classifier 'wrong-\d': \d+ of \d+ test samples .* that are not finite$"),
    ],
)
def test_wrong_scores_are_those_of_the_classifier(tmp_path: Path, returned: str, expected: str) -> None:
    """Nothing is trained, so no learning rate is to blame."""
    name = f"wrong-{len(returned) % 10}"
    scores = f"    def scores(self, features):\n        cosine = super().scores(features)\n        return {returned}"
    file = tmp_path / f"{name}.py"
    file.write_text(FORGOTTEN.format(name=name, decorator="@dataclass(frozen=True)", base="", scores=scores))
    zeroflow.import_file(file)
    cell = {"method": "simplecil", "classifier": name, "tasks": 20, "stop_after": 1}
    with pytest.raises((ValueError, NonFiniteLoss), match=expected):
        zeroflow.run_trial(TrialConfig.from_dict(cell))


def test_several_values_of_an_option_are_written_as_an_axis() -> None:
    with pytest.raises(ConfigError, match=r"an axis is written classifier_options\.ridge: \[0\.1, 1\]"):
        parse_grid({"grid": [{"method": "acil", "classifier_options": {"ridge": [0.1, 1]}}]})


def test_an_unknown_name_may_be_one_that_was_not_imported() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown method 'my-own-idea'; known: .*must be imported first \(--import FILE\)"
    ):
        parse_grid({"grid": [{"method": "my-own-idea"}]})


@pytest.fixture(scope="module")
def two_texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, pa.Table]]:
    """Digest of an imported file, and the rows of a cell of its method."""
    file = tmp_path_factory.mktemp("own") / "two_texts.py"
    file.write_text(METHOD.replace("my-", "two-texts-"))
    digest = zeroflow.import_file(file).digest
    cell = {"method": "two-texts-means", "checkpoint": "none", "image_size": 7, "tasks": 20, "stop_after": 1}
    return digest, rows.tables(zeroflow.run_trial(TrialConfig.from_dict(cell)))


def of_another_text(tables: dict[str, pa.Table]) -> dict[str, pa.Table]:
    """Rows as another text of the file gives them, of the same cell."""
    trials = tables["trials"]
    place = trials.schema.get_field_index("imports")
    other = pa.array([json.dumps({"two_texts.py": "0123456789ab"})])
    return {**tables, "trials": trials.set_column(place, "imports", other)}


@pytest.mark.parametrize("seed", [1993, 1])
def test_a_text_adds_nothing_to_results_of_another(
    seed: int, two_texts: tuple[str, dict[str, pa.Table]], tmp_path: Path
) -> None:
    """Neither in a cell's place nor beside it, where both would be averaged as one method's."""
    digest, tables = two_texts
    store = Store(tmp_path)
    store.write(of_another_text(tables))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.parquet")}
    cell = {**json.loads(tables["trials"]["config"][0].as_py()), "class_order_seed": seed}
    expected = rf"was computed with another two_texts\.py \(0123456789ab, now {digest}\); write into other results"
    grid = {"grid": [{key: [value] if isinstance(value, list) else value for key, value in cell.items()}]}
    with pytest.raises(ConfigError, match=expected):
        make_plan(parse_grid(grid), store, None)
    settings = [f"--set={key}={json.dumps(value)}" for key, value in cell.items()]
    refused = CliRunner().invoke(main, ["run", *settings, "--results", str(tmp_path)])
    assert refused.exit_code == 2 and "was computed with another two_texts.py" in refused.output, refused.output
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.parquet")} == before
    assert make_plan(parse_grid({"grid": [{"method": "simplecil"}]}), store, None).missing, (
        "another method may stand there"
    )


def test_results_of_two_texts_are_not_merged_and_a_reader_is_told(
    two_texts: tuple[str, dict[str, pa.Table]], tmp_path: Path
) -> None:
    digest, tables = two_texts
    one, other = Store(tmp_path / "one"), Store(tmp_path / "other")
    one.write(tables)
    other.write(of_another_text(tables))
    expected = rf"results of 2 versions of two_texts\.py stand side by side: 0123456789ab, {digest}"
    with pytest.raises(ConfigError, match=expected + "; nothing was merged"):
        merge(tmp_path / "new", one, other)
    assert not (tmp_path / "new").exists()
    # As two stores are read together.
    trials = pa.concat_tables([one.load("trials"), other.load("trials")])
    assert several_versions(trials) and not several_versions(one.load("trials"))


OTHER_KINDS = """
import dataclasses
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from zeroflow.data import datasets

datasets.register_family("drawn", lambda name: dataclasses.replace(datasets.get("quickdraw100"), name=f"drawn:{name}"))

@register_model
def an_own_small_vit(pretrained=False, **settings):
    known = {key: value for key, value in settings.items() if key in ("img_size", "num_classes", "in_chans")}
    return VisionTransformer(**{"img_size": 28, "patch_size": 7, "embed_dim": 64, "depth": 2, "num_heads": 2, **known})
"""


def test_families_of_data_sets_and_timms_models_count_as_named_too(tmp_path: Path) -> None:
    (tmp_path / "other_kinds.py").write_text(OTHER_KINDS)
    digest = zeroflow.import_file(tmp_path / "other_kinds.py").digest
    cell = {"method": "simplecil", "checkpoint": "none"}
    for values in ({"dataset": "drawn:well"}, {"backbone": "an_own_small_vit"}):
        assert imports_of(TrialConfig.from_dict({**cell, **values})) == {"other_kinds.py": digest}
    assert imports_of(TrialConfig.from_dict({**cell, "backbone": "vit_tiny_patch16_224"})) == {}


def test_a_file_that_ends_the_process_is_refused(tmp_path: Path) -> None:
    """Else a sweep would end with status 0, and nothing done."""
    (tmp_path / "script.py").write_text("import sys\n\nsys.exit(0)\n")
    with pytest.raises(ConfigError, match=r"script\.py: does not run: line 3: SystemExit: 0"):
        zeroflow.import_file(tmp_path / "script.py")


@pytest.mark.slow
def test_a_grid_file_alone_runs_no_code(own: Path) -> None:
    (own / "own" / "my_method.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    refused = command("plan", "--grid", "grid.yaml", folder=own)
    assert refused.returncode == 2 and not (own / "ran").exists()
    assert refused.stderr.splitlines()[-1] == (
        "Error: grid.yaml: imports: own/my_method.py: a grid file runs no Python by itself; name it on the command line "
        "too: --import own/my_method.py"
    )


@pytest.mark.parametrize(
    ("imports", "message"),
    [
        ("my.py", "g.yaml: imports: expected a list of Python files, got 'my.py'"),
        ([], r"g.yaml: imports: expected a list of Python files, got \[\]"),
        (["no_such.py"], "g.yaml: imports: no_such.py: no such file"),
    ],
)
def test_a_wrong_section_is_refused(imports: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_grid({"imports": imports, "grid": [{"method": "simplecil"}]}, where="g.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\ny = x +\n", r"a\.py: does not run: line 2: SyntaxError: invalid syntax"),
        ("import no_such_module_at_all\n", r"line 1: ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        (
            "from zeroflow import TrialConfig, run_trial\nrun_trial(TrialConfig())\n",
            r'line 2: ConfigError: a trial is run while the file is imported; put that below if __name__ == "__main__":',
        ),
        ("def f():\n    raise RuntimeError('no')\n\nf()\n", r"line 2: RuntimeError: no"),
        (
            "from zeroflow.methods import SimpleCIL, register_method\n@register_method('half', 'mine')\nclass A(SimpleCIL): ...\n"
            "@register_method('ease', 'mine')\nclass B(SimpleCIL): ...\n",
            r"line 4: ConfigError: method 'ease' is registered already",
        ),
        (
            "from zeroflow.data import datasets\ndatasets.register_family('half', str)\ndatasets.register_family('folder', str)\n",
            r"line 3: ConfigError: dataset 'folder' is registered already",
        ),
        (b"\xff\xfe", r"cannot be read: 'utf-8' codec can't decode"),
    ],
)
def test_a_file_that_does_not_run_is_refused_with_its_line(text: str | bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(text if isinstance(text, bytes) else text.encode())
    before = methods.names(), optimizers.names(), dict(datasets.families)
    with pytest.raises(ConfigError, match=message):
        zeroflow.import_file(tmp_path / "a.py")
    assert (methods.names(), optimizers.names(), dict(datasets.families)) == before


def test_a_file_runs_once_and_another_one_of_its_name_is_refused(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    source = SourceFile("/far/away/only_here.py", f"open({str(ran)!r}, 'a').write('x')\n")
    run_source(source)
    run_source(SourceFile("/elsewhere/only_here.py", source.text))
    assert ran.read_text() == "x"
    with pytest.raises(ConfigError, match=r"another only_here\.py is imported already"):
        run_source(SourceFile("/far/away/only_here.py", source.text + "# changed\n"))
