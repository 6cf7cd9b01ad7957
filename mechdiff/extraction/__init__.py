"""From prompts to activation stores."""
