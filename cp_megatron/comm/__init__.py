"""Process groups, collectives, point-to-point messages, random numbers and the launch."""
