"""The DAT inference service; docs/architecture.md says how its parts fit."""
