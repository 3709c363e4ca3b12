"""Replay a trace against an OpenAI-compatible endpoint, open loop.

``nestedfp replay --url http://127.0.0.1:8000 --model NAME --trace FILE --out FILE`` from a shell,
:func:`replay` from a program. Locust patches the process it runs in for gevent, so the function runs the same
command in a process of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from nestedfp.loadtests.outcome import Outcome
from nestedfp.loadtests.readers import READERS, read_trace
from nestedfp.loadtests.settings import ENDPOINTS, ReplaySettings
from nestedfp.loadtests.synthetic import Lengths, gamma, mmpp, square_wave
from nestedfp.loadtests.traces import Trace

_DESCRIPTION = "Replay a trace of requests against an OpenAI-compatible endpoint, open loop."
_STOP_S = 15.0
_POLL_S = 0.05
EXIT_CUT_SHORT = 3


class ReplayError(RuntimeError):
    """The replay did not run; the message holds what its process said."""


def start_replay(trace: Trace, settings: ReplaySettings, out_path: Path) -> subprocess.Popen[bytes]:
    """Start a replay in a process of its own and return at once; progress goes to its standard output.

    The trace is kept beside the results as ``<results>.trace.jsonl``. SIGINT or SIGTERM ends it cleanly.
    """
    out_path.parent.mkdir(parents=True, exist_ok=True)
    Outcome.path_beside(out_path).unlink(missing_ok=True)
    trace_path = out_path.with_suffix(".trace.jsonl")
    trace.save(trace_path)
    command = [sys.executable, "-m", "nestedfp.loadtests.replay", "--trace", str(trace_path)]
    command += ["--trace-format", "nestedfp", "--out", str(out_path), *settings.to_arguments()]
    return subprocess.Popen(command)


def replay(
    trace: Trace,
    settings: ReplaySettings,
    out_path: Path,
    *,
    on_start: Callable[[Outcome], None] | None = None,
) -> Outcome:
    """Replay ``trace``, wait for its end, and return the outcome; ``out_path`` holds a line a request.

    ``on_start`` is called once, as soon as the replay's second 0 is known (``started_monotonic``).
    :class:`ReplayError` if the endpoint does not answer or the process died. An exception here,
    KeyboardInterrupt included, ends the process before it is passed on.
    """
    process = start_replay(trace, settings, out_path)
    try:
        started = _await_start(process, out_path)
        if started and on_start:
            on_start(started)
        code = process.wait()
    finally:
        _end(process)
    if code not in (0, EXIT_CUT_SHORT):
        raise ReplayError(f"the replay's process ended with code {code}; its messages stand above")
    return Outcome.read(out_path)


def _await_start(process: subprocess.Popen[bytes], out_path: Path) -> Outcome | None:
    while process.poll() is None:
        if Outcome.path_beside(out_path).exists():
            return Outcome.read(out_path)
        time.sleep(_POLL_S)
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `nestedfp replay`."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    where = parser.add_argument_group("endpoint")
    where.add_argument("--url", default="http://127.0.0.1:8000", help="base URL")
    where.add_argument("--model", required=True, help="name that the server lists at /v1/models")
    where.add_argument("--endpoint", choices=list(ENDPOINTS), default="chat", help="which API to call")
    where.add_argument(
        "--no-ignore-eos", action="store_true", help="let answers end before the traced length"
    )
    where.add_argument("--request-timeout-s", type=float, default=300.0, help="limit on one whole answer")
    where.add_argument("--connect-timeout-s", type=float, default=10.0, help="limit on connecting")
    where.add_argument(
        "--straggler-s", type=float, default=120.0, help="wait this long after the last arrival"
    )

    load = parser.add_argument_group("load")
    load.add_argument("--trace", type=Path, help="trace file; without it, --synthetic")
    load.add_argument("--trace-format", choices=["auto", *READERS], default="auto", help="its format")
    load.add_argument(
        "--synthetic", choices=["square", "gamma", "mmpp"], default="square", help="what to make"
    )
    load.add_argument("--seed", type=int, default=0, help="for arrivals, lengths and prompts")
    load.add_argument("--calm-rps", type=float, default=1.0, help="square, mmpp: arrivals/s in calm")
    load.add_argument("--burst-rps", type=float, default=8.0, help="square, mmpp: arrivals/s in a burst")
    load.add_argument(
        "--calm-s", type=float, default=20.0, help="square: length; mmpp: mean length of a calm"
    )
    load.add_argument(
        "--burst-s", type=float, default=10.0, help="square: length; mmpp: mean length of a burst"
    )
    load.add_argument("--rate-rps", type=float, default=2.0, help="gamma: arrivals/s")
    load.add_argument("--cv", type=float, default=1.0, help="square, gamma: coefficient of variation of gaps")
    load.add_argument("--duration-s", type=float, default=60.0, help="gamma, mmpp: length in seconds")
    load.add_argument("--prompt-tokens", type=float, default=128, help="synthetic: mean prompt length")
    load.add_argument("--output-tokens", type=float, default=64, help="synthetic: mean output length")
    load.add_argument("--length-cv", type=float, default=0.0, help="synthetic: CV of the lengths")

    change = parser.add_argument_group("changes to the trace, made in this order and recorded")
    change.add_argument(
        "--window", type=float, nargs=2, metavar=("START_S", "SECONDS"), help="only this part"
    )
    change.add_argument("--requests", type=int, help="only the first so many")
    change.add_argument("--time-scale", type=float, default=1.0, help="multiplies arrival times")
    change.add_argument("--length-scale", type=float, default=1.0, help="multiplies token lengths")
    change.add_argument("--max-prompt-tokens", type=int, help="cuts longer prompts")
    change.add_argument("--max-output-tokens", type=int, help="cuts longer outputs")
    change.add_argument(
        "--strict-share", type=float, default=0.0, help="share of requests that ask for 16 bits"
    )

    result = parser.add_argument_group("results")
    result.add_argument(
        "--out", type=Path, default=Path("out/replay/requests.jsonl"), help="a line a request"
    )
    result.add_argument("--progress-s", type=float, default=3.0, help="seconds between progress lines")
    result.add_argument(
        "--locust-table", action="store_true", help="print Locust's own statistics at the end"
    )


def _trace(options: argparse.Namespace) -> Trace:
    if options.requests is not None and options.requests < 1:
        raise ValueError(f"requests is {options.requests}; give a number of at least 1, or leave it out")
    if options.trace:
        # A window needs the lines before it, a bare number of requests only so many.
        limit = None if options.window else options.requests
        trace = read_trace(options.trace, options.trace_format, limit)
    else:
        trace = _synthetic(options)
    if options.window:
        trace = trace.window(*options.window)
    if options.requests:
        trace = trace.first(options.requests)
    trace = trace.scaled(time=options.time_scale, length=options.length_scale)
    trace = trace.clipped(
        max_prompt_tokens=options.max_prompt_tokens, max_output_tokens=options.max_output_tokens
    )
    return trace.with_strict_share(options.strict_share, options.seed) if options.strict_share else trace


def _synthetic(options: argparse.Namespace) -> Trace:
    prompt = Lengths(options.prompt_tokens, options.length_cv)
    output = Lengths(options.output_tokens, options.length_cv)
    if options.synthetic == "gamma":
        return gamma(
            prompt,
            output,
            rate_rps=options.rate_rps,
            duration_s=options.duration_s,
            cv=options.cv,
            seed=options.seed,
        )
    if options.synthetic == "mmpp":
        return mmpp(
            prompt,
            output,
            calm_rps=options.calm_rps,
            burst_rps=options.burst_rps,
            mean_calm_s=options.calm_s,
            mean_burst_s=options.burst_s,
            duration_s=options.duration_s,
            seed=options.seed,
        )
    return square_wave(
        prompt,
        output,
        calm_rps=options.calm_rps,
        burst_rps=options.burst_rps,
        calm_s=options.calm_s,
        burst_s=options.burst_s,
        cv=options.cv,
        seed=options.seed,
    )


def run(options: argparse.Namespace) -> int:
    """The command. 0: every request was sent and waited for; 3: cut short; 1: it could not start."""
    try:
        settings = ReplaySettings.from_arguments(options)
        trace = _trace(options)
        options.out.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"trace {trace.name}: {len(trace)} requests in {trace.duration_s:.1f} s", flush=True)
    for note in trace.history:
        print(f"  {note}", flush=True)

    # Imported late: this patches sockets and threads of the whole process for gevent.
    from nestedfp.loadtests import runner

    try:
        outcome = runner.run(trace, settings, options.out, locust_table=options.locust_table)
    except runner.EndpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if outcome.cut_short:
        print(f"cut short: {outcome.cut_short}; {outcome.unsent} requests unsent", file=sys.stderr)
        return EXIT_CUT_SHORT
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m nestedfp.loadtests.replay`: the same command without the rest of the program."""
    parser = argparse.ArgumentParser(prog="python -m nestedfp.loadtests.replay", description=_DESCRIPTION)
    add_arguments(parser)
    try:
        return run(parser.parse_args(arguments))
    except KeyboardInterrupt:
        print("interrupted before the start; nothing was sent", file=sys.stderr)
        return EXIT_CUT_SHORT


if __name__ == "__main__":
    sys.exit(main())
