"""Files of a configuration: YAML text, the folders of runs, and the presets."""
