"""The report: one page a reader can check, drawn from records alone."""
