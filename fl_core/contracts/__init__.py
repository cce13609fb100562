"""The vocabulary of the project: config, manifests, errors, exit codes, names. Standard library, numpy and safetensors only."""
