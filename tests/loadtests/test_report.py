from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from nestedfp.loadtests.comparison import compare, same_trace
from nestedfp.loadtests.comparison import main as compare_command
from nestedfp.loadtests.metrics import Slo, summarize_records, summarize_timeline
from nestedfp.loadtests.picture import picture, served_in
from nestedfp.loadtests.records import Flip, RequestRecord, Sample, Timeline
from nestedfp.loadtests.report import main as report_command
from nestedfp.loadtests.report import render, write_picture, write_report
from nestedfp.loadtests.table import rows, run_table


def record(index: int, ttft_s: float = 0.2, **values: Any) -> RequestRecord:
    base: dict[str, Any] = {
        "index": index,
        "scheduled_s": float(index),
        "sent_s": float(index),
        "lag_s": 0.0,
        "ended_s": index + 1.0,
        "trace_prompt_tokens": 8,
        "max_tokens": 11,
        "ok": True,
        "status": 200,
        "prompt_tokens": 8,
        "output_tokens": 11,
        "ttft_s": ttft_s,
        "e2el_s": ttft_s + 0.5,
        "tpot_s": 0.05,
        "tokens_by_precision": {"fp16": 18, "fp8": 0},
    }
    return RequestRecord(**{**base, **values})


HOSTILE = '<script>alert("x")</script>'
SLO = Slo(ttft_s=0.5, tpot_s=0.1)
RECORDS = [
    record(0),
    record(1, tokens_by_precision={"fp16": 0, "fp8": 18}),
    record(2, tokens_by_precision={"fp16": 9, "fp8": 9}),
    record(3, tokens_by_precision=None, precision_at_start="fp8"),
    record(4, tokens_by_precision=None),
    record(5, ok=False, status=500, error=HOSTILE),
]
FLIP = Flip(2.0, "app#engine#abc", "fp16", "fp8", "queue is long", "waiting", 9.0, 4.0)
TIMELINE = Timeline(
    (
        Sample(0.0, "app#engine#abc", "fp16", running=2, waiting=1),
        Sample(3.0, "app#engine#abc", "fp8", running=4, waiting=3),
        Sample(0.0, "app#engine#xyz", "fp16", running=1),
    ),
    (FLIP,),
)


def drawn(baseline: list[RequestRecord] | None = None) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(picture(RECORDS, TIMELINE, SLO, baseline or [])).iter())


def with_class(parts: list[ElementTree.Element], class_: str) -> list[ElementTree.Element]:
    return [part for part in parts if part.get("class") == class_]


def test_requests_stand_at_their_arrival_in_the_colour_of_their_precision() -> None:
    assert [served_in(r) for r in RECORDS[:5]] == ["fp16", "fp8", "both", "fp8", "unknown"]
    parts = drawn()
    dots = [part for part in parts if part.tag == "circle" and part.get("data-tip")]
    assert len(dots) == 10  # five answered requests, TTFT and TPOT each
    by_class = {mode: len(with_class(dots, f"dot {mode}")) for mode in ("fp16", "fp8", "both", "unknown")}
    assert by_class == {"fp16": 2, "fp8": 4, "both": 2, "unknown": 2}
    svg = parts[0]
    left, right, end = (float(svg.get(f"data-{name}") or "") for name in ("left", "right", "end"))
    for dot in dots:
        tip = dot.get("data-tip") or ""
        at = float(re.search(r"at ([\d.]+) s", tip)[1])  # type: ignore[index]
        assert float(dot.get("cx") or "") == pytest.approx(left + (right - left) * at / end, abs=0.1)


def test_the_slo_failures_and_flips_are_marked() -> None:
    parts = drawn()
    assert [part.text for part in with_class(parts, "slo-text")] == ["SLO 500 ms", "SLO 100 ms"]
    (failed,) = with_class(parts, "failed")
    assert failed.get("data-tip") == f"request 5 failed: {HOSTILE}"
    (mark,) = with_class(parts, "flip-mark fp8")
    assert mark.get("data-tip") == (
        "2.0 s, app#engine#abc: fp16 → fp8; waiting 9 (threshold 4); queue is long"
    )
    assert len(with_class(parts, "flip fp8")) == 4  # one line through each panel


def test_lanes_show_the_precision_in_force() -> None:
    tips = [p.get("data-tip") for p in drawn() if (p.get("class") or "").startswith("lane ")]
    assert tips == [
        "app#engine#abc: fp16 from 0.0 to 2.0 s",
        "app#engine#abc: fp8 from 2.0 to 6.0 s",
        "app#engine#xyz: fp16 from 0.0 to 6.0 s",
    ]


