"""One line that tells the stage of a command, in place of bars and INFO lines.

All bars, ours and those of llm-compressor, transformers and datasets, are tqdm's, and their
descriptions tell the stage. With ``--verbose`` a command leaves bars and lines as they are.
"""

import os
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from rich.console import Console
from rich.markup import escape

from casp_plugin.cli.output import console

__all__ = ["quiet", "tell"]

#: read by packages as they are imported, here and in child processes; a user's settings win
_ENVIRONMENT = {
    "LLM_COMPRESSOR_LOG_LEVEL": "WARNING",
    "LOGURU_LEVEL": "WARNING",
    "TQDM_DISABLE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
#: stage by the description of its bar; other bars show nothing
_STAGES = {
    "Reading texts": "reading texts",
    "Applying the chat template": "applying the chat template",
    "Reading images": "reading images",
    "Checking images": "checking images",
    "Looking at attention maps": "measuring attention maps",
    "Probing the attention": "probing the attention",
    "Collecting gradients": "measuring gradients",
    "Running": "running layers",
    "Measuring": "measuring layers",
    "Choosing": "choosing",
    "Calibrating": "quantizing layers",
    "Propagating": "quantizing layers",
    "Encoding weights": "encoding weights",
    "Noting predictions": "noting the predictions",
    "Tuning": "tuning layers",
    "Tuning the model": "tuning the model",
    "Writing model shards": "saving",
    "Evaluating": "scoring texts",
    "Answering": "scoring answers",
    "Models scored": "scoring models",
    "Forests": "analysing",
    "Rounds": "measuring speed",
}
#: seconds after which a bar tells the time left
_LONG = 20
#: description of a bar for one layer after the other, "(3/31): Measuring"
_LAYER = re.compile(r"\((\d+/\d+)\): (.+)")


class _Line:
    """The line: redrawn on a terminal; elsewhere a line for every stage, to stderr. Only the first
    process of torchrun shows it."""

    def __init__(self):
        self._status = console.status("", refresh_per_second=4) if console.is_terminal else None
        self._stage = ""
        self._shown = os.environ.get("RANK", "0") == "0"
        self._outermost: Callable = lambda: None

    def tell(self, stage: str, step: str = "") -> None:
        if not self._shown:
            return
        if self._status is not None:
            self._status.update(escape(f"{stage} {step}".rstrip()))
            self._status.start()
        elif stage != self._stage:
            Console(stderr=True).print(stage, soft_wrap=True, markup=False, highlight=False)
        self._stage = stage

    def show(self, bar) -> None:
        """Tell the stage of a tqdm bar, unless it lies inside an open bar of another stage."""
        description = bar.desc.removesuffix(": ")
        step = f"{bar.n / bar.total:.0%}{_left(bar)}" if bar.total else ""
        if layer := _LAYER.fullmatch(description):
            step, description = layer.groups()
        stage = "downloading" if bar.unit == "B" else _STAGES.get(description)
        outermost = self._outermost()
        inside = outermost is not None and outermost is not bar and not outermost.disable
        if stage is not None and not (inside and stage != self._stage):
            self._outermost = weakref.ref(bar)
            self.tell(stage, step)

    def close(self) -> None:
        if self._status is not None:
            self._status.stop()


def _left(bar) -> str:
    """Return the time that a bar will take until its end; nothing for short ones."""
    elapsed = bar.format_dict["elapsed"]
    if elapsed < _LONG or not bar.n:
        return ""
    return f", {bar.format_interval(elapsed * (bar.total - bar.n) / bar.n)} left"


_line: _Line | None = None


def tell(stage: str) -> None:
    """Show a stage that has no bar of its own; nothing with ``--verbose``."""
    if _line is not None:
        _line.tell(stage)


@contextmanager
def quiet() -> Iterator[None]:
    """Show the stage of all that runs inside on one line, and neither bars nor INFO lines."""
    from tqdm.std import tqdm

    global _line
    unset = [name for name in _ENVIRONMENT if name not in os.environ]
    os.environ.update({name: _ENVIRONMENT[name] for name in unset})
    if find_spec("loguru"):
        _lower_metrics()
    begin, display = tqdm.__init__, tqdm.display
    with open(os.devnull, "w") as nowhere:

        def begin_unseen(bar, *args, **settings):
            shown = {"disable": False, **settings, "file": nowhere}
            begin(bar, *args[:4], **shown)  # later ones are about looks

        _line = line = _Line()
        tqdm.__init__, tqdm.display = begin_unseen, lambda bar, *args, **kwargs: line.show(bar)
        try:
            yield
        finally:
            tqdm.__init__, tqdm.display = begin, display
            line.close()
            _line = None
            for name in unset:
                os.environ.pop(name, None)


def _lower_metrics() -> None:
    """Put llm-compressor's lines of level METRIC (error and time of every layer) beside INFO. It
    puts them above WARNING where nobody has given the level a place before."""
    from loguru import logger

    try:
        logger.level("METRIC")
    except ValueError:
        logger.level("METRIC", no=20)
