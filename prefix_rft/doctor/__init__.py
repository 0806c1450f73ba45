"""What is installed, what a run will use, and how much memory it needs."""

from prefix_rft.doctor.doctor import print_diagnosis, print_memory

__all__ = [
    "print_diagnosis",
    "print_memory",
]
