"""Where weights live: tensors of a checkpoint on disk, read range by range, and the slots of memory they are read into."""

from __future__ import annotations

from moesaic.store.reader import PageCache, Reader, ReadFailed, Ticket
from moesaic.store.slots import Slots
from moesaic.store.table import Range, Table

__all__ = ["PageCache", "Range", "ReadFailed", "Reader", "Slots", "Table", "Ticket"]
