"""A model of one crop as the start for another: the same network with a fresh last layer for other classes.

    python -m applications.plant_disease.transfer MODEL --out DIR --set 'data.classes=["early_blight", "healthy", "late_blight"]'

The new checkpoint names its parent. Its last layer is zero until it is trained, or solved for in one round by
``algorithm.name = "statistics_head"``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from applications.plant_disease import APPLICATION
from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.checkpoint import Checkpoint
from fl_core.contracts.cli import common_options, emit, output_folder
from fl_core.contracts.config import to_table
from fl_core.contracts.errors import FieldfleetError, InputError
from fl_core.contracts.manifests import CheckpointManifest

HEAD = ("head.weight", "head.bias")


def transferred(model: Path, overrides: Sequence[str]) -> Checkpoint:
    """Raises InputError for a model of another application, and where more than the last layer would differ."""
    from fl_core.learning.torch_arrays import get_arrays

    parent = checkpoints.load(model)
    if parent.manifest.application != APPLICATION.name:
        raise InputError(f"{model}: is a model of {parent.manifest.application}, not of {APPLICATION.name}")
    config = APPLICATION.configure_from(parent.manifest.config, overrides, origin=f"{model}/manifest.json")
    arrays = get_arrays(APPLICATION.build_model(config))
    for name, array in arrays.items():
        if name in HEAD:
            array[...] = 0
        elif name not in parent.arrays or parent.arrays[name].shape != array.shape:
            raise InputError(
                f"{model}: {name} has another shape under these settings", remedy="change data.classes alone"
            )
        else:
            arrays[name] = parent.arrays[name]
    sha, lineage = checkpoints.child_lineage(parent)
    manifest = CheckpointManifest(
        application=APPLICATION.name, config=to_table(config), stage="transfer", parent_sha256=sha, lineage=lineage
    )
    return Checkpoint(manifest, arrays)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m applications.plant_disease.transfer", description=__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a checkpoint folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    common_options(parser)
    args = parser.parse_args(arguments)
    try:
        output_folder(args.out)
        manifest = transferred(args.model, args.overrides).save(args.out)
    except FieldfleetError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    classes = manifest.config["data"]["classes"]
    emit(args, {"out": str(args.out), "classes": classes}, f"{args.out}: {', '.join(classes)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
