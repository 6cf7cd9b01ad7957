"""Tables, figures and logs, drawn from the records of a run."""
