"""``fieldfleet doctor --run``: the bottleneck in what ``scaling`` or ``profile`` measured, with what helps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fieldfleet.doctor import NOTE, Finding
from fl_core.contracts.errors import InputError

STAGE_REMEDIES = {  # a stage of a training step -> what helps
    "input": "pack the data (fieldfleet data pack), stage them (--scratch), augment less",
    "forward": "this is the model's own work: bf16, compile, channels; more processes share it",
    "loss": "this is the loss's own work: look at its operations on whole volumes",
    "backward": "this is the model's own work: bf16, compile, no recomputation where memory allows; more processes share it",
    "communication": "larger batches, fewer and larger messages, a faster link; hsdp keeps it inside a node",
    "optimizer": "larger batches make fewer steps; fsdp shares the work; kfac, soap: a longer update_every",
}


def bottlenecks(folder: Path) -> Iterator[Finding]:
    """Of scaling.json and profile.json. Raises InputError where there is neither, or one is not readable."""
    found = [name for name in ("scaling.json", "profile.json") if (folder / name).is_file()]
    if not found:
        raise InputError(
            f"--run {folder}: holds neither scaling.json nor profile.json",
            remedy="make one with 'fieldfleet scaling' or 'fieldfleet profile'",
        )
    for name in found:
        try:
            document = json.loads((folder / name).read_text(encoding="utf-8"))
            if name == "scaling.json":
                what, _, remedy = str(document["bottleneck"]).partition("; ")
                yield Finding("bottleneck of scaling", NOTE, what, remedy)
            else:
                yield from _largest_stages(document)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise InputError(f"--run {folder / name}: not as this release writes it: {error!r}") from None


def _largest_stages(document: dict[str, Any]) -> Iterator[Finding]:
    """The stage that takes most of a step at the largest size of each scan; checkpoints come beside the steps."""
    for scan in document["scans"]:
        last = {
            stage: facts["seconds"]["values"][-1] for stage, facts in scan["stages"].items() if stage in STAGE_REMEDIES
        }
        stage = max(last, key=lambda s: last[s])
        share = 100 * last[stage] / sum(last.values())
        detail = f"{stage}: {share:.0f} % of a step at {scan['dimension']} {scan['sizes'][-1]}"
        yield Finding("bottleneck of a step", NOTE, detail, STAGE_REMEDIES[stage])
