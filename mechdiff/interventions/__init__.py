"""What is done to a running model: hooks, patches, and running only what lies above an intervention."""
