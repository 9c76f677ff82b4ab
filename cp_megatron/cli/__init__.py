"""The command line: flags generated from the settings, and what they refuse. No torch."""
