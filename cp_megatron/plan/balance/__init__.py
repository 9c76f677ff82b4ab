"""The balanced layout: dealing slices of documents to ranks."""
