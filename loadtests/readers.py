"""Readers of public traces and of our own: Azure LLM 2023/2024, Mooncake, BurstGPT, JSON lines.

Each reads its file once, line by line, and rebases time so that the first arrival is second 0. A line that
cannot be used is a :class:`TraceFileError` naming file, line and column. Prompt contents and shared prefixes
(Mooncake's ``hash_ids``) are not part of a trace here: only times and lengths are.
"""

from __future__ import annotations

import csv
import json
import math
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO, TypeVar

import numpy as np

from nestedfp.loadtests.traces import ANY, STRICT, Trace

_PROGRESS_EVERY_S = 2.0
_PROGRESS_EVERY_LINES = 100_000
_LONGEST = 2**31 - 1
_Line = TypeVar("_Line")


class TraceFileError(ValueError):
    """A trace file that cannot be used; the message names file, line (1 is the first), column and remedy."""

    def __init__(self, path: Path, line: int, column: str | None, problem: str) -> None:
        where = f"{path}, line {line}" + (f", column {column!r}" if column else "")
        super().__init__(f"{where}: {problem}")
        self.path = path
        self.line = line
        self.column = column


@dataclass(frozen=True)
class _Row:
    """One line of a file: its fields by column name, and where it stands, for messages."""

    path: Path
    line: int
    fields: Mapping[str, object]

    def tokens(self, column: str) -> int:
        """A column as a whole number of tokens, at least 0."""
        value = self._get(column)
        try:
            number = int(value) if isinstance(value, str) else value
        except ValueError:
            raise self.error(column, f"{value!r} is not a whole number of tokens") from None
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= _LONGEST:
            raise self.error(column, f"{value!r} is not a whole number of tokens from 0 to {_LONGEST}")
        return number

    def seconds(self, column: str, unit_s: float = 1.0) -> float:
        """A numeric column counted in ``unit_s`` seconds, as seconds."""
        value = self._get(column)
        try:
            number = float(value) if isinstance(value, (str, int, float)) else math.nan
        except (ValueError, OverflowError):
            number = math.nan
        if isinstance(value, bool) or not math.isfinite(number):
            raise self.error(column, f"{value!r} is not a finite number")
        return number * unit_s

    def instant(self, column: str) -> float:
        """An ISO 8601 date and time as Unix seconds, to the microsecond; UTC where it names no offset."""
        value = self._get(column)
        try:
            moment = datetime.fromisoformat(str(value))
        except ValueError:
            raise self.error(
                column, f"{value!r} is not a date and time such as 2024-05-10 00:00:00.5"
            ) from None
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()

    def precision_class(self, column: str) -> str:
        value = self.fields.get(column, ANY)
        if value not in (ANY, STRICT):
            raise self.error(column, f"{value!r} is not one of {ANY!r}, {STRICT!r}")
        return str(value)

    def error(self, column: str | None, problem: str) -> TraceFileError:
        return TraceFileError(self.path, self.line, column, problem)

    def _get(self, column: str) -> object:
        value = self.fields.get(column)
        if value is None:
            raise self.error(column, "missing value")
        return value


@dataclass
class _Columns:
    """Rows collected as compact columns."""

    arrival_s: array[float] = field(default_factory=lambda: array("d"))
    prompt_tokens: array[int] = field(default_factory=lambda: array("i"))
    output_tokens: array[int] = field(default_factory=lambda: array("i"))
    strict: array[int] = field(default_factory=lambda: array("b"))
    empty: int = 0

    def add(
        self, arrival_s: float, prompt_tokens: int, output_tokens: int, precision_class: str = ANY
    ) -> None:
        """Keep one request; one without prompt or answer cannot be replayed and is only counted."""
        if prompt_tokens < 1 or output_tokens < 1:
            self.empty += 1
            return
        self.arrival_s.append(arrival_s)
        self.prompt_tokens.append(prompt_tokens)
        self.output_tokens.append(output_tokens)
        self.strict.append(precision_class == STRICT)

    def trace(self, path: Path, name: str, history: tuple[str, ...], *, rebase: bool = True) -> Trace:
        if not self.arrival_s:
            raise TraceFileError(path, 1, None, f"no usable request in it ({self.empty} without tokens)")
        arrival_s = np.frombuffer(self.arrival_s, dtype=np.float64)
        if rebase:
            arrival_s = arrival_s - arrival_s.min()
        if self.empty:
            history = (*history, f"left out {self.empty} requests without tokens")
        return Trace.from_columns(
            name, arrival_s, self.prompt_tokens, self.output_tokens, self.strict, history
        )


def read_azure(path: Path, limit: int | None = None) -> Trace:
    """Azure LLM inference traces of 2023 and 2024, CSV: TIMESTAMP, ContextTokens, GeneratedTokens."""
    columns = _Columns()
    for row in _limited(_csv_rows(path, ("TIMESTAMP", "ContextTokens", "GeneratedTokens")), limit):
        columns.add(row.instant("TIMESTAMP"), row.tokens("ContextTokens"), row.tokens("GeneratedTokens"))
    return columns.trace(path, path.stem, ("Azure LLM inference trace",))


