"""The operators as Triton kernels. Nothing here is imported before Triton is chosen for a tensor."""
