"""The forward and backward passes of a training step, or a test's forward pass, as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import svf_fast
from fss.processes import takes_channels_last

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Parts = list[dict[str, Any]]
Body = Callable[[Parts], Tensor]

WARM_UP = 3
"""Steps that run before a capture: they choose and compile kernels, and make workspaces."""


def captured(
    body: Body,
    network: nn.Module,
    inputs: Sequence[str],
    fabric: Fabric,
    graph: str,
    tell: Callable[[str], None],
) -> Body:
    """Wrap the body of a step to run as a CUDA graph where wanted and possible; else return it.

    Args:
        body: see `CapturedStep`, as `network` and `inputs`.
        fabric: the launched Fabric.
        graph: "auto" or "off", see `TrainConfig`.
        tell: called with a line saying why steps run eagerly on a GPU.
    """
    if graph == "off" or not records_graphs(fabric.device):
        return body
    if fabric.world_size > 1:
        tell("graph: steps run eagerly, several processes exchange gradients within a step")
        return body
    return CapturedStep(body, network, inputs, CudaGraph(fabric.device), tell)


def captured_forward(
    forward: Body, network: nn.Module, inputs: Sequence[str], fabric: Fabric, graph: str
) -> Body:
    """Wrap a forward pass without gradients to run as a CUDA graph, as `captured` does a step.

    With several processes too: they share nothing in it.
    """
    if graph == "off" or not records_graphs(fabric.device):
        return forward
    graphs = CudaGraph(fabric.device)
    return CapturedStep(forward, network, inputs, graphs, fabric.print, trains=False)


def records_graphs(device: torch.device) -> bool:
    """Tell whether work on a device can be recorded and replayed."""
    return device.type == "cuda"


class CudaGraph:
    """A recording of the work that a function gives to a GPU; another capture replaces it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def run(self, function: Callable[[], Tensor]) -> Tensor:
        """Call a function without recording, on the stream of captures: torch asks for that."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function()
        current.wait_stream(self._stream)
        return result

    def capture(self, function: Callable[[], Tensor]) -> Tensor:
        """Record a function without computing anything; return what it returned.

        The memory that it took stays the recording's, where each replay writes.
        """
        self.discard()
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self.device)
        generator = torch.cuda.default_generators[self.device.index]
        random_state = generator.clone_state()
        try:
            # thread_local: a thread of the loader pins the next batches meanwhile
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                result = function()
        except Exception:
            # torch leaves stream and generator in the middle of a capture that failed
            torch.cuda.set_stream(current)
            generator.graphsafe_set_state(random_state)
            raise
        self._graph = graph
        return result

    def replay(self) -> None:
        """Compute what was recorded, with random numbers that go on from the last ones."""
        assert self._graph is not None
        self._graph.replay()

    def discard(self) -> None:
        """Free the memory of the recording."""
        self._graph = None


class CapturedStep:
    """The body of a step, which runs eagerly at first and then as a graph, replayed each step.

    The parts of a step are copied to where the graph reads; the gradients that it writes are put
    back at their parameters, so an optimizer may set them to None. Accumulated parts are one graph.
    A graph is made anew when `svf_fast.follow` says that the present one is outdated. Steps of
    another shape than the first run eagerly. So does everything once a capture has failed.

    Args:
        body: takes the parts of a step and returns a tensor; it adds the gradients of the parts to
            those of the network, which are None before. It must not wait for the device, and what
            it reads and writes in place besides the parts must stay where it is.
        network: whose parameters get the gradients.
        inputs: the entries of a part that the body reads, tensors.
        graph: records the body.
        tell: called with a line once steps run eagerly.
        trains: whether the body makes gradients; else those of the network are left alone.
    """

    def __init__(
        self,
        body: Body,
        network: nn.Module,
        inputs: Sequence[str],
        graph: CudaGraph,
        tell: Callable[[str], None],
        trains: bool = True,
    ) -> None:
        self._body = body
        self._network = network
        self._parameters = list(network.parameters()) if trains else []
        self._inputs = tuple(dict.fromkeys(inputs))
        self._graph = graph
        self._tell = tell
        self._buffers: Parts = []
        self._key: object = None
        self._warm = 0
        self._result: Tensor | None = None
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []
        self._failed = False
        self._explained: set[str] = set()

    def __call__(self, parts: Parts) -> Tensor:
        """Run the body on the parts of a step."""
        if self._failed:
            return self._body(parts)
        if not self._take(parts):
            self._explain("graph: steps of another shape than the first run eagerly")
            return self._body(parts)
        key = svf_fast.follow(self._network)
        if key != self._key:
            self._discard()
            self._key, self._warm = key, 0
        if self._result is None:
            if self._warm < WARM_UP:
                self._warm += 1
                return self._graph.run(lambda: self._body(self._buffers))
            if not self._capture():
                return self._body(parts)
        self._graph.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return self._result.clone()

    def _take(self, parts: Parts) -> bool:
        """Copy the parts into the buffers, which the first parts make; False if they do not fit."""
        given = [part[name] for part in parts for name in self._inputs]
        if not self._buffers:
            self._buffers = [{name: _buffer(part[name]) for name in self._inputs} for part in parts]
        kept = [part[name] for part in self._buffers for name in self._inputs]
        if [(t.shape, t.dtype) for t in given] != [(t.shape, t.dtype) for t in kept]:
            return False
        for buffer, tensor in zip(kept, given, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        return True

    def _capture(self) -> bool:
        """Capture the body; False if that failed, which leaves all as it was before."""

        def composed() -> Tensor:
            with svf_fast.composed(self._network):
                return self._body(self._buffers)

        try:
            self._result = self._graph.capture(composed)
        except RuntimeError as error:
            self._discard()
            self._buffers, self._failed = [], True
            line = next(iter(str(error).strip().splitlines()), type(error).__name__)
            self._explain(f"graph: steps run eagerly, capturing one failed ({line:.200})")
            return False
        self._gradients = [
            (parameter, parameter.grad)
            for parameter in self._parameters
            if parameter.grad is not None
        ]
        return True

    def _discard(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
        self._result, self._gradients = None, []
        self._graph.discard()

    def _explain(self, line: str) -> None:
        if line not in self._explained:
            self._explained.add(line)
            self._tell(line)


def _buffer(tensor: Tensor) -> Tensor:
    """Allocate a tensor like this one; images [..., C, H, W] are laid out as the network's maps."""
    if tensor.ndim < 4 or not (tensor.is_floating_point() and takes_channels_last(tensor.device)):
        return torch.empty_like(tensor)
    images = torch.empty_like(tensor.flatten(0, -4), memory_format=torch.channels_last)
    return images.unflatten(0, tensor.shape[:-3])
