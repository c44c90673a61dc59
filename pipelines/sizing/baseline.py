"""What a process takes before it does anything.

Measured with Python 3.11, torch 2.14 for CPUs, ray 2.60, transformers 5.23 and deepspeed 0.19 imported: 1.26 GB
resident, of which 0.65 GB are pages of the libraries' own files, which all processes of a node share. CUDA's share is
assumed.
"""

LIBRARIES = 0.65e9
"""Bytes of the libraries' own pages, once a node."""
PROCESS = 0.66e9
"""Bytes of a process with all of them imported: driver, worker, validation."""
DATA_TASK = 0.45e9
"""Bytes of a data task's process, which loads the processor and no model."""
CUDA_HOST = 2.0e9
"""Bytes of host memory that CUDA's libraries and a context take in a process; an assumption, not measured."""
CUDA_CONTEXT = 1.0e9
"""Bytes of GPU memory of a context, its kernels and NCCL's buffers; an assumption, not measured."""
