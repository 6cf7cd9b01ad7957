"""A model of a pair, steered by a handle if asked for, as a model of lm-evaluation-harness."""
