"""Stand-in for one compiled function: `torch._C._cpu._is_avx512_supported`.

vLLM 0.17 asks it which kernel library to load; later torch releases dropped that name and
kept the public one.
"""

import torch

torch._C._cpu._is_avx512_supported = torch.cpu._is_avx512_supported
