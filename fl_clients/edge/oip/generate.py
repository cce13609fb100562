"""Compile ``open_inference.proto`` into ``open_inference_pb2.py``: python -m fl_clients.edge.oip.generate.

The generated module holds the serialized descriptor only. ``messages`` makes the classes at run time, in a pool of
their own: so they work with every protobuf runtime from 5.28 on, and beside another copy of the protocol (that of
a client library, say) in the same process.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from fl_core.contracts.errors import EnvironmentFault

FOLDER = Path(__file__).parent
PROTO = FOLDER / "open_inference.proto"
GENERATED = FOLDER / "open_inference_pb2.py"


def compile_descriptor() -> bytes:
    """The serialized FileDescriptorProto. Raises EnvironmentFault without grpcio-tools, or where protoc fails."""
    try:
        from grpc_tools import protoc  # type: ignore[import-untyped]
    except ImportError:
        raise EnvironmentFault("grpcio-tools is not installed", remedy="pip install 'fieldfleet[dev]'") from None
    from google.protobuf.descriptor_pb2 import FileDescriptorSet

    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "set.pb"
        code = protoc.main(["protoc", f"--proto_path={FOLDER}", f"--descriptor_set_out={out}", PROTO.name])
        if code != 0:
            raise EnvironmentFault(f"{PROTO}: protoc failed with code {code}")
        found = FileDescriptorSet.FromString(out.read_bytes())
    return bytes(found.file[0].SerializeToString(deterministic=True))


def render(descriptor: bytes) -> str:
    lines = [descriptor[i : i + 24] for i in range(0, len(descriptor), 24)]
    body = "\n".join(f"    {line!r}" for line in lines)
    return (
        '"""Generated from open_inference.proto by fl_clients.edge.oip.generate: do not edit."""\n\n'
        f"SERIALIZED_FILE = (\n{body}\n)\n"
    )


if __name__ == "__main__":
    GENERATED.write_text(render(compile_descriptor()), encoding="ascii")
    sys.exit(0)