def test_bars_count_arrivals() -> None:
    tips = [p.get("data-tip") for p in with_class(drawn(), "bar")]
    assert tips[0] == "0 to 0.5 s: 1 arrivals"
    assert len(tips) == 6


def test_a_baseline_is_drawn_behind() -> None:
    assert not with_class(drawn(), "dot baseline")
    behind = with_class(drawn([record(n, 0.4) for n in range(6)]), "dot baseline")
    assert len(behind) == 6 * 2 + 2  # TTFT, TPOT, and an entry in each legend


def test_a_picture_of_nothing_is_still_a_picture() -> None:
    text = picture([], Timeline(), Slo())
    ElementTree.fromstring(text)
    assert "no timeline was recorded" in text


def test_a_long_run_stays_a_small_file() -> None:
    many = [record(n, scheduled_s=n / 100, ended_s=n / 100 + 1) for n in range(60_000)]
    text = picture(many, Timeline(), SLO)
    assert text.count("<circle") <= 2 * 6000 + 2
    assert "(n = 60,000, one in 10 drawn)" in text


def summaries() -> tuple[dict[str, Any], dict[str, Any]]:
    static = summarize_records([record(n, 2.0, tpot_s=0.2) for n in range(6)], SLO)
    policy = summarize_records(RECORDS, SLO) | summarize_timeline(TIMELINE, 6.0)
    return static, policy


def test_the_report_is_one_file_with_everything_in_it(tmp_path: Path) -> None:
    static, policy = summaries()
    summary = {"model": HOSTILE, "engine": "vllm 0", **policy, "static_fp16": static}
    summary |= {"policy": {"controller": "threshold", "water": {"waiting": {"high": 4.0}}}}
    page = render(RECORDS, TIMELINE, summary, [record(n, 2.0) for n in range(6)])
    assert HOSTILE not in page
    assert not re.search(r"(src|href)=|@import|url\(|https?://", page)
    for text in [
        "5 of 6", "static FP16", "goodput under the SLO", "policy.water.waiting.high", "slo.ttft_s",
        "fp16 → fp8", "waiting 9 (threshold 4)", "n = 6 requests, 5 answered", "Better than static FP16",
    ]:  # fmt: skip
        assert text in page, text
    cells = re.findall(r"<td>TTFT p50</td><td>([^<]*)</td><td>([^<]*)</td><td[^>]*>([^<]*)</td>", page)
    assert cells == [("2,000 ms", "200 ms", "0.10")]


