"""The benchmark suite: ``python -m benchmarks`` times curvalg against its peers; README.md says how and what."""
