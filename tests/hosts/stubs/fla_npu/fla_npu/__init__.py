"""The kernels of linear attention that vllm-ascend imports from 0.27 on; no test calls one."""
