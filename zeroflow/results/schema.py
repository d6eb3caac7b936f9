"""The columns of every table, declared: never inferred from values, so that all files of a table are alike.

A column may be added at any time (older files then read as null, a key of the configuration as ``OLDER`` says). ``SCHEMA_VERSION`` rises only when a column changes
its meaning or type. Every column carries its description, and its unit if it has one, as metadata of the field;
``markdown`` writes them out.
"""

from __future__ import annotations

import pyarrow as pa

SCHEMA_VERSION = 1

_text, _int, _float, _flag = pa.string(), pa.int64(), pa.float64(), pa.bool_()
_time = pa.timestamp("us", tz="UTC")


def _column(name: str, type_: pa.DataType, description: str, unit: str = "") -> pa.Field:
    return pa.field(name, type_, metadata={"description": description} | ({"unit": unit} if unit else {}))


_CELL = _column("cell_id", _text, "hash of the cell's canonical configuration")

_CONFIG = [
    _column("dataset", _text, "registered name of the data set"),
    _column("transform", _text, "registered name of the transform; null: the data set's own"),
    _column("image_size", _int, "side of the images; null: the backbone's own", "pixels"),
    _column("tasks", _int, "number of tasks; equal ones if the next two are null"),
    _column("base_classes", _int, "classes of the first task, the others being equal; null: not such a stream"),
    _column("increments", _text, "classes of every task, JSON; null: what tasks and base_classes say"),
    _column("class_order_seed", _int, "seed of the class order"),
    _column(
        "fixed_class_order", _text, "labels in the order of learning, JSON, or the word sorted; null: from the seed"
    ),
    _column("stop_after", _int, "tasks run, from the first; null: all"),
    _column("validation", _float, "share of the training samples evaluated on in place of test samples; 0: test", "1"),
    _column("backbone", _text, "name of the backbone"),
    _column("checkpoint", _text, "file, hub or none; null: the backbone's own"),
    _column("method", _text, "registered name of the method"),
    _column("method_options", _text, "the method's options that differ from their defaults, JSON"),
    _column("optimizer", _text, "registered name of the optimizer; null: the method does not train"),
    _column("optimizer_options", _text, "the optimizer's options that differ from their defaults, JSON"),
    _column("lr", _float, "initial learning rate"),
    _column("eps", _float, "perturbation size; null: the optimizer has none"),
    _column("queries", _int, "directions per step; null: the optimizer has none"),
    _column("schedule", _text, "learning rate schedule within a task"),
    _column("epochs", _int, "epochs per task"),
    _column("hybrid_epochs", _int, "epochs, from the first, that took the exact gradient"),
    _column("batch_size", _int, "samples per step"),
    _column("seed", _int, "seed of initial values, batch order, augmentation and directions"),
    _column("probe_every", _int, "steps between two looks at function values; null: none"),
    _column("dtype", _text, "floating point type of all computation"),
    _column("access", _text, "how the backbone was reached; null: white-box"),
    _column("loss", _text, "what was trained; null: cross-entropy"),
    _column("classifier", _text, "registered name of the closed-form classifier; null: the method's own"),
    _column("classifier_options", _text, "the classifier's options that differ from their defaults, JSON; null: none"),
    _column(
        "preprocessing",
        _text,
        "how images were cropped and normalised, JSON; null: the transform takes none; older files: mean and std 0.5",
    ),
    _column("later", _text, "from which task on (task, from 1) with which other settings, JSON; null: all tasks alike"),
]

CONFIG_KEYS = tuple(column.name for column in _CONFIG)
"""The configuration's keys, in the order of the columns."""

OLDER = {"validation": 0.0, "hybrid_epochs": 0}
"""What was so before there was a key for it: the null of older files means this."""

