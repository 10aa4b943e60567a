"""How a module's parameters, input and output are divided over tensor-parallel ranks.

torch's own styles place a fixed pair of parameters; this one is told each by name, so biases and adapters are too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel.style import ParallelStyle


@dataclass  # not frozen: `parallelize_module` notes on it which rank the values come from
class Divided(ParallelStyle):
    """A module of several ranks.

    Args:
        parameters: the placement of each of its own parameters, by name.
        given: how a plain tensor that comes in is divided.
        returned: how the output is to be divided.
        plain: whether a plain tensor comes out, this rank's part.
        gradient: how the gradient of a plain output is divided, where not as the output is.
    """

    parameters: Mapping[str, Placement]
    given: Placement
    returned: Placement
    plain: bool = True
    gradient: Placement | None = None

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        give: Any = self._give  # annotated there as if it returned nothing
        return distribute_module(module, device_mesh, self._place, self._receive, give)

    def _place(self, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        del name
        for own, parameter in list(module.named_parameters(recurse=False)):
            placed = distribute_tensor(parameter, mesh, [self.parameters[own]], src_data_rank=None)
            module.register_parameter(own, nn.Parameter(placed, requires_grad=parameter.requires_grad))

    def _receive(self, module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        del module
        first = inputs[0]
        if not isinstance(first, DTensor):
            first = DTensor.from_local(first, mesh, [self.given], run_check=False)
        return (first, *inputs[1:])

    def _give(self, module: nn.Module, output: Any, mesh: DeviceMesh) -> Tensor:
        del module, mesh
        # Also where nothing moves: on the way back, this is where a gradient that ranks have parts of is added up.
        moved = output.redistribute(placements=[self.returned])
        if not self.plain:
            return moved
        return moved.to_local(grad_placements=None if self.gradient is None else [self.gradient])
