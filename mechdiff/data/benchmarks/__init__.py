"""Benchmarks as one kind of item: read from the hub or a file, checked, and scored."""
