"""A policy actor's status as text for a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from nestedfp.deployments import durations

_HEAD: Final = ("replica", "mode", "since", "heard", "queue", "running", "KV", "reason then")
_UNKNOWN: Final = "-"
_CLOCK: Final = "%Y-%m-%d %H:%M:%S"


def render(app_name: str, status: Mapping[str, Any], changes: int = 0) -> str:
    """The policy in force, a row for each replica, and the last `changes` mode changes, newest last.

    Times of day are this machine's. `since` and `reason then` tell of the replica's last change of target. A
    mode reads `fp16 -> fp8` where the replica does not follow its target yet, a signal `?` where it came
    unusable.
    """
    replicas = status["replicas"]
    lines = [
        f"{app_name}: controller {status['controller']}; mode changes so far: {status['changes']}",
        f"pin: {_pin(status['override'])}",
    ]
    if status["dry_run"]:
        lines.append("dry run: changes are decided and logged, and none is ordered")
    lines += ["", *_rows(status)] if replicas else ["", "no replica has reported"]
    log = status["log"][-changes:] if changes else ()
    if log:
        lines += ["", "last mode changes:", *(f"  {_change(record)}" for record in log)]
    return "\n".join(lines)


def _pin(override: Mapping[str, Any] | None) -> str:
    if override is None:
        return "none, the controller decides"
    return f"every replica in {override['mode']} for {durations.show(override['left_s'])} more"


def _rows(status: Mapping[str, Any]) -> Iterable[str]:
    """The table, and under a replica's row what is not as usual."""
    since = _since(status["log"])
    cells: list[tuple[str, ...]] = [_HEAD]
    cells += [_cells(name, entry, since.get(name)) for name, entry in status["replicas"].items()]
    widths = [max(len(row[column]) for row in cells) for column in range(len(_HEAD))]
    yield _aligned(_HEAD, widths)
    for row, entry in zip(cells[1:], status["replicas"].values(), strict=True):
        yield _aligned(row, widths)
        if entry["held"]:
            yield f"  held back: {entry['held']}"
        if not entry["leased"]:
            yield "  its lease is over: it decides by itself, or is gone"


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _since(log: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The last change ordered of each replica, as far back as the log goes."""
    return {record["replica_id"]: record for record in log if not record.get("dry_run")}


def _cells(name: str, entry: Mapping[str, Any], last: Mapping[str, Any] | None) -> tuple[str, ...]:
    report, target = entry["report"], entry["target"]
    mode = report["mode"] if report["mode"] == target["mode"] else f"{report['mode']} -> {target['mode']}"

    def signal(field: str, form: str = "{}") -> str:
        return "?" if field in entry["faults"] else form.format(report[field])

    return (
        name,
        mode,
        _at(last["at"]) if last is not None and last["to"] == target["mode"] else _UNKNOWN,
        f"{durations.show(entry['heard_s_ago'])} ago",
        signal("waiting"),
        signal("running"),
        signal("kv_usage", "{:.0%}"),
        target["reason"],
    )


def _change(record: Mapping[str, Any]) -> str:
    mark = " (dry run)" if record.get("dry_run") else ""
    change = f"{record['from']} -> {record['to']}{mark}"
    return f"{_at(record['at'])}  {record['replica_id']}  {change}: {record['reason']}"


def _at(unix_s: float) -> str:
    return time.strftime(_CLOCK, time.localtime(unix_s))
