"""Parts of scripts/bench.py: cases, peers, timing, measured limits, probes in fresh processes, tables."""
