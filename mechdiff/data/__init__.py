"""What goes in and what is kept: prompts and stored activations."""
