"""What the benchmarks share: models, workloads, a client, a server to start, and how figures are reported.

It must not know a single benchmark: what is measured, and how often, is said in scripts/bench_*.py.
"""
