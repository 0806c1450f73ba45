"""What is installed, what will be used, and the memory that a configuration needs."""

from prefix_rft.doctor.doctor import print_diagnosis, print_memory

__all__ = [
    "print_diagnosis",
    "print_memory",
]
