"""The measurements of a GPU: each part in a process of its own, so that what breaks one leaves the others' results."""
