"""What a real survey sounds like: its amplitude spectrum and its noise, stored or measured, and traces made to match.

The stored figures are those of two small pieces of the F3 block (Dutch North Sea; dGB Earth Sciences, TNO; CC BY-SA 3.0):
inline 362 of github.com/seg/tutorials-2017 (1710_Colored_inversion) and test-data/f3.sgy of github.com/equinor/segyio.
A test measures them again where the pieces are present.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fl_core.contracts.names import DATA_ENVIRONMENT_VARIABLE
from fl_core.storage import archive

Array = npt.NDArray[Any]
INTERVAL_S = 0.004
BAND_HZ = 5.0
REFERENCE_FOLDER = "seismic_f3"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """spectrum_db: amplitude in dB below the largest, in bands of 5 Hz from 0 to 125 Hz (4 ms samples).

    noise_power: of the noise over that of the signal, (quietest, noisiest) piece of the survey.
    footprint: share of the noise in the noisiest piece that comes back every third crossline (acquisition footprint).
    """

    spectrum_db: tuple[float, ...]
    noise_power: tuple[float, float]
    footprint: float
    origin: str


STORED = Reference(
    spectrum_db=(
        *(-24.7, -7.3, -9.4, -8.8, -4.3, -2.9, -4.4, -4.1, -1.1, -4.2, -4.5, 0.0, -1.0),
        *(-5.9, -6.8, -7.6, -18.9, -27.9, -28.4, -28.5, -28.6, -28.7, -28.8, -28.7, -28.8),
    ),
    noise_power=(0.01, 0.72),
    footprint=0.78,
    origin="stored figures of the F3 block",
)


def reference(choice: str) -> Reference:
    """``stored``, ``measured`` (on the survey under $FIELDFLEET_DATA), or ``auto``: measured where it is there."""
    root = os.environ.get(DATA_ENVIRONMENT_VARIABLE, "")
    folder = Path(root) / REFERENCE_FOLDER
    if choice == "stored" or (choice == "auto" and not (root and folder.is_dir())):
        return STORED
    section = archive.read_npz(folder / "f3_inline362.npz", required=("amp",))["amp"].astype(np.float64)
    cube = archive.read_npz(folder / "f3_cube.npz", required=("amp",))["amp"].astype(np.float64)
    return measure(section, cube, origin=str(folder))


def measure(section: Array, cube: Array, *, origin: str) -> Reference:
    """section: (crosslines, samples), the spectrum and the quietest noise; cube: (inlines, crosslines, samples)."""
    power = np.abs(np.fft.rfft(section * np.hanning(section.shape[1]), axis=1)) ** 2
    amplitude = np.sqrt(power.mean(axis=0))
    band = (np.fft.rfftfreq(section.shape[1], INTERVAL_S) / BAND_HZ).astype(int)
    mean = np.array([amplitude[band == k].mean() for k in range(int(125 / BAND_HZ))])
    quiet = signal_share([lag_correlation(section, 0, lag) for lag in (1, 2, 3)])
    noisy = signal_share([lag_correlation(cube, 0, lag) for lag in (1, 2, 3)])
    across = [lag_correlation(cube, 1, lag) for lag in (1, 2, 3)]
    footprint = (across[2] - (across[0] + across[1]) / 2) / (1 - noisy)
    return Reference(
        spectrum_db=tuple(round(float(v), 1) for v in 20 * np.log10(mean / mean.max())),
        noise_power=(round(max(0.01, 1 / quiet - 1), 2), round(1 / noisy - 1, 2)),
        footprint=round(float(np.clip(footprint, 0, 1)), 2),
        origin=origin,
    )


def lag_correlation(traces: Array, axis: int, lag: int) -> float:
    """Correlation of traces ``lag`` apart along ``axis``; the last axis is time."""
    centred = traces - traces.mean(axis=-1, keepdims=True)
    count = traces.shape[axis]
    a, b = np.take(centred, range(count - lag), axis), np.take(centred, range(lag, count), axis)
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def signal_share(correlations: list[float]) -> float:
    """The correlation at lags 1, 2, 3, ... run back to lag 0 by a straight line: 1 without trace-wise noise.

    Geology changes steadily from trace to trace; noise that differs between traces is a step at lag 0 (White, 1984).
    """
    _, at_zero = np.polyfit(np.arange(1, len(correlations) + 1), correlations, 1)
    return float(np.clip(at_zero, 0.05, 1.0))


def target_amplitude(ref: Reference, frequencies_hz: Array, *, stretch: float = 1.0) -> Array:
    """The reference's amplitude at ``frequencies_hz``, its band made ``stretch`` times wider."""
    centres = (np.arange(len(ref.spectrum_db)) + 0.5) * BAND_HZ * stretch
    db = np.interp(frequencies_hz, centres, ref.spectrum_db)
    return np.where(frequencies_hz > 0, 10 ** (db / 20), 0.0)


def filtered(traces: Array, ref: Reference, *, stretch: float, phase: float) -> Array:
    """Traces whose mean spectrum is the reference's: convolved with a zero-phase wavelet, then turned by ``phase`` radians.

    The wavelet is the reference's spectrum over the reflectivity's own, smoothed over 9 frequencies.
    """
    spectrum = np.fft.rfft(traces, axis=-1)
    frequencies = np.fft.rfftfreq(traces.shape[-1], INTERVAL_S)
    own = np.sqrt((np.abs(spectrum) ** 2).mean(axis=tuple(range(traces.ndim - 1))))
    own = np.convolve(np.pad(own, 4, mode="edge"), np.full(9, 1 / 9), mode="valid")
    wavelet = target_amplitude(ref, frequencies, stretch=stretch) / np.maximum(own, 1e-6 * own.max() + 1e-30)
    return np.fft.irfft(spectrum * wavelet * np.exp(1j * phase), n=traces.shape[-1], axis=-1)


def noise(rng: np.random.Generator, shape: tuple[int, int, int], footprint: float) -> Array:
    """White noise of variance 1; the share ``footprint`` of its power comes back every third crossline."""
    random = rng.standard_normal(shape)
    pattern = rng.standard_normal((shape[0], 3, shape[2]))
    repeated = pattern[:, np.arange(shape[1]) % 3]
    made: Array = np.sqrt(1 - footprint) * random + np.sqrt(footprint) * repeated
    return made
