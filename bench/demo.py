"""Keeps a demonstration's results: its summary in bench/data, its picture in docs.

    make demo && python bench/demo.py [FOLDER]

`make tables` shows the summary in the README.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from nestedfp.loadtests.metrics import Slo
from nestedfp.loadtests.records import RecordError
from nestedfp.loadtests.report import write_picture

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "demo.svg"


def data_path(processor: str) -> Path:
    """Where the summary of a run on `processor` is kept."""
    return ROOT / "bench" / "data" / f"demo-{re.sub(r'[^a-z0-9]+', '-', processor.lower()).strip('-')}.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "out" / "demo", help="of the results")
    folder: Path = parser.parse_args().folder
    try:
        summary = json.loads((folder / "summary.json").read_text())
        write_picture(
            folder / "requests.jsonl",
            folder / "timeline.jsonl",
            Slo.from_dict(summary["slo"]),
            PICTURE,
            baseline_requests=folder / "static-fp16" / "requests.jsonl",
        )
    except (OSError, ValueError, KeyError, RecordError) as error:
        print(f"error: {folder} does not hold the results of `make demo`: {error}", file=sys.stderr)
        return 1
    path = data_path(summary["machine"]["processor"])
    path.write_text(json.dumps(summary, indent=2) + "\n")
    print(f"wrote {path.relative_to(ROOT)} and {PICTURE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
