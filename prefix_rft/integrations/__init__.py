"""Prefix-RFT inside the trainers of other libraries; nothing else of the package needs them."""
