"""What the benchmarks share: the device, problems, peers, running and reporting."""
