"""From the finished candidates of a search to the values that are chosen, and to rows of the table ``searches``."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from zeroflow.grid.search_plan import Candidate, Search, SearchPlan
from zeroflow.results.schema import SCHEMAS
from zeroflow.results.searches import least_level
from zeroflow.results.store import Store
from zeroflow.trial.config import TrialConfig
from zeroflow.trial.keys.values import as_json

_USUAL = dataclasses.asdict(TrialConfig())


@dataclass(frozen=True)
class SearchOutcome:
    """What a search found.

    Attributes:
        chosen: None: all candidates failed.
        rows: for the table ``searches``.
    """

    search: Search
    chosen: Candidate | None
    rows: Sequence[Mapping[str, Any]]

    @property
    def rule(self) -> dict[str, Any]:
        """The chosen values as a rule of a grid file's ``settings``."""
        assert self.chosen is not None
        return self.search.rule(self.chosen)


def outcomes(plan: SearchPlan, store: Store) -> list[SearchOutcome]:
    """The searches of which every candidate has finished or failed; nothing is written."""
    known = _Known(plan, store)
    return [
        _choose(search, plan, known)
        for search in plan.searches
        if all(config.cell_id in known.ended for candidate in search.candidates for config in candidate.cells)
    ]


def write(found: Sequence[SearchOutcome], store: Store) -> None:
    """Write searches into the store, each in place of an earlier run of it; one that is there as it is stays."""
    there = store.load("searches")
    for outcome in found:
        rows = pa.Table.from_pylist([dict(row) for row in outcome.rows], schema=SCHEMAS["searches"])
        if not there.filter(pc.field("search_id") == outcome.rows[0]["search_id"]).combine_chunks().equals(rows):
            store.write_search(rows)


class _Known:
    """What a store knows of the candidates' cells, by id.

    Attributes:
        accuracy: of finished ones, percent.
        loss: of finished ones, the mean over the last epoch; infinite where none was finite.
        samples: held-out ones that the accuracies are over, where the store says so.
        errors: of failed ones.
        ended: when.
        searches: earlier ones of the grid, what they have in common by id.
    """

    def __init__(self, plan: SearchPlan, store: Store) -> None:
        wanted = {config.cell_id: config for config in plan.candidates.cells}
        ids = pa.array(list(wanted))

        def of(table: str, *columns: str) -> list[dict[str, Any]]:
            rows = store.load(table, ["cell_id", *columns])
            return rows.filter(pc.is_in(rows["cell_id"], ids)).to_pylist()

        trials = {row["cell_id"]: row for row in of("trials", "last", "finished_at")}
        failures = {row["cell_id"]: row for row in of("failures", "error", "failed_at") if row["cell_id"] not in trials}
        self.samples = {row["cell_id"]: int(row["n"]) for row in of("stages", "n") if row["n"]}
        self.accuracy = {cell: float(row["last"]) for cell, row in trials.items()}
        self.errors = {cell: row["error"] for cell, row in failures.items()}
        self.ended = {cell: row["finished_at"] for cell, row in trials.items()}
        self.ended |= {cell: row["failed_at"] for cell, row in failures.items()}
        losses: dict[str, list[float]] = defaultdict(list)
        for step in of("steps", "epoch", "loss"):
            if step["epoch"] == (wanted[step["cell_id"]].epochs or 0) - 1 and step["loss"] is not None:
                losses[step["cell_id"]].append(step["loss"])
        self.loss = {cell: _mean(losses[cell]) if losses[cell] else math.inf for cell in trials}
        earlier = store.load("searches", ["search_id", "search", "shared", "options"]).to_pylist()
        self.searches = {
            row["search_id"]: (json.loads(row["shared"]), set(json.loads(row["options"] or "{}")))
            for row in earlier
            if row["search"] == plan.grid.name
        }

    def id_of(self, search: Search, grid: str) -> str:
        """The id of a search: that of an earlier run, even if it was before a key of cells that is at its default."""
        own, usual = search.search_id(grid), {key: _USUAL[key] for key in search.shared}
        same = (
            name
            for name, (shared, options) in self.searches.items()
            if options == set(search.options) and as_json({**usual, **shared}) == as_json(search.shared)
        )
        return own if own in self.searches else next(same, own)


def _choose(search: Search, plan: SearchPlan, known: _Known) -> SearchOutcome:
    """Of the candidates that held-out samples cannot tell from the best, the smallest lr; then accuracy, loss, smaller eps, order.

    Cannot tell: within one standard error of the best accuracy (Breiman et al., "Classification and Regression Trees", 1984,
    Section 3.4.3). The samples are the same for all seeds, so more seeds do not make it smaller.

    A candidate with a failed cell is out. Over seeds the means count.
    """
    found: list[tuple[Candidate, float, float]] = []
    for candidate in search.candidates:
        cells = [config.cell_id for config in candidate.cells]
        if all(cell in known.accuracy for cell in cells):
            # Rounded: sums in another order must not decide.
            accuracy = round(_mean([known.accuracy[cell] for cell in cells]), 9)
            found.append((candidate, accuracy, _mean([known.loss[cell] for cell in cells])))
    finished = (config.cell_id for candidate, _, _ in found for config in candidate.cells)
    # The same for all candidates: what one row lacks, another one says.
    samples = min((known.samples[cell] for cell in finished if cell in known.samples), default=0)
    enough = least_level(max((accuracy for _, accuracy, _ in found), default=0.0), samples)
    level = [
        (candidate.lr, -accuracy, loss, candidate.eps or 0.0, number)
        for number, (candidate, accuracy, loss) in enumerate(found)
        if accuracy >= enough
    ]
    chosen = found[min(level)[-1]][0] if level else None
    common = {
        "search_id": known.id_of(search, plan.grid.name),
        "search": plan.grid.name,
        "shared": as_json(search.shared),
        "budget": plan.settings.forward_passes,
    }
    rows = []
    for number, candidate in enumerate(search.candidates):
        for config in candidate.cells:
            cell = config.cell_id
            loss = known.loss.get(cell, math.inf)
            rows.append(
                {
                    **common,
                    **{
                        key: getattr(config, key)
                        for key in ("dataset", "method", "optimizer", "queries", "lr", "eps", "seed")
                    },
                    "options": as_json(candidate.options) if search.options else None,
                    "cell_id": cell,
                    "candidate": number,
                    "accuracy": known.accuracy.get(cell),
                    "n": known.samples.get(cell),
                    "final_loss": loss if math.isfinite(loss) else None,
                    "forward_equivalents": candidate.cost // len(candidate.cells),
                    "error": known.errors.get(cell),
                    "chosen": candidate is chosen,
                }
            )
    ended = max(known.ended[row["cell_id"]] for row in rows)
    return SearchOutcome(search, chosen, [{**row, "searched_at": ended} for row in rows])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
