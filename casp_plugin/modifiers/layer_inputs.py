"""Inputs of layers in a model that is compressed from its first layer to its last.

llm-compressor runs decoder layer after decoder layer on what the compressed layers before it put
out. Two things are added here. Each layer runs a second time on what the dense layers before it
have put out, so that the change of its inputs is known. And the linears of a layer are compressed
in the order in which they read (GPTQ's "true sequential"): the later ones read what the earlier
ones have changed, in a run of the layer up to there.

Shapes: B sequences of a batch, T tokens of a sequence, C channels.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from llmcompressor.core import active_session
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.utils.helpers import use_eager_attention
from torch import nn

from casp_plugin.statistics.hooks import TokenMean, add_ranks

__all__ = ["InputStatistics", "LayerCalls", "LayerInputs"]


class InputStatistics:
    """Second moments of one input.

    :ivar moment: running mean of x x^T, shape (C, C)
    :ivar change: running mean of (x_dense - x) x^T, shape (C, C); without tokens where the dense
        model's input is not known
    """

    def __init__(self):
        self.moment = TokenMean()
        self.change = TokenMean()

    def add(self, x: torch.Tensor) -> torch.Tensor:
        """Count an input of the compressed model, and return it as rows, shape (B * T, C).

        :param x: shape (..., C)
        """
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self.moment.add_products(rows, len(rows))
        return rows

    def add_change(self, rows: torch.Tensor, dense: torch.Tensor) -> None:
        """Count the dense model's input for the same tokens; nothing where it is of other tokens,
        as experts get them.

        :param rows: of :meth:`add`
        :param dense: shape (..., C)
        """
        wanted = dense.detach().reshape(-1, dense.shape[-1]).float()
        if len(wanted) != len(rows):
            return
        if self.change.total is None:
            self.change.total = rows.new_zeros(rows.shape[1], rows.shape[1])
        self.change.total.addmm_((wanted - rows).T, rows)
        self.change.tokens += len(rows)

    @cached_property
    def mean_moment(self) -> torch.Tensor:
        """Return the mean of the moment, once all is counted."""
        return self.moment.finish()

    @property
    def mean_change(self) -> torch.Tensor | None:
        """Return the mean of the change; None without tokens."""
        return self.change.total / self.change.tokens if self.change.tokens else None


class LayerInputs:
    """Second moments of the inputs of layers, collected by hooks of a modifier.

    :param modifier: registers the hooks, which are off while compressed layers pass on their output
    :param model: the model
    :param linears: names of the layers whose inputs are measured
    :param layers: names of the decoder layers, in order
    :param changes: whether to compare with the dense model
    :param in_order: whether the linears of a decoder layer are compressed one after another
    :param dense_model: the dense model, where the layers in hand are not dense any more
    :ivar tokens: number of tokens, of all ranks, that the layer with the most inputs has read
    """

    def __init__(
        self,
        modifier: HooksMixin,
        model: nn.Module,
        linears: Iterable[str],
        layers: Iterable[str],
        changes: bool,
        in_order: bool,
        dense_model: nn.Module | None = None,
    ):
        self.model = model
        self._dense_model = dense_model
        self.tokens = 0
        self._changes = changes
        self._in_order = in_order
        layers = list(layers)
        linears = list(linears)
        self._layer_of = {
            name: next((f for f in layers if name.startswith(f"{f}.")), None) for name in linears
        }
        self._inputs: dict[str, InputStatistics] = {}
        self._owner: dict[str, str] = {}  # first reader of an input, by reader, in order of calls
        self._rows: dict[str, list[torch.Tensor]] = {}  # of the batch in hand, by owner
        self._latest: tuple[str, torch.Tensor] | None = None
        # whether a layer runs beside the calibration, on the dense model's input for instance
        self._aside = False
        self._calls: dict[str, IntermediatesCache] = {}  # arguments of layers
        self._outputs: dict[str, dict[int, torch.Tensor]] = {}  # of dense layers, by batch
        self._passed_on: dict[str, torch.Tensor] = {}  # first output of compressed layers
        self._dense: dict[str, nn.Module] = {}  # modules that were replaced in the layer in hand
        self._entered: set[str] = set()  # layers that run as modules
        self._handles = []
        self._own = set()  # hooks that stay on in runs on the dense model's input
        for name in linears:
            module = model.get_submodule(name)
            see = partial(self._see, name)
            self._own.add(modifier.register_hook(module, see, "forward_pre"))
        previous = dict(zip(layers[1:], layers[:-1], strict=True))
        for name in layers if changes or in_order else ():
            before = previous.get(name)
            if before is not None and before.rpartition(".")[0] != name.rpartition(".")[0]:
                before = None  # the first layer of a stack of its own
            layer = model.get_submodule(name)
            note_call = partial(self._note_call, name, before)
            modifier.register_hook(layer, partial(self._enter, name), "forward_pre")
            modifier.register_hook(layer, note_call, "forward", with_kwargs=True)
            # this one stays on while compressed layers pass on their output
            note_passed_on = partial(self._note_passed_on, name)
            self._handles.append(layer.register_forward_hook(note_passed_on))

    def stages(self, names: Iterable[str]) -> Iterator[dict[str, InputStatistics | None]]:
        """Yield layers that are to be compressed next, with the statistics of their inputs: one
        object for all that read one input, None where no token reached a layer.

        The model must be changed before the next stage is asked for.

        :param names: of layers that were calibrated
        """
        by_layer: dict[str | None, list[str]] = {}
        for name in names:
            by_layer.setdefault(self._layer_of[name], []).append(name)
        for layer, members in by_layer.items():
            reached = [name for name in self._owner if name in members]
            owners = list(dict.fromkeys(self._owner[name] for name in reached))
            if layer in self._calls and self._in_order:
                steps = [[owner] for owner in owners]
            else:
                steps = [owners]
            for number, step in enumerate(steps):
                if number:
                    self._inputs[step[0]] = self._replayed(layer, step[0])
                readers = [name for name in reached if self._owner[name] in step]
                known = {name: self._inputs[self._owner[name]] for name in readers}
                _sum_over_ranks(known.values())
                counts = [each.moment.tokens for each in known.values()]
                self.tokens = max(self.tokens, *counts, 0)
                yield known
                for owner in step:
                    del self._inputs[owner]
            unreached = [name for name in members if name not in self._owner]
            if unreached:
                yield dict.fromkeys(unreached)
            for name in reached:
                del self._owner[name]
            self._calls.pop(layer, None)
            self._dense.clear()
        self._rows.clear()
        self._latest = None

    def calls(self, layer: str) -> "LayerCalls | None":
        """Return the calls of a decoder layer, forgotten here; None if there were none."""
        known = self._calls.pop(layer, None)
        return None if known is None else LayerCalls(self, known)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Let layers run without being seen."""
        self._aside = True
        try:
            yield
        finally:
            self._aside = False

    def replace(self, name: str, module: nn.Module) -> None:
        """Put a compressed module into the model, and keep the dense one while its layer runs."""
        if self._calls:
            self._dense[name] = self.model.get_submodule(name)
        self.model.set_submodule(name, module)

    def close(self) -> None:
        """Remove the hooks that are not the modifier's, and forget all."""
        for handle in self._handles:
            handle.remove()
        for kept in (self._outputs, self._rows, self._calls, self._passed_on, self._dense):
            kept.clear()

    def _see(self, name: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0]
        if self._aside:
            if self._rows.get(name):  # only owners are there
                self._inputs[name].add_change(self._rows[name].pop(0), x)
            return
        if name not in self._owner:
            shared = self._latest is not None and self._latest[1] is x
            self._owner[name] = self._latest[0] if shared else name
        if self._owner[name] != name:
            return
        self._latest = name, x
        layer = self._layer_of[name]
        if self._in_order and layer in self._entered:
            first = next(n for n in self._owner if self._layer_of[n] == layer)
            if self._owner[first] != name:
                return  # measured when its turn comes
        rows = self._inputs.setdefault(name, InputStatistics()).add(x)
        if self._changes and layer in self._entered:
            self._rows.setdefault(name, []).append(rows)

    def _enter(self, name: str, layer: nn.Module, args: tuple) -> None:
        if not self._aside:
            self._entered.add(name)

    def _note_call(
        self,
        name: str,
        before: str | None,
        layer: nn.Module,
        args: tuple,
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        """Keep the arguments of a decoder layer, and run it on the dense model's input."""
        if self._aside:
            return
        batch = active_session().state.current_batch_idx
        x = args[0] if args else kwargs.get("hidden_states")
        dense = self._dense_input(before, batch, x) if self._changes else None
        call = {"args": args, "kwargs": kwargs}
        if self._dense_model is not None:
            layer = self._dense_model.get_submodule(name)
        if dense is not None or self._dense_model is not None:
            hidden = None if dense is None else dense.to(x.device)
            with self.aside(), HooksMixin.disable_hooks(keep=self._own):
                if self._dense_model is None:
                    output = _run(layer, args, kwargs, hidden)
                else:  # arguments are for the attention that calibration runs
                    with use_eager_attention(self._dense_model):
                        output = _run(layer, args, kwargs, hidden)
        if self._dense_model is not None:
            call |= {"output": _hidden(output), "batch": batch}
        elif self._changes and x is not None:
            call["dense"] = x if dense is None else dense  # only the layer itself will change
        if self._changes:
            self._outputs.setdefault(name, {})[batch] = _hidden(output).to("cpu")
        if self._in_order:
            self._calls.setdefault(name, IntermediatesCache()).append(call)
        self._rows.clear()
        self._latest = None

    def _dense_input(
        self, before: str | None, batch: int, x: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Return what the dense layer before has put out; None where that is not the input."""
        known = self._outputs.get(before)
        passed_on = self._passed_on.pop(before, None)
        if passed_on is not None and not _equal(passed_on, x):
            known = self._outputs[before] = {}  # something happens between the two layers
        return None if known is None or x is None else known.pop(batch, None)

    def _note_passed_on(self, name: str, layer: nn.Module, args: tuple, output: Any) -> None:
        """Keep the first output of a layer once it is compressed, until the next one reads it."""
        if self._aside:
            return
        if HooksMixin._HOOKS_DISABLED and name in self._outputs and name not in self._passed_on:
            self._passed_on[name] = _hidden(output).detach().to("cpu", copy=True)

    def _replayed(self, layer: str, linear: str) -> InputStatistics:
        """Return the statistics of a linear's input in its layer as it is by now."""
        statistics = InputStatistics()
        module = self.model.get_submodule(layer)
        calls = self._calls[layer]
        with HooksMixin.disable_hooks():
            for batch in range(len(calls.batch_intermediates)):
                call = calls.fetch(batch)
                x = self._captured(linear, module, call["args"], call["kwargs"])
                if x is None:
                    continue
                rows = statistics.add(x)
                if "dense" in call:
                    dense = call["dense"].to(x.device)
                    with self._dense_modules():
                        wanted = self._captured(linear, module, call["args"], call["kwargs"], dense)
                    if wanted is not None:
                        statistics.add_change(rows, wanted)
        return statistics

    def _captured(
        self,
        linear: str,
        layer: nn.Module,
        args: tuple,
        kwargs: dict[str, Any],
        hidden: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Run a decoder layer up to a linear, and return the linear's input; None if it reads
        none."""

        def stop(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            raise _Reached(args[0])

        handle = self.model.get_submodule(linear).register_forward_pre_hook(stop)
        try:
            _run(layer, args, kwargs, hidden)
        except _Reached as reached:
            return reached.input
        finally:
            handle.remove()
        return None

    @contextmanager
    def _dense_modules(self) -> Iterator[None]:
        """Put the dense modules of the layer in hand back for a while."""
        coded = {name: self.model.get_submodule(name) for name in self._dense}
        for name, module in self._dense.items():
            self.model.set_submodule(name, module)
        try:
            yield
        finally:
            for name, module in coded.items():
                self.model.set_submodule(name, module)


class LayerCalls:
    """The arguments of a decoder layer in all batches, and what the dense layer has put out.

    :param inputs: keeps its hooks from seeing what runs here
    :param calls: by place
    """

    def __init__(self, inputs: LayerInputs, calls: IntermediatesCache):
        self._inputs = inputs
        self._calls = calls

    def __len__(self) -> int:
        return len(self._calls.batch_intermediates)

    def run(self, layer: nn.Module, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what a layer puts out now, and what the dense one has, shape (B, T, C) both."""
        call = self._calls.fetch(place)
        with self._inputs.aside():
            found = _first(_run(layer, call["args"], call["kwargs"], None))
        return found, call["output"].to(found.device)

    def batch(self, place: int) -> int:
        """Return the number of the batch that a call belongs to."""
        return self._calls.fetch(place, ["batch"])["batch"]

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield all that the layer reads, and what the dense one has put out."""
        for place in range(len(self)):
            call = self._calls.fetch(place)
            given = [*call["args"], *call["kwargs"].values(), call["output"]]
            yield from (value for value in given if torch.is_tensor(value))


class _Reached(Exception):
    """Ends the run of a layer at one of its linears.

    :param input: of the linear, shape (B, T, C)
    """

    def __init__(self, input: torch.Tensor):
        super().__init__()
        self.input = input


def _run(layer: nn.Module, args: tuple, kwargs: dict[str, Any], hidden: torch.Tensor | None) -> Any:
    """Run a decoder layer, on another hidden state if one is given."""
    if hidden is None:
        return layer(*args, **kwargs)
    if args:
        return layer(hidden, *args[1:], **kwargs)
    return layer(**kwargs | {"hidden_states": hidden})


def _first(output: Any) -> torch.Tensor:
    """Return the hidden state that a decoder layer puts out, shape (B, T, C)."""
    return output if torch.is_tensor(output) else output[0]


def _hidden(output: Any) -> torch.Tensor:
    """Return the same without its graph."""
    return _first(output).detach()


def _equal(passed_on: torch.Tensor, x: torch.Tensor | None) -> bool:
    return x is not None and x.shape == passed_on.shape and torch.equal(passed_on, x.cpu())


def _sum_over_ranks(inputs: Iterable[InputStatistics]) -> None:
    """Sum up the statistics of all ranks."""
    inputs = list({id(input): input for input in inputs}.values())
    for kind in ("moment", "change"):
        means = {i: getattr(input, kind) for i, input in enumerate(inputs)}
        devices = [mean.total.device for mean in means.values() if mean.total is not None]
        if devices:
            add_ranks(means, devices[0])
