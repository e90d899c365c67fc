"""The training step: DeepSpeed's engine and its config, optimizer, what each rank holds of it, patches and kernels.

Importing this package imports no DeepSpeed.
"""
