"""Application: one learning task, from data to metric. Torch-free; the torch half is named and imported on demand."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.resources
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fl_core.contracts import config as configuration
from fl_core.contracts.errors import ConfigError, DataError, unknown_name
from fl_core.contracts.installed import APPLICATION_ENTRY_POINTS, known_applications
from fl_core.learning.examples import Examples, RawData
from fl_core.learning.samples import SampleFormat

Outputs = Mapping[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output of the model; -1 in ``shape`` is the batch."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Application:
    """Everything that the rooms need to know of an application; its folder is ``applications/NAME``.

    read(path) -> RawData: the loader; raises DataError naming file and column before any work starts.
    generate(config, seed) -> RawData: data made by the application itself.
    inputs(config), outputs(config): the model's tensors, in the order of ``forward``'s arguments and results.
    postprocess(config, outputs) -> columns: what users read (``score`` or ``prediction`` and class scores).
    metrics(config, outputs, examples) -> name -> value, with scikit-learn's names.
    groups(config, examples) -> name -> boolean mask (N,): parts reported separately.
    model, loss, augment: "module:attribute" of the torch half (or the callable itself, where nothing is found by name):
      build_model(config) -> Module with forward(*inputs) -> Tensor or tuple of Tensors; in training further ones may follow,
        for the loss alone;
      loss(outputs, targets, config) -> (numerator, denominator), both scalar Tensors: sums over the examples, never means;
      augment(inputs, seeds, config) -> inputs, numpy (N, ...) arrays, ``seeds`` (N,) uint64 keyed by (seed, epoch, example);
        or an ``Augmentation``, where the targets move with the inputs.
    sample: "module:attribute" of targets that the model itself would draw, where the loss is a negative log-likelihood:
      sample(outputs, keys, config) -> targets, keyed by ``keys`` (N,) uint64; the expected gradient of their loss is zero.
    floor: "module:attribute" of the classical methods to read the model's scores by:
      floor(config, train, test, *, seed) -> name -> outputs on ``test``, as the model would give them.
    pictures: "module:attribute" of what a report shows beside the scores, inputs, predictions and errors; needs matplotlib:
      pictures(config, outputs, examples) -> (PNG bytes, caption) of each, of at least one example.
    samples: how a device collects this application's data one by one; None = only whole data sets.
    verify: overrides under which ``fieldfleet verify-loss`` trains it: few data, uneven weights, a layer that normalises.
    """

    name: str
    title: str
    summary: str
    config_type: type[Any]
    data_set: str
    client_term: str
    read: Callable[[Path], RawData]
    generate: Callable[[Any, int], RawData]
    inputs: Callable[[Any], tuple[TensorSpec, ...]]
    outputs: Callable[[Any], tuple[TensorSpec, ...]]
    postprocess: Callable[[Any, Outputs], dict[str, npt.NDArray[Any]]]
    metrics: Callable[[Any, Outputs, Examples], dict[str, float]]
    groups: Callable[[Any, Examples], dict[str, npt.NDArray[np.bool_]]]
    labels: Callable[[Any], tuple[str, ...]]
    primary_metric: str
    higher_is_better: bool
    model: str | Callable[..., Any]
    loss: str | Callable[..., Any]
    augment: str | Callable[..., Any] = ""
    sample: str | Callable[..., Any] = ""
    floor: str = ""
    pictures: str | Callable[..., Any] = ""
    samples: SampleFormat | None = None
    verify: tuple[str, ...] = ()

    def build_model(self, config: Any) -> Any:
        return resolve(self.model)(config)

    def loss_function(self) -> Callable[..., Any]:
        return resolve(self.loss)  # type: ignore[no-any-return]

    def augment_function(self) -> Callable[..., Any] | None:
        return resolve(self.augment) if self.augment else None

    def sample_function(self) -> Callable[..., Any] | None:
        return resolve(self.sample) if self.sample else None

    def floor_function(self) -> Callable[..., dict[str, dict[str, npt.NDArray[Any]]]] | None:
        return resolve(self.floor) if self.floor else None

    def pictures_function(self) -> Callable[..., list[tuple[bytes, str]]] | None:
        return resolve(self.pictures) if self.pictures else None

    def presets(self) -> dict[str, Any]:
        """Name -> resource of each preset of this application."""
        folder = importlib.resources.files(self.config_type.__module__.rpartition(".")[0]) / "presets"
        return {
            p.name.removesuffix(".toml"): p
            for p in sorted(folder.iterdir(), key=lambda p: p.name)
            if p.name.endswith(".toml")
        }

    def configure(self, overrides: Iterable[str] = (), *, preset: str = "default") -> Any:
        """The preset with ``--set`` overrides, validated. Raises ConfigError."""
        import tomllib

        presets = self.presets()
        if preset not in presets:
            raise unknown_name(f"preset of {self.name}", preset, list(presets))
        origin = f"{self.name}/presets/{preset}.toml"
        table = tomllib.loads(presets[preset].read_text(encoding="utf-8"))
        configuration.parse(self.config_type, table, origin=origin)
        items = list(overrides)
        if not items:
            return configuration.parse(self.config_type, table, origin=origin)
        return configuration.parse(self.config_type, configuration.apply_overrides(table, items), origin="--set")

    def configure_from(
        self, table: Mapping[str, Any], overrides: Iterable[str] = (), *, origin: str, defaults: Collection[str] = ()
    ) -> Any:
        """From a manifest's or a message's table: never trusted, validated in the same way.

        defaults: dotted keys that its writer left at their defaults; those that this version does not know are passed over.
        """
        if not isinstance(table, Mapping):
            raise ConfigError(f"{origin}: a configuration must be a table")
        try:
            known = configuration.known(self.config_type, table, defaults) if defaults else table
            return configuration.parse(self.config_type, configuration.apply_overrides(known, overrides), origin=origin)
        except RecursionError:
            raise ConfigError(f"{origin}: the configuration is nested too deeply") from None


def resolve(reference: str | Callable[..., Any]) -> Any:
    if not isinstance(reference, str):
        return reference
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _loaded(name: str, entry: importlib.metadata.EntryPoint) -> Any:
    try:
        return entry.load()
    except (ImportError, AttributeError) as error:
        raise DataError(
            f"application {name!r}: the installed package does not offer {entry.value}: {error}",
            remedy="install it again; start in a folder that holds no other folder of its name",
        ) from None


def application(name: str) -> Application:
    """By name. Raises InputError with the list of the known ones."""
    known = known_applications()
    if name not in known:
        raise unknown_name("application", name, known)
    for entry in importlib.metadata.entry_points(group=APPLICATION_ENTRY_POINTS):
        if entry.name == name:
            found = _loaded(name, entry)
            break
    else:
        found = importlib.import_module(f"applications.{name}").APPLICATION
    if not isinstance(found, Application):
        raise DataError(f"application {name!r} does not expose an Application as APPLICATION")
    return found
