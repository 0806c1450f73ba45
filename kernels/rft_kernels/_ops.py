"""Where the ops are registered; Hugging Face's kernel-builder puts a namespace of its own here."""


def add_op_namespace_prefix(op_name: str) -> str:
    return f"rft_kernels::{op_name}"
