"""The signatures of other trainers, served by these kernels: `trl`, `liger`, `verl`.

Each module works without the library it is named after; only its `patch()` imports that, and puts
these functions in place of the library's own.
"""
