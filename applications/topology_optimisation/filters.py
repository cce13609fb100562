"""The cone filter of topology optimisation over a grid of elements, by fast Fourier transform. Torch-free, numpy alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Field = npt.NDArray[np.float64]


class ConeFilter:
    """Weights max(0, radius - distance) between element centres, radius in elements (Bruns & Tortorelli 2001; Bourdin 2001).

    ``weighted(x)``: H x; ``sums``: H 1. What lies outside the grid does not count.
    """

    def __init__(self, shape: tuple[int, ...], radius: float) -> None:
        self.shape = shape
        reach = max(0, int(np.ceil(radius)) - 1)
        offsets = np.indices((2 * reach + 1,) * len(shape)) - reach
        cone = np.maximum(0.0, radius - np.sqrt((offsets**2).sum(axis=0)))
        self._padded = tuple(n + reach for n in shape)
        kernel = np.zeros(self._padded)
        for at in np.argwhere(cone > 0):
            kernel[tuple((at - reach) % np.array(self._padded))] += cone[tuple(at)]
        self._transform = np.fft.rfftn(kernel)
        self.sums = self.weighted(np.ones(shape))

    def weighted(self, x: Field) -> Field:
        axes = tuple(range(len(self.shape)))
        found = np.fft.irfftn(np.fft.rfftn(x, self._padded, axes) * self._transform, self._padded, axes)
        result: Field = found[tuple(slice(n) for n in self.shape)]
        return result

    def density(self, x: Field) -> Field:
        """The physical densities of the design variables ``x``: a weighted mean of the neighbourhood."""
        return self.weighted(x) / self.sums

    def density_transposed(self, gradient: Field) -> Field:
        """The chain rule through ``density``."""
        return self.weighted(gradient / self.sums)

    def sensitivity(self, x: Field, gradient: Field) -> Field:
        """Sigmund's filtered sensitivities (1997), with his floor under ``x``."""
        return self.weighted(x * gradient) / (self.sums * np.maximum(1e-3, x))
