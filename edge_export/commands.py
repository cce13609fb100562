"""``fieldfleet export`` and ``fieldfleet publish``. Neither opens a listener."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fl_core.contracts.cli import Subparsers, command, emit, output_folder
from fl_core.contracts.errors import DataError
from fl_core.contracts.manifests import BundleManifest


def add_commands(subparsers: Subparsers) -> None:
    export = command(subparsers, "export", run_export, help="make a verified ONNX bundle of a checkpoint", config=False)
    export.add_argument("checkpoint", type=Path, metavar="CKPT")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="the bundle folder to make")
    export.add_argument(
        "--calibration",
        type=Path,
        metavar="DIR",
        help="data set for calibration and golden samples (default: the application's generator); never clients' data",
    )
    export.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help='override a key of the checkpoint\'s configuration, such as export.targets=\'["x86", "arm64"]\'',
    )
    publish = command(
        subparsers, "publish", run_publish, help="sign a bundle into a repository that devices fetch from", config=False
    )
    publish.add_argument("bundle", type=Path, metavar="BUNDLE")
    publish.add_argument(
        "--repo", type=Path, required=True, metavar="DIR", help="the repository; made at the first publication"
    )
    publish.add_argument(
        "--keys", type=Path, metavar="DIR", help="the signing keys, outside of the repository (default: REPO-keys)"
    )
    publish.add_argument("--channel", default="stable", metavar="NAME", help="that devices follow (default: stable)")


def run_export(args: argparse.Namespace) -> int:
    output_folder(args.out)
    if args.calibration is not None and not args.calibration.is_dir():
        raise DataError(
            f"--calibration {args.calibration}: no such folder", remedy="name a data set, or leave it to the generator"
        )
    from edge_export.export import export_checkpoint

    def report(line: str) -> None:
        print(f"export {args.checkpoint}: {line}", file=sys.stderr, flush=True)

    manifest = export_checkpoint(args.checkpoint, args.out, args.calibration, args.overrides, report=report)
    document = {
        "application": manifest.application,
        "bundle": str(args.out),
        "parent_sha256": manifest.parent_sha256,
        "targets": manifest.targets,
        "export": manifest.unknown["export"],
    }
    emit(args, document, summary(args.out, manifest))
    return 0


def summary(out: Path, manifest: BundleManifest) -> str:
    lines = [f"{out}: bundle of {manifest.application}"]
    for name, facts in manifest.targets.items():
        timing = facts["latency_ms"]
        latency = f", p50 {timing['p50_ms']:.3f} ms" if timing else ""
        note = f" ({facts['note']})" if facts["note"] else ""
        lines.append(f"  {name}: {facts['precision']}, {facts['bytes']:,} bytes{latency}{note}")
    return "\n".join(lines)


def run_publish(args: argparse.Namespace) -> int:
    from fl_core.delivery.publication import publish_bundle

    done = publish_bundle(args.bundle, args.repo, keys=args.keys, channel=args.channel)
    document = {
        "application": done.application,
        "channel": done.channel,
        "version": done.version,
        "repository": str(done.repository),
        "keys": str(done.keys),
        "root": str(done.root),
        "files": list(done.files),
        "bytes": done.bytes,
    }
    text = (
        f"{done.repository}: version {done.version} of {done.application} in channel {done.channel}, {done.bytes:,} bytes\n"
        f"  devices start their trust from {done.root}; keep the keys in {done.keys} safe"
    )
    emit(args, document, text)
    return 0
