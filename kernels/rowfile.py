"""Files of measurements: JSON with a `header` and `rows`, one row a line, so that diffs read well."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# Figures of another one of these cannot stand in one file.
_SAME = ("device", "torch", "triton")


def slug(device: str) -> str:
    """A GPU's name in the names of files."""
    return "-".join(device.lower().split())


def write(path: Path, header: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the file anew, whole or not at all."""
    body = ",\n".join("  " + json.dumps(row) for row in rows)
    text = f'{{"header": {json.dumps(header, indent=1)},\n "rows": [\n{body}\n ]}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(text)
    draft.replace(path)


def read_rows(path: Path, header: Mapping[str, Any]) -> list[Row]:
    """The rows of `path`, none where it does not exist.

    Ends the command where they were taken on another device or with other versions than `header` names.
    """
    if not path.is_file():
        return []
    data = json.loads(path.read_text())
    for name in _SAME:
        if data["header"].get(name) != header[name]:
            raise SystemExit(
                f"{path} was measured with {name} {data['header'].get(name)}, this run has {header[name]}; "
                "write to another file, or anew"
            )
    return list(data["rows"])


def merged(old: Iterable[Row], new: Sequence[Row], key: Sequence[str]) -> list[Row]:
    """`old` rows with those of the same `key` fields replaced by `new` ones, which come last."""

    def identity(row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in key)

    replaced = {identity(row) for row in new}
    return [row for row in old if identity(row) not in replaced] + list(new)