_TRIALS = [
    _CELL,
    _column("schema_version", pa.int32(), "version of these columns"),
    _column("status", _text, "done"),
    *_CONFIG,
    _column("config", _text, "every key of the configuration, JSON with sorted keys"),
    _column("avg", _float, "mean over stages of the pooled accuracy", "percent"),
    _column("last", _float, "pooled accuracy after the last stage", "percent"),
    _column("fgt", _float, "mean forgetting", "percentage points"),
    _column("bwt", _float, "mean backward transfer", "percentage points"),
    _column("avg_task_incremental", _float, "avg with the task of every sample told", "percent"),
    _column("last_task_incremental", _float, "last with the task of every sample told", "percent"),
    _column("avg_domain_incremental", _float, "avg of the place within the task; null: unequal tasks", "percent"),
    _column("last_domain_incremental", _float, "last of the place within the task; null: unequal tasks", "percent"),
    _column("final_loss", _float, "training loss of the last step, see steps; null: no step, or not a number"),
    _column("forward_passes", _int, "forward passes of a batch in training, over all tasks"),
    _column(
        "forward_equivalents", _int, "work of training in forward passes: a backward pass counts 2; null: not counted"
    ),
    _column(
        "peak_memory_bytes",
        _int,
        "peak memory of a training step, of a forward pass where nothing is trained; with what the classifier keeps at the end of the "
        "stream",
        "bytes",
    ),
    _column("trainable_parameters", _int, "values trained in a task, in the one that trains the most"),
    _column("seconds", _float, "wall time of the whole cell", "seconds"),
    _column("training_seconds", _float, "wall time of the training steps; null: too few of them were timed", "seconds"),
    _column(
        "seconds_per_epoch",
        _float,
        "training seconds per epoch; null: no training, or too few steps were timed",
        "seconds",
    ),
    _column(
        "requests",
        _int,
        "requests sent to a black box for all tasks of the cell, by other cells too for tasks that it went on from, tries that failed "
        "included; null: there was none",
    ),
    _column("queried_images", _int, "images in those requests"),
    _column(
        "reused_images", _int, "images it was not asked again: an earlier cell of the same results had been answered"
    ),
    _column("images_per_point", _float, "queried and reused images for a percentage point of avg"),
    _column("price", _float, "queried images times the price that was named for a thousand; null: none was"),
    _column("class_order", pa.list_(pa.int32()), "the data set's own label of each new label"),
    _column("class_names", pa.list_(_text), "name of each new label"),
    _column("metric_definitions", _text, "what avg, last and the other metrics mean, JSON"),
    _column("zeroflow_version", _text, "version of zeroflow"),
    _column("torch_version", _text, "version of torch"),
    _column("timm_version", _text, "version of timm"),
    _column("ray_version", _text, "version of Ray; null: run without it"),
    _column("python_version", _text, "version of Python"),
    _column("git_commit", _text, "commit of the code; null: not in a checkout"),
    _column("git_dirty", _flag, "whether tracked files differed from the commit"),
    _column("imports", _text, "imported Python files that it uses something of: hashes by name, JSON; null: none"),
    _column(
        "named",
        _text,
        "weights in files, images of one's own: hashes by their names in the configuration, JSON; null: none",
    ),
    _column("device", _text, "processor the cell ran on"),
    _column("threads", _int, "CPU threads per process"),
    _column("workers", _int, "processes that shared the work of a step"),
    _column("data_shards", _int, "slices into which they cut a mini-batch; null: 1"),
    _column("finished_at", _time, "when the cell was finished, UTC"),
]

_STAGES = [
    _CELL,
    _column("stage", _int, "number of the stage, from 0"),
    _column("accuracy", _float, "pooled top-1 accuracy over all test samples seen so far", "percent"),
    _column("task_incremental", _float, "the same among the classes of each sample's own task", "percent"),
    _column("domain_incremental", _float, "the same of the place within the task; null: unequal tasks", "percent"),
    _column("classes_seen", _int, "classes learned up to this stage"),
    _column("n", _int, "test samples seen so far"),
]

_ACCURACY = [
    _CELL,
    _column("stage", _int, "number of the stage, from 0"),
    _column("task", _int, "number of the task, from 0; never later than the stage"),
    _column("accuracy", _float, "top-1 accuracy on the task's test samples among all classes seen so far", "percent"),
    _column("task_incremental", _float, "the same among the task's own classes", "percent"),
    _column("domain_incremental", _float, "the same of the place within the task; null: unequal tasks", "percent"),
    _column("n", _int, "test samples of the task"),
]

_CONFUSION = [
    _CELL,
    _column("stage", _int, "number of the stage, from 0"),
    _column("true_class", _int, "class of the samples, in the order of learning, from 0"),
    _column("predicted_class", _int, "class they were taken for, among all seen so far"),
    _column("n", _int, "test samples; pairs that did not occur have no row"),
]

_STEPS = [
    _CELL,
    _column("task", _int, "number of the task, from 0"),
    _column("epoch", _int, "epoch within the task, from 0"),
    _column("step", _int, "step within the trial, from 0"),
    _column(
        "loss",
        _float,
        "training loss at the step, without backpropagation the mean of those near its parameters; null: not a number",
    ),
    _column("lr", _float, "learning rate of the step"),
    _column(
        "seconds",
        _float,
        "seconds of the step without data loading; null: its memory was measured, a log gave it again, or the file is older",
    ),
    _column("queries", _int, "directions of the step; null: the optimizer has none"),
]

_PROBES = [
    _CELL,
    _column("task", _int, "number of the task being learned, from 0"),
    _column("step", _int, "step within the trial, from 0, before which it was taken"),
    _column("probe", _text, "function_value: mean cross-entropy over all classes so far, on fixed training samples"),
    _column("loss_old", _float, "loss on the tasks before; null: there are none"),
    _column("loss_new", _float, "loss on the task being learned"),
]

_LANDSCAPE = _column(
    "landscape_id", _text, "hash of the two losses, where they were looked at, and of all runs on them"
)