def read_burstgpt(path: Path, limit: int | None = None) -> Trace:
    """BurstGPT CSV: Timestamp in seconds, Request tokens, Response tokens (0 where it failed: left out)."""
    columns = _Columns()
    for row in _limited(_csv_rows(path, ("Timestamp", "Request tokens", "Response tokens")), limit):
        columns.add(row.seconds("Timestamp"), row.tokens("Request tokens"), row.tokens("Response tokens"))
    return columns.trace(path, path.stem, ("BurstGPT",))


def read_mooncake(path: Path, limit: int | None = None) -> Trace:
    """Mooncake JSON lines: timestamp in milliseconds, input_length, output_length."""
    columns = _Columns()
    for row in _limited(_json_rows(path), limit):
        columns.add(row.seconds("timestamp", 1e-3), row.tokens("input_length"), row.tokens("output_length"))
    return columns.trace(path, path.stem, ("Mooncake trace, prefix sharing not replayed",))


def read_own(path: Path, limit: int | None = None) -> Trace:
    """What :meth:`Trace.save` writes: a header line, then one line a request; times are kept as they are."""
    rows = _json_rows(path)
    header = next(rows, None)
    history = header.fields.get("history") if header else None
    if header is None or not isinstance(header.fields.get("trace"), str) or not isinstance(history, list):
        raise TraceFileError(path, 1, None, 'the first line must be {"trace": NAME, "history": [...]}')
    columns = _Columns()
    for row in _limited(rows, limit):
        columns.add(
            row.seconds("arrival_s"),
            row.tokens("prompt_tokens"),
            row.tokens("output_tokens"),
            row.precision_class("precision_class"),
        )
    notes = tuple(str(note) for note in history)
    return columns.trace(path, str(header.fields["trace"]), notes, rebase=False)


READERS: dict[str, Callable[[Path, int | None], Trace]] = {
    "azure": read_azure,
    "burstgpt": read_burstgpt,
    "mooncake": read_mooncake,
    "nestedfp": read_own,
}


def read_trace(path: Path, form: str = "auto", limit: int | None = None) -> Trace:
    """Read a trace file; ``form`` is a key of READERS, or ``auto`` to tell from the first line.

    ``limit`` stops after that many lines. OSError where the file cannot be opened; :class:`TraceFileError`
    where it cannot be used.
    """
    if form == "auto":
        form = detect_form(path)
    if form not in READERS:
        raise ValueError(f"trace format {form!r} is unknown; give one of auto, {', '.join(READERS)}")
    return READERS[form](path, limit)


def detect_form(path: Path) -> str:
    """The trace format that a file's first line has; :class:`TraceFileError` if none."""
    with _open(path) as file:
        first = file.readline(65_536).strip()
    if first.startswith("{"):
        return "nestedfp" if '"trace"' in first else "mooncake"
    names = first.split(",")
    if "ContextTokens" in names:
        return "azure"
    if "Request tokens" in names:
        return "burstgpt"
    raise TraceFileError(
        path, 1, None, f"{first[:80]!r} starts no known format; name it: {', '.join(READERS)}"
    )


def _open(path: Path) -> TextIO:
    # A byte order mark at the start would otherwise become part of the first column's name.
    return path.open(encoding="utf-8-sig", errors="replace", newline="")


def _csv_rows(path: Path, needed: tuple[str, ...]) -> Iterator[_Row]:
    with _open(path) as file:
        lines = csv.reader(file)
        try:
            names = [name.strip() for name in next(lines, [])]
            for column in needed:
                if column not in names:
                    raise TraceFileError(path, 1, column, f"missing; the header has {names}")
            for values in _progress(path, lines):
                if values:
                    yield _Row(path, lines.line_num, dict(zip(names, values, strict=False)))
        except csv.Error as error:
            raise TraceFileError(path, lines.line_num, None, f"not CSV: {error}") from error


def _json_rows(path: Path) -> Iterator[_Row]:
    with _open(path) as file:
        for number, text in enumerate(_progress(path, file), start=1):
            if not text.strip():
                continue
            try:
                fields = json.loads(text)
            except ValueError as error:
                raise TraceFileError(path, number, None, f"not JSON: {error}") from error
            if not isinstance(fields, dict):
                raise TraceFileError(path, number, None, "not a JSON object")
            yield _Row(path, number, fields)


def _limited(rows: Iterable[_Row], limit: int | None) -> Iterator[_Row]:
    for count, row in enumerate(rows):
        if limit is not None and count >= limit:
            return
        yield row


def _progress(path: Path, lines: Iterable[_Line]) -> Iterator[_Line]:
    """Pass the lines on; where reading takes seconds, tell on standard error how far it is."""
    told = time.monotonic()
    for count, line in enumerate(lines):
        if count % _PROGRESS_EVERY_LINES == 0 and time.monotonic() - told > _PROGRESS_EVERY_S:
            told = time.monotonic()
            print(f"reading {path.name}: {count:,} lines", file=sys.stderr, flush=True)
        yield line
