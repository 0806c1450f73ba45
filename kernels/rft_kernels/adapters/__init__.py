"""The signatures of other trainers, served by these kernels: `trl`, `liger`, `verl`.

Each module works without the library it is named after; only its `patch()` imports that, and puts
these functions in place of the library's own. Their signatures have no place for the bound of the
vocabulary-sized temporaries, so it is set here: `rft_kernels.adapters.workspace_bytes = 2**28`.
"""

workspace_bytes = 2**30  # for every call that starts from hidden states
