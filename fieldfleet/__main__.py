"""The command: composes each room's ``commands.py``; turns errors into one screen of text and an exit code."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from fl_core.contracts.cli import start_logging
from fl_core.contracts.errors import EnvironmentFault, ExitCode, FieldfleetError
from fl_core.contracts.offswitches import set_off_switches

ROOMS = (
    "fieldfleet.apps",
    "hpc_trainer.commands",
    "hpc_trainer.performance.commands",
    "hpc_trainer.data_command",
    "hpc_trainer.slurm",
    "simulations.commands",
    "fl_server.commands",
    "fl_clients.commands",
    "fieldfleet.evaluate",
    "edge_export.commands",
    "fieldfleet.demo_command",
    "fieldfleet.doctor",
)
# A device's long-lived process does not pay for what the other rooms import.
LIGHT = {"agent": "fl_clients.commands"}
EXTRAS = {
    "torch": "train",
    "flwr": "server",
    "onnxruntime": "edge",
    "paho": "edge",
    "onnx": "export",
    "onnxscript": "export",
    "tuf": "edge",
    "grpc": "edge",
    "amqtt": "server",
    "uvicorn": "server",
    "matplotlib": "report",
    "PIL": "edge",
    "pytorch_optimizer": "train",
    "google": "edge",
    "pyarrow": "tracking",
    "tensorboard": "tracking",
    "mlflow": "tracking",
    "ray": "cluster",
}
EPILOG = "exit codes: 0 done, 1 a goal or check was missed, 2 wrong input, 3 environment, 4 refused or unreachable, 130 interrupted"


def build_parser(rooms: Sequence[str] = ROOMS) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fieldfleet", description="Federated and edge learning on Flower.", epilog=EPILOG
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for room in rooms:
        importlib.import_module(room).add_commands(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    set_off_switches()
    words = list(sys.argv[1:] if arguments is None else arguments)
    light = LIGHT.get(words[0]) if words else None
    args = build_parser([light] if light else ROOMS).parse_args(words)
    start_logging(verbose=args.verbose)
    try:
        return int(args.run(args) or 0)
    except FieldfleetError as error:
        return report(error)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        return report(
            EnvironmentFault(
                f"this command needs the package {error.name!r}", remedy=f"pip install 'fieldfleet[{extra}]'"
            )
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return ExitCode.INTERRUPTED
    except BrokenPipeError:  # the reader of our stdout went away
        sys.stderr.close()
        return ExitCode.DONE


def report(error: FieldfleetError) -> int:
    print(f"fieldfleet: {error}", file=sys.stderr)
    return int(error.exit_code)


if __name__ == "__main__":
    sys.exit(main())
