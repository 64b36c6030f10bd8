"""What a run of rounds moves from round to round: kept in memory and in a file, so that a resumed run takes up what it had."""

from __future__ import annotations

from pathlib import Path
from typing import Generic, TypeVar

from base_models.checkpoint import read_json, write_json
from base_models.errors import UserError

Value = TypeVar("Value")


class ByRound(Generic[Value]):
    """A value of every round. What a run did after the round that it resumes from is forgotten; the file is read by a resumed run alone, so
    that nodes of a run that was not interrupted need no disk in common."""

    def __init__(self, path: Path, writes: bool) -> None:
        """path: of a JSON file. writes: whether this process keeps it."""
        self.path, self.writes = path, writes
        self.known: dict[str, Value] = {}

    def before(self, number: int) -> Value:
        """The value of the round before `number`, which is not the first. UserError where neither memory nor the file has it."""
        name = str(number - 1)
        self._recall(name)
        if name not in self.known:
            expected, remedy = f"the value of round {name} in it", "restore the file, or resume with the settings that the run began with"
            raise UserError(f"round {number} and {self.path} without the one before", expected, remedy)
        return self.known[name]

    def put(self, number: int, value: Value) -> None:
        """Of round `number`; later ones are no more."""
        if number:
            self._recall(str(number - 1))
        self.known = {name: known for name, known in self.known.items() if int(name) < number} | {str(number): value}
        if self.writes:
            write_json(self.path, self.known)

    def _recall(self, name: str) -> None:
        """Read the file where memory lacks a round: a resumed run."""
        if name not in self.known and self.path.is_file():
            self.known = read_json(self.path)
