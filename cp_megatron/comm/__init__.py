"""Who talks to whom: the launch, process groups, collectives, random numbers."""
