"""Where results are kept: tables with a case a line, which several processes may add to, and single documents."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Table:
    """A JSON lines file: one record a line, one line a case.

    Attributes:
        path: The file; it appears with the first record.
        key: The fields that tell cases apart. The lines are sorted by them; a record may lack some.
    """

    path: Path
    key: tuple[str, ...]

    def read(self) -> list[dict]:
        """Return all records, in the order of the file."""
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def find(self, case: Mapping) -> dict | None:
        """Return the record of a case, if there is one; fields of ``case`` outside the key do not matter."""
        wanted = self._values(case)
        return next((record for record in self.read() if self._values(record) == wanted), None)

    def contains(self, case: Mapping) -> bool:
        """Return whether a case has a record."""
        return self.find(case) is not None

    def add(self, record: dict) -> bool:
        """Add the record, unless its case has one already; return whether it was added.

        Other processes may do the same at the same time. Who reads meanwhile sees the old file or the new one.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.path.parent):
            if self.contains(record):
                return False
            records = sorted([*self.read(), record], key=self._order)
            write_whole(self.path, "".join(json.dumps(each) + "\n" for each in records))
        return True

    def _values(self, record: Mapping) -> tuple:
        return tuple(record.get(name) for name in self.key)

    def _order(self, record: Mapping) -> tuple:
        return tuple((value is not None, value) for value in self._values(record))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time into the block; the lock goes with the process that holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_document(path: Path, result: dict) -> None:
    """Write one result that is not a table's, as indented JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(result, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
