"""State that keeps float32 whatever precision the model around it runs in."""

import torch
from torch import nn


class Float32Module(nn.Module):
    """A module whose float32 buffers and parameters follow the model's device but never its dtype.

    Statistics (means, standard deviations, principal directions) and codebooks lose more from a cast to bfloat16 than
    the network around them does, and the loss is permanent. `model.to(torch.bfloat16)`, `model.half()` and the like
    therefore leave them alone; callers cast the result of a computation, not its constants. `from_pretrained` does the
    same for what a model lists in `_keep_in_fp32_modules`.
    """

    def _apply(self, fn, recurse=True):
        buffers = dict(self._buffers)
        parameters = {name: parameter.data for name, parameter in self._parameters.items() if parameter is not None}
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            old = buffers[name]
            if buffer is not None and old is not None and old.dtype == torch.float32 != buffer.dtype:
                self._buffers[name] = old.to(device=buffer.device)
        for name, data in parameters.items():
            parameter = self._parameters[name]
            if parameter is not None and data.dtype == torch.float32 != parameter.dtype:
                parameter.data = data.to(device=parameter.device)
        return self


class ChannelAffine(Float32Module):
    """Normalise `(B, C, h, w)` with fixed statistics, per channel or per channel and position, in float32.

    Args:
        mean: C numbers, or C * h * w in this order.
        std: As many positive numbers.
        persistent: Keep them in the state dict, for statistics that the config does not carry; as frozen parameters,
            because diffusers' `EMAModel` saves parameters only.
        grid: The h and w of statistics per position.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: list[float], std: list[float], persistent: bool = False, grid: tuple[int, int] = (1, 1)):
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            tensor = torch.tensor(values, dtype=torch.float32).view(1, -1, *grid)
            if persistent:
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(name, tensor, persistent=False)

    def set(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Replace the statistics by `(C,)` tensors, in place."""
        with torch.no_grad():
            self.mean.copy_(mean.view_as(self.mean))
            self.std.copy_(std.view_as(self.std))

    def normalize(self, values: torch.Tensor) -> torch.Tensor:
        """Return `(values - mean) / std` in float32."""
        return (values.float() - self.mean) / self.std

    def denormalize(self, values: torch.Tensor) -> torch.Tensor:
        """Return `values * std + mean` in float32: the inverse of `normalize`."""
        return values.float() * self.std + self.mean
