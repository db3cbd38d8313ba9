"""The machine: devices, cores, memory, disk, clocks, and compatibility with libraries."""
