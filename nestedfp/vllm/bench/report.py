"""What the benchmark writes and prints, from the passes that were measured. Pure."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import geometric_mean, median
from typing import Any

from nestedfp.vllm.bench.grid import CONTENDERS, RATIOS, Cell

Row = dict[str, Any]


def rows_of(
    model: str, dtype: str, passes: Iterable[Row], facts: Mapping[str, Mapping[str, Any]]
) -> list[Row]:
    """Medians over the passes of each contender and cell; `facts` are those of the engines by name.

    Rows of NestedFP say how many MLPs are fused: figures with and without are not alike.
    """
    cells: dict[tuple[int, int, int, str], list[Row]] = defaultdict(list)
    for entry in passes:
        cells[entry["input_len"], entry["output_len"], entry["batch"], entry["contender"]].append(entry)
    rows = []
    for (input_len, output_len, batch, contender), entries in cells.items():
        engine = facts[CONTENDERS[contender][0]]
        memory = engine["memory"]
        speeds = [entry["tokens_per_s"] for entry in entries]
        rows.append(
            {
                "date": max(entry["date"] for entry in entries),
                "model": model,
                "dtype": dtype,
                "contender": contender,
                "input_len": input_len,
                "output_len": output_len,
                "batch": batch,
                "tokens_per_s": median(speeds),
                "tokens_per_s_min": min(speeds),
                "tokens_per_s_max": max(speeds),
                "passes": len(speeds),
                "ttft_ms": median(entry["ttft_ms"] for entry in entries),
                "ttft_batches": sum(entry["ttft_batches"] for entry in entries),
                "tpot_ms": median(entry["tpot_ms"] for entry in entries),
                "memory_bytes": memory["weights_bytes"],
                "kv_blocks": memory["kv_blocks"],
                **({"fused_mlps": engine["fused_mlps"]} if "fused_mlps" in engine else {}),
            }
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    """One line a cell with tokens/s by contender, then the geometric means of the ratios."""
    cells: dict[Cell, dict[str, float]] = defaultdict(dict)
    for row in rows:
        cells[row["input_len"], row["output_len"], row["batch"]][row["contender"]] = row["tokens_per_s"]
    names = sorted({row["contender"] for row in rows})
    lines = ["in/out/batch".ljust(16) + "".join(name.rjust(16) for name in names)]
    for cell, by_name in cells.items():
        values = "".join(f"{by_name[name]:16.1f}" if name in by_name else " " * 16 for name in names)
        lines.append("/".join(map(str, cell)).ljust(16) + values)
    for ours, theirs in RATIOS:
        ratios = [by[ours] / by[theirs] for by in cells.values() if ours in by and theirs in by]
        if ratios:
            lines.append(
                f"{ours} / {theirs}: geometric mean {geometric_mean(ratios):.3f}, worst {min(ratios):.3f}"
            )
    return "\n".join(lines)


def merged(kept: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """`new`, and of an earlier report what `new` has not measured again: whole cells, never part of one, so
    that contenders are only compared within a run. A report of another device, driver or other versions is
    left. Entries without a date, and headers without a driver, are of runs before these were noted."""
    if (kept["device"], kept["versions"]) != (new["device"], new["versions"]):
        return dict(new)
    if kept.get("driver", new["driver"]) != new["driver"]:
        return dict(new)
    lists = {
        "rows": ("model", "dtype", "input_len", "output_len", "batch"),
        "engines": ("model", "dtype", "engine"),
        "solo": ("model", "dtype", "engine"),
        "profiles": ("model", "dtype", "contender"),
    }
    result = dict(new)
    for name, key in lists.items():
        again = {tuple(entry.get(field) for field in key) for entry in new[name]}
        old = [entry for entry in kept[name] if tuple(entry.get(field) for field in key) not in again]
        result[name] = [*old, *new[name]]
    result["settings"] = new["settings"] or kept["settings"]
    return result


def slug(device: str) -> str:
    """A device's name for file names."""
    return "-".join(device.lower().replace("(r)", "").split())
