"""The kernels: one file each, raw tensors in, tensors out, every one proven against its PyTorch reference in ``minisft.nf4``.

| file | what it computes | who decodes the weight |
|---|---|---|
| ``dequantize.py`` | 4 bits to fp32, fp16 or bf16, the 8-bit scales decoded in the same launch | once, to memory |
| ``quantize.py`` | fp32, fp16 or bf16 to 4 bits and fp32 scales | - |
| ``matvec.py`` | y = x W^T for 1 to 4 rows | in registers, beside a dot product on ordinary cores |
| ``matmul_small.py`` | y = x W^T for up to 128 rows | in registers, for the tensor cores |
| ``matmul_backward.py`` | dX = G W for up to 128 rows | the same, the other way round |
| ``workspace.py`` | the reused buffer for a dense weight | - |
| ``cpu_nf4.py`` ``cpu_nf4.cpp`` ``cpu_build.py`` | the same on a CPU, in C++ compiled at the first call | in registers |
| ``cpu_matmul.py`` | y = x W^T for up to 32 rows on a CPU | in registers |
| ``cpu_split.py`` ``cpu_split.cpp`` | y = x W^T and x W for many rows in fp32, by AMX | - |
| ``cpu_decode.py`` ``cpu_decode.cpp`` | a whole decoder, one token for each of up to 16 rows, on a CPU | in registers |
| ``twelve_bit.py`` ``cpu_twelve_bit.cpp`` ``cpu_twelve_bit.h`` | numbers in 12 bits, for that decoder | in registers |
| ``gguf_copy.py`` | numbers of a GGUF file in its own 4 to 8 bits again, for the same | in registers |
| ``cpu_elementwise.py`` ``cpu_elementwise.cpp`` | norms, SwiGLU and RoPE of a training step, on a CPU | - |
| ``cpu_adapter.py`` ``cpu_adapter.cpp`` | what backward of adapters needs beside G W, on a CPU | - |
| ``cpu_attention.py`` ``cpu_attention.cpp`` | attention within segments, and its backward, on a CPU | - |
| ``cpu_gguf.py`` ``cpu_gguf.cpp`` | stored blocks of a GGUF file to fp32, on a CPU | once, to memory |

Importing this package imports no Triton. The files with kernels in them import it at their top, because ``@triton.jit``
needs it there: import such a file inside the function that is about to launch it. They run on a CPU only under Triton's
interpreter (``TRITON_INTERPRET=1``), which is how the tests prove the arithmetic without a GPU.
"""
