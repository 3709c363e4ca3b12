"""Keeps a demonstration's results: its summary in bench/data, its picture in docs.

    make demo && python bench/demo.py [FOLDER] [--device "NVIDIA H100 80GB HBM3"]

`make tables` shows the summary in docs/measured.md. `--device` names the GPU, if one served.
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


def data_path(device: str) -> Path:
    """Where the summary of a run on `device`, a processor or a GPU, is kept."""
    return ROOT / "bench" / "data" / f"demo-{_slug(device)}.json"


def picture_path(gpu: str | None) -> Path:
    """Where the picture is kept: the last one of a processor, and one of each GPU."""
    return ROOT / "docs" / (f"demo-{_slug(gpu)}.svg" if gpu else "demo.svg")


def _slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "out" / "demo", help="of the results")
    parser.add_argument("--device", help="GPU of the run")
    args = parser.parse_args()
    folder: Path = args.folder
    picture = picture_path(args.device)
    try:
        summary = json.loads((folder / "summary.json").read_text())
        write_picture(
            folder / "requests.jsonl",
            folder / "timeline.jsonl",
            Slo.from_dict(summary["slo"]),
            picture,
            baseline_requests=folder / "static-fp16" / "requests.jsonl",
        )
    except (OSError, ValueError, KeyError, RecordError) as error:
        print(f"error: {folder} does not hold the results of `make demo`: {error}", file=sys.stderr)
        return 1
    if args.device:
        summary["machine"]["device"] = args.device
    path = data_path(args.device or summary["machine"]["processor"])
    path.write_text(json.dumps(summary, indent=2) + "\n")
    print(f"wrote {path.relative_to(ROOT)} and {picture.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
