"""A progress bar on stderr: one line that is rewritten on a terminal, a line for each step elsewhere."""

import sys
import time

WIDTH = 24


class Progress:
    """Counts steps that are named when they begin."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.start = total, 0, time.monotonic()
        self.live = sys.stderr.isatty()

    def step(self, name: str) -> None:
        """Show that a step begins."""
        filled = WIDTH * self.done // max(1, self.total)
        seconds = time.monotonic() - self.start
        line = f"[{'#' * filled}{'.' * (WIDTH - filled)}] {self.done}/{self.total} {seconds:4.0f} s  {name}"
        self._show(line)
        self.done += 1

    def end(self) -> None:
        """Show that all is done."""
        self._show(f"[{'#' * WIDTH}] {self.done}/{self.total} {time.monotonic() - self.start:4.0f} s  done")
        if self.live:
            print(file=sys.stderr)

    def _show(self, line: str) -> None:
        print(f"\r\033[K{line}" if self.live else line, end="" if self.live else "\n", file=sys.stderr, flush=True)
