"""The balanced layout: how documents are dealt to ranks. No torch."""
