"""An engine in a process of its own, and what keeps several of them apart."""

import fcntl
import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

_TAIL_LINES = 60
_TAIL_CHARACTERS = 6000


class EngineFailedError(RuntimeError):
    """An engine's process ended, or did not answer in time; the text holds the end of its output."""


class Turn:
    """A lock between processes, as a context manager. The system frees it when its holder dies."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def __enter__(self) -> None:
        self._file = self._path.open("w")
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class Remote:
    """An engine's process. What it prints goes to the file `log`, since several print at once."""

    def __init__(self, task: dict[str, Any], turn: Turn | None, log: Path) -> None:
        from nestedfp.vllm.bench import process

        self.name: str = task["engine"]
        self._log = log
        context = multiprocessing.get_context("spawn")
        self._pipe: Connection
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=process.serve, args=(task, theirs, turn, str(log)), name=self.name
        )
        self._process.start()
        theirs.close()
        self.facts: dict[str, Any] = {}

    def wait_until_ready(self, seconds: float) -> None:
        self.facts = self._receive(seconds)

    def call(self, *command: Any, seconds: float = 300.0) -> dict[str, Any]:
        """The answer to a command of `process.serve`."""
        try:
            self._pipe.send(command)
        except OSError as error:
            raise EngineFailedError(f"{self.name}: {error}\n{self._tail()}") from error
        return self._receive(seconds)

    def stop(self) -> None:
        """Ends the process; its memory is free when this returns."""
        self._process.kill()
        self._process.join()

    def _receive(self, seconds: float) -> dict[str, Any]:
        try:
            if not self._pipe.poll(max(0.0, seconds)):
                raise EngineFailedError(f"{self.name}: no answer in {seconds:.0f} s\n{self._tail()}")
            answer: dict[str, Any] = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(timeout=30)
            ended = f"its process ended with code {self._process.exitcode}"
            raise EngineFailedError(f"{self.name}: {ended}\n{self._tail()}") from error
        return answer

    def _tail(self) -> str:
        """The end of what the process printed."""
        if not self._log.is_file():
            return "it printed nothing"
        lines = self._log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        return "\n".join(lines)[-_TAIL_CHARACTERS:]
