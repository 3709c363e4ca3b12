from __future__ import annotations

import json
from pathlib import Path

import pytest

from nestedfp.loadtests.readers import READERS, TraceFileError, detect_form, read_trace

AZURE_2023 = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:16:02.2224670,879,55
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,2162,5
2024-05-10 00:00:00.017335+00:00,2399,6
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,230,1317,Conversation log
118,GPT-4,417,0,417,API log
120.5,GPT-4,417,276,693,API log
"""
MOONCAKE = """{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}
{"timestamp": 30535, "input_length": 6472, "output_length": 26, "hash_ids": [46, 2366]}
"""
OWN = """{"trace": "mine", "history": ["made by hand"]}
{"arrival_s": 1.5, "prompt_tokens": 3, "output_tokens": 4, "precision_class": "fp16"}
{"arrival_s": 0.5, "prompt_tokens": 1, "output_tokens": 2}
"""


def write(folder: Path, text: str, name: str = "file.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "form", "arrivals", "prompts", "outputs"),
    [
        (AZURE_2023, "azure", [0, 4.314579, 15.541877], [374, 396, 879], [44, 109, 55]),
        (AZURE_2024, "azure", [0, 0.007405], [2162, 2399], [5, 6]),
        (BURSTGPT, "burstgpt", [0, 40, 115.5], [472, 1087, 417], [18, 230, 276]),
        (MOONCAKE, "mooncake", [0, 3.053], [6955, 6472], [52, 26]),
        (OWN, "nestedfp", [0.5, 1.5], [1, 3], [2, 4]),
    ],
)
def test_each_format_is_told_and_read(
    tmp_path: Path, text: str, form: str, arrivals: list[float], prompts: list[int], outputs: list[int]
) -> None:
    path = write(tmp_path, text)
    assert detect_form(path) == form
    trace = read_trace(path)
    assert trace.arrival_s == pytest.approx(arrivals, abs=1e-6)
    assert list(trace.prompt_tokens) == prompts
    assert list(trace.output_tokens) == outputs


def test_failed_requests_of_burstgpt_are_left_out_and_counted(tmp_path: Path) -> None:
    assert read_trace(write(tmp_path, BURSTGPT)).history[-1] == "left out 1 requests without tokens"


def test_own_format_keeps_classes_and_history(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, OWN))
    assert [request.precision_class for request in trace] == ["any", "fp16"]
    assert trace.history == ("made by hand", "sorted by arrival")


@pytest.mark.parametrize("change", ["crlf", "mark", "blank lines", "more columns", "other order"])
def test_harmless_differences_are_read(tmp_path: Path, change: str) -> None:
    text = {
        "crlf": AZURE_2024.replace("\n", "\r\n"),
        "mark": "\ufeff" + AZURE_2024,
        "blank lines": AZURE_2024 + "\n\n",
        "more columns": "\n".join(line + ",extra" for line in AZURE_2024.splitlines()),
        "other order": "GeneratedTokens,TIMESTAMP,ContextTokens\n5,2024-05-10 00:00:00,2162\n"
        "6,2024-05-10 00:00:00.007405,2399\n",
    }[change]
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode())
    trace = read_trace(path)
    assert list(trace.prompt_tokens) == [2162, 2399]
    assert trace.duration_s == pytest.approx(0.007405, abs=1e-6)


HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00,5,6\n"


@pytest.mark.parametrize(
    ("text", "line", "column", "message"),
    [
        (HEADER + "2024-05-10 00:00:01,many,6\n", 3, "ContextTokens", "'many' is not a whole number"),
        (HEADER + "2024-05-10 00:00:01,5.5,6\n", 3, "ContextTokens", "'5.5' is not a whole number"),
        (HEADER + "2024-05-10 00:00:01,5,-6\n", 3, "GeneratedTokens", "'-6' is not a whole number"),
        (HEADER + "2024-05-10 00:00:01,5,99999999999\n", 3, "GeneratedTokens", "is not a whole number"),
        (HEADER + "yesterday,5,6\n", 3, "TIMESTAMP", "'yesterday' is not a date"),
        (HEADER + "\n2024-05-10 00:00:01,5\n", 4, "GeneratedTokens", "missing value"),
        ("TIMESTAMP,ContextTokens\n", 1, "GeneratedTokens", "missing; the header has"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", 1, None, "no usable request"),
        ("when,what\n", 1, None, "starts no known format"),
        ("", 1, None, "starts no known format"),
        (MOONCAKE + '{"timestamp": "x", "input_length": 1}\n', 3, "timestamp", "finite"),
        (MOONCAKE + '{"timestamp": 1e999, "input_length": 1}\n', 3, "timestamp", "finite"),
        (MOONCAKE + '{"timestamp": 1, "input_length": true}\n', 3, "input_length", "True"),
        (MOONCAKE + '{"timestamp": 1, "input_length": 1}\n', 3, "output_length", "missing value"),
        (MOONCAKE + "[1, 2]\n", 3, None, "not a JSON object"),
        (MOONCAKE + '{"timestamp": 1\n', 3, None, "not JSON"),
        (OWN + '{"arrival_s": 1, "prompt_tokens": 1, "output_tokens": 1, "precision_class": "int4"}\n', 4,
         "precision_class", "'int4' is not one of"),
        ('{"trace": 5, "history": []}\n', 1, None, "the first line must be"),
    ],
)  # fmt: skip
def test_broken_files_name_file_line_and_column(
    tmp_path: Path, text: str, line: int, column: str | None, message: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(TraceFileError, match=message) as caught:
        read_trace(path)
    assert (caught.value.path, caught.value.line, caught.value.column) == (path, line, column)
    assert f"{path}, line {line}" in str(caught.value)


def test_an_unknown_format_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=", ".join(READERS)):
        read_trace(write(tmp_path, AZURE_2023), "parquet")


def test_a_binary_file_is_an_error_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "t.bin"
    path.write_bytes(bytes(range(256)) * 4)
    for form in ("auto", *READERS):
        with pytest.raises(TraceFileError):
            read_trace(path, form)


def test_a_big_file_is_read_with_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nestedfp.loadtests.readers._PROGRESS_EVERY_S", 0.0)
    monkeypatch.setattr("nestedfp.loadtests.readers._PROGRESS_EVERY_LINES", 1000)
    lines = [json.dumps({"timestamp": n, "input_length": 1, "output_length": 1}) for n in range(5000)]
    trace = read_trace(write(tmp_path, "\n".join(lines)))
    assert len(trace) == 5000
    assert "reading file.csv: 4,000 lines" in capsys.readouterr().err
