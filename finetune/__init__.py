"""The parts that train.py assembles, a folder a floor: each imports from lower floors only (docs/architecture.md)."""