def test_the_report_is_written_from_files_and_again_by_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps(item.to_dict()) for item in RECORDS]
    (tmp_path / "requests.jsonl").write_text("\n".join(lines) + "\n")
    flip = {"t": 2, "kind": "flip", "replica": "a", "from": "fp16", "to": "fp8", "reason": "r"}
    (tmp_path / "timeline.jsonl").write_text(json.dumps(flip) + "\n")
    summary = summaries()[1]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    first = tmp_path / "first.html"
    write_report(tmp_path / "requests.jsonl", tmp_path / "timeline.jsonl", summary, first)
    assert report_command([str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_text() == first.read_text()
    (tmp_path / "requests.jsonl").write_text("{")
    assert report_command([str(tmp_path)]) == 1
    assert "requests.jsonl, line 1" in capsys.readouterr().err


def test_the_picture_alone_is_an_image_with_its_own_style(tmp_path: Path) -> None:
    for name, lines in (("requests", RECORDS), ("behind", RECORDS[:2])):
        text = "".join(json.dumps(item.to_dict()) + "\n" for item in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    flip = {"t": 2, "kind": "flip", "replica": "a", "from": "fp16", "to": "fp8", "reason": "r"}
    (tmp_path / "timeline.jsonl").write_text(json.dumps(flip) + "\n")
    write_picture(
        tmp_path / "requests.jsonl",
        tmp_path / "timeline.jsonl",
        Slo(),
        tmp_path / "picture.svg",
        baseline_requests=tmp_path / "behind.jsonl",
    )
    root = ElementTree.parse(tmp_path / "picture.svg").getroot()
    svg = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{svg}svg"
    style = root.find(f"{svg}style")
    assert style is not None
    assert "--fp8:" in (style.text or "")
    classes = [part.get("class", "") for part in root.iter()]
    assert sum("baseline" in class_ for class_ in classes) > 0
    assert any("flip-mark" in class_ for class_ in classes)


def test_the_table_has_ratios_only_where_one_way_is_better() -> None:
    static, policy = summaries()
    table = {row.label: row for row in rows({"static": static, "policy": policy})}
    assert table["TTFT p50"].values == ("2,000 ms", "200 ms")
    assert table["TTFT p50"].ratio == pytest.approx(0.1)
    assert table["TTFT p50"].improved
    assert table["tokens in FP8"].ratio is None
    assert table["  failed"].ratio is None  # none over none
    assert "SLO met, class fp16" not in table
    text = run_table({"static": static, "policy": policy})
    widths = {len(line) for line in text.splitlines() if line.endswith("0.10")}
    assert len(widths) == 1
    assert text.splitlines()[0].split() == ["static", "policy", "ratio"]
    assert run_table({"policy": policy}).split()[0] == "policy"
    assert "0.10" not in run_table({"policy": policy})


def test_small_differences_are_not_called_better_or_worse() -> None:
    static, _ = summaries()
    close = summarize_records([record(n, 2.05, tpot_s=0.2) for n in range(6)], SLO)
    row = next(r for r in rows({"a": static, "b": close}) if r.label == "TTFT p50")
    assert row.ratio == pytest.approx(1.025)
    assert row.improved is None


def fp8_run(ttft_s: float, tpot_s: float) -> dict[str, Any]:
    served = {"fp16": 0, "fp8": 18}
    return summarize_records(
        [record(n, ttft_s, tpot_s=tpot_s, tokens_by_precision=served) for n in range(6)], SLO
    )


@pytest.mark.parametrize(
    ("ttft_s", "tpot_s", "starts"),
    [
        (0.2, 0.05, ["Within 5% of static FP16: TTFT p90 200 ms against 200 ms; TPOT"]),
        (0.4, 0.09, ["Worse than static FP16: TTFT p90 400 ms against 200 ms (x 2.00); TPOT", "Within 5%"]),
    ],
)
def test_fp8_that_is_not_faster_is_said_to_be_so(ttft_s: float, tpot_s: float, starts: list[str]) -> None:
    static = summarize_records([record(n, 0.2, tpot_s=0.05) for n in range(6)], SLO)
    sentences = compare(static, fp8_run(ttft_s, tpot_s))["sentences"]
    assert sentences[0] == "FP8 did not make serving faster here than static FP16."
    assert all(said.startswith(start) for said, start in zip(sentences[1:], starts, strict=False))
    assert sentences[-1] == "One run on each side."


def test_a_mixed_result_says_both() -> None:
    static = summarize_records([record(n, 0.2, tpot_s=0.05) for n in range(6)], SLO)
    said = compare(static, fp8_run(0.4, 0.02))
    assert said["sentences"][0].startswith(
        "Better than static FP16: TPOT p90 20.0 ms against 50.0 ms (x 0.40)"
    )
    assert said["sentences"][1].startswith("Worse than static FP16: TTFT p90")
    assert said["ratios"]["TTFT p90"] == pytest.approx(2)


def test_a_run_without_fp8_shows_nothing_about_it() -> None:
    static = summarize_records([record(n) for n in range(6)], SLO)
    assert compare(static, static)["sentences"][0].startswith("No token was computed in FP8")


def test_some_goodput_where_there_was_none_is_better() -> None:
    static = summarize_records([record(n, 2.0, tpot_s=0.05) for n in range(6)], SLO)
    said = compare(static, fp8_run(0.45, 0.05))
    assert said["ratios"]["goodput"] is None
    assert "goodput 1.00 req/s against 0.00 req/s" in said["sentences"][0]
    assert said["sentences"][0].startswith("Better than static FP16")


def test_runs_of_different_length_are_not_compared() -> None:
    static = summarize_records([record(n) for n in range(5)], SLO)
    assert compare(static, fp8_run(0.2, 0.1)) == {
        "ratios": {},
        "sentences": ["The runs sent 5 and 6 requests: they cannot be compared."],
    }


def test_the_comparison_command_checks_that_both_replayed_one_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    made = [[record(0), record(1)], [record(0, 0.1), record(1, 0.1)], [record(0), record(7)]]
    for path, of in zip(paths, made, strict=True):
        path.write_text("".join(json.dumps(item.to_dict()) + "\n" for item in of))
    assert same_trace(made[0], made[1])
    assert compare_command([str(paths[0]), str(paths[1]), "--ttft-s", "1"]) == 0
    assert "TTFT p50" in capsys.readouterr().out
    assert compare_command([str(paths[0]), str(paths[2])]) == 1
    assert "replayed different requests" in capsys.readouterr().err
