"""Convolutions as linear maps of their weight, without patches: they are several times as large as the image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from curvalg.problem.layers.kinds.maps import LinearMap, WeightForm
from curvalg.problem.model.layer_record import GuardedInput, bytes_of


@dataclass(frozen=True)
class Convolution:
    """The options of a convolution, one number for each spatial axis.

    Args:
        stride: between places.
        padding: zeros on both sides.
        dilation: between the elements of a patch.
        output_padding: of a transposed convolution.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]


class ConvolutionMap(LinearMap):
    """A convolution of an image by any number of weights at once, and its gradient, by torch's own kernels.

    Args:
        form: of the weight.
        options: of the convolution.
        image: what is convolved, (N, channels, *size); N is a multiple of the rows.
        rows: n.
        unfold: image -> patches (N, ..., groups, in).
    """

    def __init__(
        self, form: WeightForm, options: Convolution, image: GuardedInput, rows: int, unfold: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__(form)
        self._options, self._image, self._rows, self._unfold = options, image, rows, unfold

    @property
    def nbytes(self) -> int:
        return bytes_of(self._image.tensor)

    @staticmethod
    def laid_out(image: Tensor) -> Tensor:
        """The image as the kernels read it fastest: channels last on the CPU (few channels take a tenth of the time)."""
        if image.ndim == 4 and image.device.type == "cpu":
            return image.contiguous(memory_format=torch.channels_last)
        return image

    def inputs(self, rows: slice = slice(None)) -> Tensor:
        image = self._image.tensor
        if rows != slice(None):
            image = image.reshape(self._rows, -1, *image.shape[1:])[rows].flatten(0, 1)
        patches = self._unfold(image)
        count = image.shape[0] * self._rows // self._image.tensor.shape[0]
        return patches.reshape(count, -1, *patches.shape[-2:]).permute(2, 0, 1, 3).contiguous()

    def push(self, weights: Tensor) -> Tensor:
        form, width = self.form, weights.shape[0]
        # Directions as further output channels of each group.
        if form.transposed:
            stacked = weights.movedim(0, 1).flatten(1, 2)
        else:
            stacked = weights.reshape(width, form.groups, -1, *form.shape[1:]).transpose(0, 1).flatten(0, 2)
        o = self._options
        y: Tensor = torch.ops.aten.convolution(
            self._image.tensor,
            stacked,
            None,
            o.stride,
            o.padding,
            o.dilation,
            form.transposed,
            o.output_padding,
            form.groups,
        )
        places = y.movedim(1, -1).reshape(self._rows, -1, form.groups, width, y.shape[1] // (form.groups * width))
        return places.permute(2, 0, 1, 3, 4)

    def pull(self, mixed: Tensor) -> Tensor:
        form, image, o = self.form, self._image.tensor, self._options
        groups, _, _, width, out = mixed.shape
        size = self._size(image.shape[2:])
        # Channels last in memory, as the deltas lie.
        cotangent = mixed.permute(1, 2, 0, 3, 4).reshape(image.shape[0], *size, -1).movedim(-1, 1)
        if form.transposed:
            shape = (form.shape[0], width * out, *form.shape[2:])
        else:
            shape = (groups * width * out, *form.shape[1:])
        if set(form.shape[2:]) == {1} and set(o.stride) != {1}:
            # In channels last, torch 2.13 writes beyond the gradient of strided 1 x 1 weights on CPUs without AVX-512.
            image, cotangent = image.contiguous(), cotangent.contiguous()
        like = image.new_zeros(()).expand(shape)  # only its shape counts
        options = (o.stride, o.padding, o.dilation, form.transposed, o.output_padding, groups)
        gradient: Tensor
        _, gradient, _ = torch.ops.aten.convolution_backward(
            cotangent, image, like, None, *options, (False, True, False)
        )
        if form.transposed:
            return gradient.reshape(form.shape[0], width, *form.shape[1:]).movedim(1, 0)
        return gradient.reshape(groups, width, out, *form.shape[1:]).transpose(0, 1).reshape(width, *form.shape)

    def _size(self, size: torch.Size) -> list[int]:
        """The number of places of the output along each axis."""
        o, kernel = self._options, self.form.shape[2:]
        parts = zip(size, kernel, o.stride, o.padding, o.dilation, o.output_padding, strict=True)
        if self.form.transposed:
            return [(n - 1) * s - 2 * p + d * (k - 1) + extra + 1 for n, k, s, p, d, extra in parts]
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d, _ in parts]
