"""What is done to a running model: sites, hooks, patches, and re-running only what lies above an intervention."""
