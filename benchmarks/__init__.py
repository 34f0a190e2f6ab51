"""The benchmark suite, its baselines, its committed results; installed as `kdfast.benchmarks`."""
