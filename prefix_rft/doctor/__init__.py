"""What is installed, what a run will use, and how much memory it needs."""

from prefix_rft.doctor.doctor import device_bytes, print_diagnosis, print_memory
from prefix_rft.doctor.memory import memory_terms, peak_bytes
from prefix_rft.doctor.shapes import Place, shapes_of

__all__ = [
    "Place",
    "device_bytes",
    "memory_terms",
    "peak_bytes",
    "print_diagnosis",
    "print_memory",
    "shapes_of",
]
