"""What a run will take of memory, disk, network and time, and whether the cluster has it."""
