"""64-bit ARM processors: signed activations and weights suit their dot-product instructions."""

from edge_export.target import EdgeTarget

TARGET = EdgeTarget(
    name="arm64",
    description="64-bit ARM (Cortex-A, Jetson, Raspberry Pi); fastest with dot-product instructions",
    activation_type="int8",
    weight_type="int8",
    machines=("aarch64", "arm64"),
)
