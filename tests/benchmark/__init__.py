"""The benchmark: fio against this server and against the servers a user would take instead, in one run on one disk.

`python -m tests.benchmark` (or `make bench`) measures, `python -m tests.benchmark.report` turns a result into
the tables of `docs/performance.md`, `python -m tests.benchmark.scale` measures the maps from 1 GiB to 16 TiB.
"""
