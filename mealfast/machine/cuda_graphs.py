"""CUDA graphs: work that is launched once, recorded, and replayed with one launch.

A graph replays the same kernels on the same memory. What changes from step to step is therefore copied into tensors
that stay where they are, before each replay.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import cache
from typing import Generic, Protocol, TypeVar

import torch

Result = TypeVar("Result")
Copied = TypeVar("Copied", bound="Copyable")


class Copyable(Protocol):
    """What a graph's inputs must do: be cloned once, and take the values of others from then on."""

    def clone(self: Copied) -> Copied: ...

    def copy_(self: Copied, other: Copied) -> object: ...


WARM_UP = 3  # calls before a capture: libraries pick algorithms and allocate workspaces, compilers compile


def eager_steps(world_size: int) -> int:
    """Training steps before one is captured."""
    # DDP settles its buckets and its timing of them in its first iterations (PyTorch, CUDA semantics). The variable
    # named there, TORCH_NCCL_ASYNC_ERROR_HANDLING, may stay on: NCCL's watchdog is thread-local since torch 2.7.
    return WARM_UP if world_size == 1 else 11


class CapturedForward(Generic[Result]):
    """A function of one tensor as a CUDA graph. Its outputs are the same tensors each time, overwritten."""

    def __init__(self, function: Callable[[torch.Tensor], Result], example: torch.Tensor) -> None:
        """Captures `function` for inputs of the shape and dtype of `example`, on the current CUDA device."""
        self._input = example.clone()
        on_side_stream(lambda: [function(self._input) for _ in range(WARM_UP)])
        self._graph, self._outputs = capture(lambda: function(self._input))

    @property
    def shape(self) -> torch.Size:
        """Of the inputs that it takes."""
        return self._input.shape

    def __call__(self, tensor: torch.Tensor) -> Result:
        self._input.copy_(tensor)
        self._graph.replay()
        return self._outputs


class CapturedStep(Generic[Copied]):
    """A training step as a CUDA graph: the first calls run as they are, and then one is captured and replayed.

    The step takes one argument that has `clone` and `copy_`, as tensors do, and returns nothing.
    """

    def __init__(self, function: Callable[[Copied], None], world_size: int) -> None:
        self._function = function
        self._eager_calls = eager_steps(world_size)
        self._graph: torch.cuda.CUDAGraph | None = None

    @property
    def captured(self) -> bool:
        """Whether calls replay a graph by now."""
        return self._graph is not None

    def __call__(self, inputs: Copied) -> None:
        if self._eager_calls > 0:
            self._eager_calls -= 1
            on_side_stream(lambda: self._function(inputs))
            return
        if self._graph is None:
            self._inputs = inputs.clone()
            self._graph, _ = capture(lambda: self._function(self._inputs))
        self._inputs.copy_(inputs)
        self._graph.replay()


def on_side_stream(function: Callable[[], Result]) -> Result:
    """Runs a function on a stream of its own, as work that is to be captured wants it; the caller's stream waits."""
    stream = _side_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = function()
    torch.cuda.current_stream().wait_stream(stream)
    return result


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """One for all: torch keeps the memory that was freed on each stream for that stream."""
    return torch.cuda.Stream(device)


def capture(function: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Records what a function launches, without running it; the graph, and what the function returned.

    Raises RuntimeError where something in it cannot be recorded; the caller's stream is the current one again.
    """
    graph = torch.cuda.CUDAGraph()
    gc.collect()
    gc.disable()  # what it would free meanwhile, another graph or a loader, may wait for the device: the capture's end
    try:
        # The outer context puts the caller's stream back where ending a broken capture raises (torch 2.11).
        # thread_local: DALI's threads decode and allocate meanwhile, which a global capture would forbid.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, capture_error_mode="thread_local"),
        ):
            result = function()
    finally:
        gc.enable()
    return graph, result
