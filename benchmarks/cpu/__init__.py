"""What this library takes on a CPU beside what is used today: `python -m benchmarks.cpu`."""
