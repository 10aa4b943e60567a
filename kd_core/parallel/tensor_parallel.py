"""Placement of a module's parameters, input and output over tensor-parallel ranks.

torch's own styles place a fixed pair of parameters. This one places every parameter by its name, so that it covers
biases and adapters too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel.style import ParallelStyle

from kd_core.sharded_values import local_values


@dataclass  # not frozen: `parallelize_module` sets `src_data_rank` on it
class TensorParallelStyle(ParallelStyle):
    """Placements of one module's parameters, input and output over the tensor-parallel ranks.

    Args:
        parameters: the placement of each of the module's own parameters, by name.
        input_placement: how a plain input tensor is divided. None: the module computes with its local parameters.
        output_placement: how the output is divided.
        use_local_output: return this rank's part of the output as a plain tensor.
        grad_placement: how the gradient of a plain output is divided, where it differs from the output.
    """

    parameters: Mapping[str, Placement]
    input_placement: Placement | None
    output_placement: Placement
    use_local_output: bool = True
    grad_placement: Placement | None = None

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if self.input_placement is None:
            return distribute_module(module, device_mesh, self._distribute_parameters)
        prepare_output: Any = self._prepare_output  # torch annotates this argument as if it returned nothing
        return distribute_module(module, device_mesh, self._distribute_parameters, self._prepare_input, prepare_output)

    def _distribute_parameters(self, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        del name
        for parameter_name, parameter in list(module.named_parameters(recurse=False)):
            distributed = distribute_tensor(parameter, mesh, [self.parameters[parameter_name]], src_data_rank=None)
            module.register_parameter(parameter_name, nn.Parameter(distributed, requires_grad=parameter.requires_grad))

    def _prepare_input(self, module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        del module
        assert self.input_placement is not None
        first = inputs[0]
        if not isinstance(first, DTensor):
            first = DTensor.from_local(first, mesh, [self.input_placement], run_check=False)
        return (first, *inputs[1:])

    def _prepare_output(self, module: nn.Module, output: Any, mesh: DeviceMesh) -> Tensor:
        del module, mesh
        # Redistribute even where the placement stays: its backward sums the partial gradients of the ranks.
        redistributed = output.redistribute(placements=[self.output_placement])
        if not self.use_local_output:
            return redistributed
        return redistributed.to_local(grad_placements=None if self.grad_placement is None else [self.grad_placement])


@dataclass
class ExpertParallelStyle(TensorParallelStyle):
    """Placement of stacked experts over the tensor-parallel ranks.

    Each rank computes its experts for all positions, and the outputs of all ranks are added up.
    """

    def _distribute_parameters(self, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        super()._distribute_parameters(name, module, mesh)
        experts: Any = module
        experts.first_expert = mesh.get_local_rank() * len(local_values(next(module.parameters(recurse=False))))

    def _prepare_input(self, module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        """Makes all inputs plain. A rank's gradients of `x` and `weights` are of its experts: they are added up."""
        del module

        def with_summed_gradient(value: Tensor) -> Tensor:
            whole = (
                value if isinstance(value, DTensor) else DTensor.from_local(value, mesh, [Replicate()], run_check=False)
            )
            return whole.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])

        x, experts, weights = inputs
        return with_summed_gradient(x), experts, with_summed_gradient(weights)

    def _prepare_output(self, module: nn.Module, output: Tensor, mesh: DeviceMesh) -> Tensor:
        partial = DTensor.from_local(output, mesh, [Partial()], run_check=False)
        return super()._prepare_output(module, partial, mesh)
