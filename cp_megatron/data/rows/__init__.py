"""From documents to the rows of a run. No torch."""