_LOSSES = [
    _column(
        "x", _float, "along the plane from the start towards the old task's optimum; two-parameters: the first one"
    ),
    _column("y", _float, "square to x, towards the new task's optimum; two-parameters: the second one"),
    _column("loss_old", _float, "loss of the old task"),
    _column("loss_new", _float, "loss of the new task"),
]

_TRAJECTORIES = [
    _LANDSCAPE,
    _column("landscape", _text, "two-parameters, or adapter: the trained values of one adapter"),
    *(
        column
        for column in _CONFIG
        if column.name in ("optimizer", "optimizer_options", "lr", "eps", "queries", "seed")
    ),
    _column("objective", _text, "old-then-new: one task after the other; both: the mean of both losses throughout"),
    _column("step", _int, "step of the run, from 0, before which it was taken; the last one: after the last step"),
    _column("task", _int, "0 while the old task is learned, 1 while the new one is; null: both"),
    *_LOSSES,
    _column("distance", _float, "from the plane; two-parameters: 0"),
]

_SURFACES = [
    _LANDSCAPE,
    _column("landscape", _text, "see trajectories"),
    _column("point", _text, "start, old optimum, new optimum or, of both losses together, balance; null: of the grid"),
    *_LOSSES,
    _column("config", _text, "what the landscape was made of, JSON with sorted keys"),
    *(
        column
        for column in _TRIALS
        if column.name in ("git_commit", "git_dirty", "torch_version", "device", "finished_at")
    ),
]

_FAILURES = [
    _CELL,
    _column("config", _text, "every key of the configuration, JSON with sorted keys"),
    _column("label", _text, "short name of the cell"),
    _column("error", _text, "type of the error"),
    _column("message", _text, "message of the error"),
    _column("traceback", _text, "where the error arose"),
    _column("attempts", _int, "how often the cell was tried"),
    _column("host", _text, "name of the host"),
    _column("failed_at", _time, "when the last attempt ended, UTC"),
]

_SEARCHES = [
    _column("search_id", _text, "hash of what is searched: the grid's name and what its candidates have in common"),
    _column("search", _text, "name of the grid"),
    _CELL,
    *(column for column in _CONFIG if column.name in ("dataset", "method", "optimizer", "queries")),
    _column("shared", _text, "every key that all candidates have in common, JSON with sorted keys"),
    _column("candidate", _int, "its number, from 0, in the order in which a budget pays for them"),
    *(column for column in _CONFIG if column.name in ("lr", "eps", "seed")),
    _column("options", _text, "the searched options by dotted name, JSON with sorted keys; null: none were searched"),
    _column(
        "accuracy", _float, "accuracy on held-out training samples of the first task; null: the cell failed", "percent"
    ),
    _column("n", _int, "held-out samples; null: the cell failed"),
    _column("final_loss", _float, "mean training loss of the last epoch; null: the cell failed, or no finite loss"),
    _column("forward_equivalents", _int, "work of the cell's training as planned, see trials"),
    _column("budget", _int, "forward-equivalents that all candidates of a search may take together"),
    _column("error", _text, "type of the error; null: the cell is finished"),
    _column("chosen", _flag, "whether lr, eps and options of this row were chosen"),
    _column("searched_at", _time, "when the last of the cells ended, UTC"),
]

SCHEMAS: dict[str, pa.Schema] = {
    name: pa.schema(columns, metadata={"description": description, "schema_version": str(SCHEMA_VERSION)})
    for name, description, columns in [
        ("trials", "one row per finished cell", _TRIALS),
        ("stages", "one row per cell and stage", _STAGES),
        ("accuracy", "one row per cell, stage and task seen", _ACCURACY),
        ("confusion", "one row per cell, stage, true class and predicted class", _CONFUSION),
        ("steps", "one row per cell and training step", _STEPS),
        ("probes", "one row per cell, probe and step at which it was taken", _PROBES),
        ("failures", "one row per cell that failed and has not been finished since", _FAILURES),
        ("searches", "one row per search, candidate and seed; a file per search", _SEARCHES),
        (
            "trajectories",
            "one row per run on a landscape of two losses and step looked at; a file per landscape",
            _TRAJECTORIES,
        ),
        ("surfaces", "one row per point of a landscape: a grid, and the points that are named", _SURFACES),
    ]
}


def markdown() -> str:
    """A section per table: what a row is, and every column with its type, its unit and what it means."""
    parts = []
    for name, schema in SCHEMAS.items():
        lines = [f"## {name}", "", f"{_describe(schema.metadata)}.".capitalize(), ""]
        lines += ["| column | type | unit | meaning |", "| --- | --- | --- | --- |"]
        for column in schema:
            meaning = _describe(column.metadata)
            lines.append(
                f"| `{column.name}` | {column.type} | {column.metadata.get(b'unit', b'').decode()} | {meaning} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _describe(metadata: dict[bytes, bytes]) -> str:
    return metadata[b"description"].decode()
