"""From files to documents of tokens. No torch."""
