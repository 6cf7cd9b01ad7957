"""How often the methods find what is there, and how often what is not."""
