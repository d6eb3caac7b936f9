"""The Parquet store of finished cells, and what is read out of it: tables, figures, a report. Needs no torch."""

from zeroflow.results.merging import merge
from zeroflow.results.packing import pack
from zeroflow.results.reading import load
from zeroflow.results.schema import SCHEMA_VERSION, SCHEMAS
from zeroflow.results.store import Store

__all__ = ["SCHEMAS", "SCHEMA_VERSION", "Store", "load", "merge", "pack"]
