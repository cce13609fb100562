"""Every performance and quality claim of the README, as a command. ``python -m benchmarks [--quick]`` runs them all."""
